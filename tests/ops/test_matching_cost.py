"""matching_cost: the kernel against the formula, and the formula against transformers' matcher."""

import os
from unittest import mock

import pytest
import torch

from segkern.ops import linear_assignment, matching_cost, unpack_bits
from segkern.ops.matching_cost import BOUND, matching_cost_reference
from support.comparison import DTYPES, compare
from support.inputs import matching_cost_inputs
from support.void import counts_by_hand, random_void

INF, NAN = float("inf"), float("nan")
CASES = {
    "small": {},
    "one point": {"P": 1},
    "fewer points than a line": {"P": 5, "T": 1},
    "several ranges of points": {"B": 1, "R": 1, "P": 4200},
    "block and one point": {"B": 1, "R": 1, "P": 1025, "C": 3},
    "maps of one pixel": {"h": 1, "w": 1, "H": 1, "W": 1},
    "more targets than queries": {"Q": 3, "T": 9},
    "several tiles of queries and targets": {"B": 1, "R": 1, "Q": 130, "T": 40, "P": 40},
    "many channels": {"B": 1, "R": 1, "C": 300, "P": 40},
    "wide": {"B": 1, "C": 65, "h": 3, "w": 130, "P": 700, "K": 133},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    inputs = matching_cost_inputs(**CASES[case], dtype=dtype)
    compare(matching_cost, matching_cost_reference, inputs)
    compare(matching_cost, matching_cost_reference, [*inputs[:6], None, 0.5, 3.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_images_of_few_and_of_many_targets(dtype):
    inputs = matching_cost_inputs(B=4, R=1, Q=70, T=70, P=40, dtype=dtype)
    inputs[6] = torch.tensor([70, 32, 33, 0])
    compare(matching_cost, matching_cost_reference, inputs)


def test_bool_masks_and_larger_numbers():
    inputs = matching_cost_inputs()
    want = matching_cost(*inputs)
    masks = inputs[4]
    inputs[4] = masks.bool()
    assert torch.equal(matching_cost(*inputs), want)
    inputs[4] = 3 * masks
    compare(matching_cost, matching_cost_reference, inputs)


def test_mixed_precisions():
    half, single, double = torch.float16, torch.float32, torch.float64
    for dtypes in ((half, single, half), (single, half, half), (double, single, half)):
        inputs = matching_cost_inputs()
        inputs[:3] = [t.to(dtype) for t, dtype in zip(inputs, dtypes)]
        if double not in dtypes:
            compare(matching_cost, matching_cost_reference, inputs)
            continue
        got, want = matching_cost(*inputs), matching_cost_reference(*inputs)
        assert got.dtype == want.dtype == double
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_confident_logits(scale):
    inputs = matching_cost_inputs(P=300)
    inputs[1] *= scale
    compare(matching_cost, matching_cost_reference, inputs)


@pytest.mark.parametrize("kind", ["99 KB", "163 KB", "227 KB", "227 KB, 10.x"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_of_zero(kind, dtype, monkeypatch):
    """1 + exp(-|x|) is 2: the product of a range's 1024 points must not overflow, with whatever
    tiles of points a GPU takes."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from segkern.kernels import _launch

        monkeypatch.setattr(_launch, "ASSUMED", _launch.ASSUMED._replace(kind=kind))
    inputs = matching_cost_inputs(B=1, R=1, Q=3, T=2, P=1024, dtype=dtype)
    inputs[1][:, :, 1] = 0
    compare(matching_cost, matching_cost_reference, inputs)


def test_points_outside_read_zero():
    inputs = matching_cost_inputs(P=200)
    inputs[5] = inputs[5] * 1.6 - 0.3
    inputs[5][:, :, 0] = NAN
    compare(matching_cost, matching_cost_reference, inputs)


WEIGHTS = (2.0, 5.0, 5.0)
VOID = {  # sizes, share of the pixels
    "some": ({}, 0.3),
    "nearly all": ({}, 0.95),
    "all": ({}, 1.0),
    "several ranges of points": ({"B": 1, "R": 2, "P": 4200, "Q": 3}, 0.6),
    "whole words": ({"W": 64}, 0.3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VOID)
def test_void(case, dtype):
    sizes, share = VOID[case]
    inputs = matching_cost_inputs(**sizes, dtype=dtype)
    inputs[5] = inputs[5] * 1.2 - 0.1  # points outside count
    B, _, H, W = inputs[4].shape
    void = random_void(B, H, W, share)
    compare(matching_cost, matching_cost_reference, [*inputs, *WEIGHTS, void])


def test_void_cuts_points_out():
    inputs, void = matching_cost_inputs(B=1, R=1, dtype=torch.float64), random_void(1, 33, 41)
    keep = counts_by_hand(inputs[5][:, 0], void, 41)[0]
    assert 0 < keep.sum() < 60
    cut = [*inputs[:5], inputs[5][:, :, keep], *inputs[6:]]
    for impl in ("kernel", "reference"):
        got = matching_cost(*inputs, void=void, impl=impl)
        torch.testing.assert_close(got, matching_cost_reference(*cut), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_void_pixels_do_not_count(impl):
    """Nothing that masks or features, here of the same size, hold there is seen, even NaN."""
    inputs, void = matching_cost_inputs(h=33, w=41), random_void(2, 33, 41)
    pixels = unpack_bits(void, 41)[:, None]
    want = matching_cost(*inputs, void=void, impl=impl)
    inputs[2] = inputs[2].masked_fill(pixels, NAN)
    inputs[4] = inputs[4].where(~pixels, 1 - inputs[4])
    assert torch.equal(matching_cost(*inputs, void=void, impl=impl), want)


def test_void_of_no_pixel_changes_no_bit():
    inputs = matching_cost_inputs()
    got = matching_cost(*inputs, void=random_void(2, 33, 41, share=0.0))
    assert torch.equal(got, matching_cost(*inputs))


def test_agrees_with_the_formula_of_transformers():
    peer = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    inputs = matching_cost_inputs(B=1, R=1, P=64, dtype=torch.float64)
    class_logits, embed, features, labels, masks, points, _ = inputs
    maps = torch.einsum("brqc,bchw->brqhw", embed, features)[0]
    matcher = peer.Mask2FormerHungarianMatcher(2.0, 5.0, 5.0, 64)
    seen = []

    def keep(cost):
        seen.append(cost)
        return [], []

    with (
        mock.patch.object(peer, "linear_sum_assignment", keep),
        mock.patch.object(torch, "rand", return_value=points[0]),
    ):
        matcher(maps, class_logits[0], [masks[0].double()], [labels[0]])
    got = matching_cost(*inputs)[0, 0].cpu()  # where transformers' matcher takes its costs
    torch.testing.assert_close(got, seen[0], rtol=1e-10, atol=1e-10)


# what is done to (class_logits, mask_embed, features), and the queries whose costs it touches
NOT_FINITE = {
    "class logit NaN": (lambda c, e, f: c[0, 0, 2].fill_(NAN), 2),
    "class logit inf": (lambda c, e, f: c[0, 0, 2, 0].fill_(INF), 2),
    "class logits -inf": (lambda c, e, f: c[0, 0, 2].fill_(-INF), 2),
    "embedding NaN": (lambda c, e, f: e[0, 0, 2, 1].fill_(NAN), 2),
    "embedding inf": (lambda c, e, f: e[0, 0, 2, 1].fill_(INF), 2),
    "embedding huge": (lambda c, e, f: e[0, 0, 2].fill_(3e38), 2),
    "features NaN": (lambda c, e, f: f[0].fill_(NAN), slice(None)),
    "features inf": (lambda c, e, f: f[0].fill_(INF), slice(None)),
}


@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_costs_are_finite(case, impl):
    change, queries = NOT_FINITE[case]
    inputs = matching_cost_inputs()
    want = matching_cost(*inputs)
    change(*inputs[:3])
    got = matching_cost(*inputs, impl=impl)
    assert got.isfinite().all()
    assert (got[0, 0, queries] == BOUND).all()
    if queries == 2:
        rest = torch.ones(7, dtype=torch.bool).index_fill_(0, torch.tensor(2), False)
        torch.testing.assert_close(got[0, 0, rest], want[0, 0, rest])
    linear_assignment(got, inputs[6][:, None].expand(2, 3), check=True)  # it can be solved


def test_padded_slots_are_zero_whatever_they_hold():
    inputs = matching_cost_inputs(T=5)
    inputs[6] = torch.tensor([2, 0])
    want = matching_cost(*inputs)
    assert (want[0, ..., 2:] == 0).all()
    assert (want[1] == 0).all()
    assert (want[0, ..., :2] != 0).all()
    inputs[3][0, 2:] = torch.tensor([-100, 255, 2**40])
    inputs[4][0, 2:] = 255
    for impl in ("kernel", "reference"):
        torch.testing.assert_close(matching_cost(*inputs, impl=impl), want)
    inputs[6] = torch.tensor([9, -1])  # clamped
    assert torch.equal(matching_cost(*inputs), matching_cost(*inputs[:6], torch.tensor([5, 0])))


@pytest.mark.parametrize(
    "case",
    [{"B": 0}, {"R": 0}, {"Q": 0}, {"T": 0}, {"C": 0}],
    ids=["no image", "no prediction", "no query", "no target", "no channel"],
)
def test_empty(case):
    inputs = matching_cost_inputs(**{"C": 8} | case) if case != {"B": 0} else None
    if inputs is None:
        inputs = [t[:0] for t in matching_cost_inputs()]
    B, R, Q, T = *inputs[1].shape[:3], inputs[3].shape[1]
    got = matching_cost(*inputs)
    assert got.shape == (B, R, Q, T)
    torch.testing.assert_close(got, matching_cost_reference(*inputs))


def test_strides_do_not_matter():
    inputs = matching_cost_inputs()
    want = matching_cost(*inputs)
    inputs[2] = inputs[2].to(memory_format=torch.channels_last)
    assert torch.equal(matching_cost(*inputs), want)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    assert not any(t.is_contiguous() for t in strided[:6])
    torch.testing.assert_close(matching_cost(*strided), want)


@pytest.mark.cpu_only
def test_the_number_of_threads_does_not_matter():
    inputs = matching_cost_inputs(B=1, R=1, P=4200)
    two = matching_cost(*inputs)
    torch.set_num_threads(1)
    assert torch.equal(matching_cost(*inputs), two)


def test_no_gradient_and_no_autocast():
    inputs = matching_cost_inputs()
    want = matching_cost(*inputs)
    inputs[:3] = [t.requires_grad_() for t in inputs[:3]]
    with torch.autocast(want.device.type, torch.bfloat16):
        for impl in ("kernel", "reference"):
            got = matching_cost(*inputs, impl=impl)
            assert not got.requires_grad
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want)


def test_opcheck():
    inputs, counts = matching_cost_inputs(), torch.tensor([[60, 7, 0], [1, 2, 3]])
    op = torch.ops.segkern.matching_cost
    torch.library.opcheck(op, (*inputs, *WEIGHTS, counts))
    torch.library.opcheck(op, (*matching_cost_inputs(dtype=torch.bfloat16)[:6], None, *WEIGHTS))


def test_compile():
    inputs = [*matching_cost_inputs(), *WEIGHTS, random_void(2, 33, 41)]
    compiled = torch.compile(matching_cost, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), matching_cost(*inputs))


def replaced(place, change):
    return lambda i: [change(t) if k == place else t for k, t in enumerate(i)]


BAD = {
    "class logits 3-d": (
        replaced(0, lambda t: t[0]),
        ValueError,
        r"class_logits must be \[B, R, Q, K\+1\] float",
    ),
    "class logits int": (replaced(0, lambda t: t.long()), TypeError, "class_logits .* float, got"),
    "no class": (replaced(0, lambda t: t[..., :0]), ValueError, r"class_logits must have K\+1 >="),
    "embeddings of fewer queries": (
        replaced(1, lambda t: t[:, :, 1:]),
        ValueError,
        "mask_embed must be .* with B = 2, R = 3, Q = 7, got",
    ),
    "features of other channels": (
        replaced(2, lambda t: t[:, 1:]),
        ValueError,
        "features must be .* with B = 2, C = 8, got",
    ),
    "features of no row": (replaced(2, lambda t: t[:, :, :0]), ValueError, "must have h, w >= 1"),
    "labels int32": (replaced(3, lambda t: t.int()), TypeError, "labels must be .* int64"),
    "masks float": (replaced(4, lambda t: t.float()), TypeError, "masks must be .* bool or uint8"),
    "masks of other targets": (replaced(4, lambda t: t[:, 1:]), ValueError, "B = 2, T = 4, got"),
    "masks of no column": (replaced(4, lambda t: t[..., :0]), ValueError, "must have H, W >= 1"),
    "points without prediction": (
        replaced(5, lambda t: t[:, 0]),
        ValueError,
        r"points must be \[B, R, P, 2\]",
    ),
    "no point": (replaced(5, lambda t: t[:, :, :0]), ValueError, "points must have P >= 1, got"),
    "counts int32": (replaced(6, lambda t: t.int()), TypeError, "n_targets must be .* int64"),
    "void of words of 64 bits": (
        lambda i: [*i, *WEIGHTS, random_void(2, 33, 41).long()],
        TypeError,
        r"void must be \[B, H, ceil\(W/32\)\] int32, got \[2, 33, 2\] int64",
    ),
    "void of no batch": (
        lambda i: [*i, *WEIGHTS, random_void(2, 33, 41)[0]],
        ValueError,
        r"void must be .* with B = 2, H = 33, ceil\(W/32\) = 2, got \[33, 2\]",
    ),
    "counts elsewhere": (
        replaced(6, lambda t: t.to("meta")),
        ValueError,
        r"n_targets must be on \S+, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=f"matching_cost: .*{message}"):
        matching_cost(*change(matching_cost_inputs()))
