"""What public ops take beside the plain case: several dtypes under autocast, other numbers."""

import itertools

import numpy as np
import pytest
import torch
from torch import rand, randn

from segkern import ops

SIZES = (8, 8), (8, 8), (9, 9)
BITS, OPEN = ops.pack_bits(torch.arange(36).view(1, 4, 9) % 5 > 1)
LABELS, MASKS = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, 4, 4, dtype=torch.bool)
# of each op a call, and the shapes of its floating tensors
MIXED = {
    "conv3x3": (ops.conv3x3, [(1, 3, 5, 5), (4, 3, 3, 3)]),
    "dwconv3x3_gelu": (ops.dwconv3x3_gelu, [(1, 5, 5, 3), (3, 1, 3, 3), (3,)]),
    "feed_forward": (ops.feed_forward, [(3, 4), (8, 4), (8,), (4, 8), (4,)]),
    "group_norm": (
        lambda x, w, b, up: ops.group_norm(x, 2, w, b, up=up),
        [(1, 4, 5, 5), (4,), (4,), (1, 4, 3, 3)],
    ),
    "mask_bits": (lambda q, f: ops.mask_bits(q, f)[0], [(1, 4, 8), (1, 8, 9)]),
    "masked_attn": (
        lambda q, k, v: ops.masked_attn(q, k, v, BITS, OPEN),
        [(1, 4, 2, 8), (1, 9, 2, 8), (1, 9, 2, 8)],
    ),
    "matching_cost": (
        lambda c, e, f: ops.matching_cost(c, e, f, LABELS, MASKS, torch.full((1, 1, 7, 2), 0.4)),
        [(1, 1, 3, 4), (1, 1, 3, 5), (1, 5, 6, 6)],
    ),
    "ms_deform_attn": (
        lambda v, r, o, l: ops.ms_deform_attn(v, [(2, 3)], r, o, l),
        [(1, 6, 2, 4), (1, 5, 1, 2), (1, 5, 2, 1, 3, 2), (1, 5, 2, 1, 3)],
    ),
    "neighborhood_attn": (
        lambda q, k, v, b: ops.neighborhood_attn(q, k, v, b, 3),
        [(1, 4, 4, 2, 4), (1, 4, 4, 2, 4), (1, 4, 4, 2, 4), (2, 5, 5)],
    ),
    "point_sample": (ops.point_sample, [(1, 3, 5, 5), (1, 4, 2)]),
    "resize_argmax": (ops.resize_argmax, [(1, 3, 5, 5), (7, 5), (8, 5)]),
    "resize_sum": (
        lambda b, x, y: ops.resize_sum((x, y), b),
        [(3,), (1, 3, 5, 5), (1, 3, 3, 4)],
    ),
    "segment_map": (
        lambda c, m, f: ops.segment_map(c, m, "instance", *SIZES, f).scores,
        [(1, 3, 4), (1, 3, 5), (1, 5, 6, 6)],
    ),
    "window_attn": (
        lambda x, a, b: ops.window_attn(x, a, b, 2),
        [(1, 4, 4, 3, 2, 4), (3, 2, 4), (2, 4, 4)],
    ),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", MIXED)
def test_autocast_takes_tensors_of_several_dtypes(name):
    """Near what float32 gives: the order of dtypes decides nothing but the rounding."""
    call, shapes = MIXED[name]
    tensors = [randn(shape) for shape in shapes]
    want = call(*tensors)
    for dtypes in itertools.product((torch.float32, torch.bfloat16), repeat=len(shapes)):
        leaves = [t.to(d).requires_grad_() for t, d in zip(tensors, dtypes)]
        with torch.autocast("cpu", torch.bfloat16):
            out = call(*leaves)
        assert out.shape == want.shape
        if out.is_floating_point():
            assert (out - want).abs().max() <= 0.1 * want.abs().max()
        if out.grad_fn is not None:
            grads = torch.autograd.grad(out.float().sum(), leaves, allow_unused=True)
            assert all(g is None or g.dtype == d for g, d in zip(grads, dtypes))


@pytest.mark.parametrize("name", ["masked_attn", "mask_bits", "conv3x3"])
def test_other_dtypes_are_refused_without_autocast(name):
    call, shapes = MIXED[name]
    first, *others = [randn(shape) for shape in shapes]
    with pytest.raises(TypeError, match=rf"{name}: \w+ must be torch.float32 as"):
        call(first, *(t.bfloat16() for t in others))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="float64"):
        call(first, *(t.double() for t in others))


ROWS = [[[1] * 9, [0] * 9, [0] * 8 + [1], [1] + [0] * 8]]


def test_masked_attn_finds_out_which_rows_are_open():
    q, k, v = randn(1, 4, 2, 8), randn(1, 9, 2, 8), randn(1, 9, 2, 8)
    bits, count = ops.pack_bits(
        torch.tensor([[[1] * 9, [0] * 9, [0] * 8 + [1], [1] + [0] * 8]]) > 0
    )
    want = ops.masked_attn(q, k, v, bits, count)
    for impl in ("kernel", "reference"):
        out = ops.masked_attn(q, k, v, bits, impl=impl)
        assert torch.equal(out, ops.masked_attn(q, k, v, bits, count, impl=impl))
        torch.testing.assert_close(out, want)
    assert want.isfinite().all()


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            [9, 7, 1, 1],
            r"open must count the bits .* got 7 for row \[0, 1\], which has none",
        ),
        ([9, 0, 1, 0], r"got 0 for row \[0, 3\], which has some"),
    ],
    ids=["none set: it was NaN", "some set: they were not seen"],
)
def test_masked_attn_refuses_a_wrong_open(change, message):
    q, k, v = randn(1, 4, 2, 8), randn(1, 9, 2, 8), randn(1, 9, 2, 8)
    bits, _ = ops.pack_bits(torch.tensor(ROWS) > 0)
    with pytest.raises(ValueError, match=message):
        ops.masked_attn(q, k, v, bits, torch.tensor([change], dtype=torch.int32))


SHAPES = {
    "list": [[2, 3], [1, 4]],
    "tensor": torch.tensor([[2, 3], [1, 4]], device="cpu"),
    "int32 tensor": torch.tensor([[2, 3], [1, 4]], device="cpu", dtype=torch.int32),
    "array": np.array([[2, 3], [1, 4]]),
    "numpy ints": [(np.int64(2), np.int32(3)), (np.uint8(1), np.int16(4))],
    "sizes": [torch.Size((2, 3)), torch.Size((1, 4))],
    "rows of a tensor": list(torch.tensor([[2, 3], [1, 4]], device="cpu")),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_ms_deform_attn_takes_shapes_of_any_kind(kind):
    value, reference = randn(1, 10, 2, 4), rand(1, 5, 1, 2)
    offsets, logits = randn(1, 5, 2, 2, 3, 2), randn(1, 5, 2, 2, 3)
    want = ops.ms_deform_attn(value, ((2, 3), (1, 4)), reference, offsets, logits)
    out = ops.ms_deform_attn(value, SHAPES[kind], reference, offsets, logits)
    assert torch.equal(out, want)
    classic = ops.multi_scale_deformable_attention(
        value, SHAPES[kind], rand(1, 5, 2, 2, 3, 2), logits
    )
    assert classic.shape == want.shape


BAD = {
    "floats": [(2.0, 3.0), (1, 4)],
    "floating tensor": torch.tensor([[2.0, 3.0], [1.0, 4.0]], device="cpu"),
    "threes": [(2, 3, 1), (1, 4, 1)],
    "flat": [2, 3, 1, 4],
    "none": None,
    "text": ["23", "14"],
}


@pytest.mark.parametrize("kind", BAD)
def test_ms_deform_attn_names_bad_shapes(kind):
    tensors = randn(1, 10, 2, 4), rand(1, 5, 1, 2), randn(1, 5, 2, 2, 3, 2), randn(1, 5, 2, 2, 3)
    with pytest.raises(TypeError, match=r"shapes must be \(h, w\) pairs of positive ints, got"):
        ops.ms_deform_attn(tensors[0], BAD[kind], *tensors[1:])


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.zeros((), dtype=torch.bool), [True]], ids=repr
)
def test_pack_bits_takes_bool(bad):
    with pytest.raises(TypeError, match=r"pack_bits: mask must be \[..., S\] bool, got"):
        ops.pack_bits(bad)
