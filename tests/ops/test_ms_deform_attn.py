"""ms_deform_attn and its classic signature."""

import re
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F

from segkern.ops import _library, ms_deform_attn, multi_scale_deformable_attention
from segkern.ops.ms_deform_attn import ms_deform_attn_reference
from support.comparison import DTYPES, compare, promote
from support.inputs import ms_deform_attn_inputs

CASES = {
    "small": {},
    "one level": {"shapes": ((6, 5),)},
    "one point": {"P": 1},
    "one sample": {"shapes": ((6, 5),), "P": 1},
    "maps of one pixel": {"shapes": ((1, 1), (1, 6), (6, 1))},
    "reference of one image": {"one_image": True},
    "reference of one level": {"one_level": True},
    "one query": {"Q": 1},
    "odd channels": {"D": 5},
    "33 channels": {"D": 33, "H": 2},
    "16 channels": {"D": 16},
    "32 channels": {"D": 32, "H": 8, "P": 4},
    "64 channels": {"D": 64, "H": 1},
    "24 channels": {"D": 24, "H": 2},
    "72 channels": {"D": 72, "H": 1},
    "five levels": {"shapes": ((9, 8), (7, 6), (5, 5), (3, 2), (1, 2)), "P": 3},
    "ten levels": {"shapes": tuple((n, 11 - n) for n in range(1, 11)), "H": 1},
    "many points": {"P": 13, "D": 32},
    "wide offsets": {"spread": 30.0},
    "encoder": {"shapes": ((4, 6), (8, 12)), "Q": None, "P": 4, "H": 2, "D": 32, "spread": 0.8},
    "encoder, odd sizes": {"shapes": ((9, 19), (17, 3)), "Q": None, "P": 3, "D": 16},
    "many queries of few pixels": {"Q": 300, "P": 4, "D": 32},
    "many queries of one pixel": {"shapes": ((1, 1), (2, 1)), "Q": 150, "P": 4, "D": 16},
    "many queries, odd channels": {"Q": 300, "P": 4, "D": 7},
}
MARGIN = 0.01  # gradients jump where a sample crosses a pixel centre


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient(case, dtype):
    inputs = ms_deform_attn_inputs(**CASES[case], margin=MARGIN, dtype=dtype)
    compare(ms_deform_attn, ms_deform_attn_reference, [*inputs, False], [0, 2, 3, 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_normalized(case, dtype):
    inputs = ms_deform_attn_inputs(**CASES[case], margin=MARGIN, dtype=dtype)
    compare(ms_deform_attn, ms_deform_attn_reference, [*inputs, True], [0, 2, 3, 4])


def test_reference_is_the_grid_sample_formula():
    value, shapes, reference, offsets, logits = ms_deform_attn_inputs(dtype=torch.float64)
    sides = torch.tensor([(w, h) for h, w in shapes])[:, None]
    locations = reference[:, :, None, :, None] + offsets / sides
    weights = logits.flatten(3).softmax(3).view_as(logits)
    want = classic(value, shapes, locations, weights)
    got = ms_deform_attn_reference(value, shapes, reference, offsets, logits)
    torch.testing.assert_close(got, want)


def classic(value, shapes, locations, weights):
    """The well-known formula, one grid_sample a level."""
    B, _, H, D = value.shape
    levels = value.split([h * w for h, w in shapes], 1)
    out = 0
    for level, (h, w) in enumerate(shapes):
        maps = levels[level].permute(0, 2, 3, 1).reshape(B * H, D, h, w)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # [B*H, Q, P, 2]
        samples = F.grid_sample(maps, grid, align_corners=False).view(B, H, D, -1, grid.shape[2])
        out = out + torch.einsum("bhdqp,bqhp->bqhd", samples, weights[:, :, :, level])
    return out.flatten(2)


@pytest.mark.parametrize("kind", ["tuples", "lists", "tensor"])
def test_classic_signature(kind):
    value, shapes, *_ = ms_deform_attn_inputs(dtype=torch.float64)
    locations = torch.rand(2, 11, 3, 2, 2, 2, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(2, 11, 3, 2, 2, dtype=torch.float64)
    sizes = {"tuples": shapes, "lists": [list(s) for s in shapes], "tensor": torch.tensor(shapes)}
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    got = multi_scale_deformable_attention(value, sizes[kind], locations, weights)
    want = classic(value, shapes, locations, weights)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalized", [False, True], ids=["softmax", "normalized"])
@pytest.mark.parametrize("D", [2, 16])
def test_gradcheck(D, normalized):
    inputs = ms_deform_attn_inputs(
        B=2, H=2, D=D, Q=3, margin=0.05, one_image=True, one_level=True, dtype=torch.float64
    )
    value, shapes, *rest = inputs
    leaves = [t.requires_grad_() for t in (value, *rest)]
    with torch.device("cpu"):  # fast mode draws from a generator of the CPU
        assert torch.autograd.gradcheck(
            lambda v, *r: ms_deform_attn(v, shapes, *r, normalized), leaves, fast_mode=True
        )


def test_float64_is_exact():
    inputs = ms_deform_attn_inputs(D=32, dtype=torch.float64)
    torch.testing.assert_close(
        ms_deform_attn(*inputs), ms_deform_attn_reference(*inputs), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_value", [torch.bfloat16, torch.float64], ids=str)
def test_types_may_differ(of_value, dtype):
    value, shapes, reference, offsets, logits = ms_deform_attn_inputs(D=16)
    mixed = [value.to(of_value), shapes, reference.double(), offsets.half(), logits.to(dtype)]
    leaves = [t.requires_grad_() for t in mixed if isinstance(t, torch.Tensor)]
    out = ms_deform_attn(*mixed)
    assert out.dtype == of_value
    promoted = promote(mixed, torch.float64)
    wide = [t.requires_grad_() for t in promoted if isinstance(t, torch.Tensor)]
    want = ms_deform_attn(*promoted)
    torch.testing.assert_close(out.double(), want, rtol=0.01, atol=0.01)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.dtype for g in grads] == [t.dtype for t in leaves]
    for got, exact in zip(grads, torch.autograd.grad(want.sum(), wide)):
        error = (got.double() - exact).abs().max() / exact.abs().max()
        assert error < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    value, shapes, *rest = ms_deform_attn_inputs(D=16, dtype=dtype)
    flat = [n for size in shapes for n in size]
    args = (value, flat, *rest, False)
    torch.library.opcheck(torch.ops.segkern.ms_deform_attn, args)
    grad = torch.randn(2, 11, 48).to(dtype)
    torch.library.opcheck(torch.ops.segkern.ms_deform_attn_backward, (grad, *args, False))


def test_compile():
    inputs = ms_deform_attn_inputs()
    leaves = [t.requires_grad_() for t in inputs if isinstance(t, torch.Tensor)]
    compiled = torch.compile(ms_deform_attn, fullgraph=True, backend="aot_eager")
    got, want = compiled(*inputs), ms_deform_attn(*inputs)
    torch.testing.assert_close(got, want)
    grads = zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves))
    for a, b in grads:
        torch.testing.assert_close(a, b)


def change(place, function):
    return lambda inputs: inputs[:place] + [function(inputs[place])] + inputs[place + 1 :]


BAD = {
    "value 3-d": (change(0, lambda v: v[0]), ValueError, r"value must be \[B, S, H, D\]"),
    "value int": (
        change(0, lambda v: v.long()),
        TypeError,
        "value must be .* float, got .* int64",
    ),
    "no tensor": (change(0, lambda v: [1.0]), TypeError, "value must be .* got list"),
    "one number": (
        change(3, lambda o: o[..., :1]),
        ValueError,
        r"offsets must be \[B, Q, H, L, P, 2\] float with B = 2, H = 3, got \[2, 11, 3, 2, 2, 1\]",
    ),
    "other heads": (change(4, lambda a: a[:, :, :2]), ValueError, "logits must be .* H = 3"),
    "other points": (change(4, lambda a: a[..., :1]), ValueError, "logits must be .* P = 2"),
    "other queries": (change(2, lambda r: r[:, :5]), ValueError, "reference must be .* Q = 11"),
    "other device": (
        change(3, lambda o: o.to("meta")),
        ValueError,
        r"offsets must be on \S+, got",
    ),
    "shapes too few": (change(1, lambda s: s[:1]), ValueError, "shapes must be L = 2 pairs"),
    "shapes too large": (
        change(1, lambda s: ((5, 7), (3, 5))),
        ValueError,
        "areas sum to S = 47, got .* with the sum 50",
    ),
    "shapes negative": (change(1, lambda s: ((5, 7), (-3, -4))), TypeError, "of positive ints"),
    "shapes far away": (
        change(1, lambda s: torch.tensor(s, device="meta")),
        ValueError,
        "shapes must be on the CPU, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ms_deform_attn(*make(ms_deform_attn_inputs()))


def test_bad_classic_shapes():
    value, _, _, locations, weights = ms_deform_attn_inputs()
    with pytest.raises(ValueError, match=r"value_spatial_shapes must be \[L, 2\] int, got \[3\]"):
        multi_scale_deformable_attention(value, torch.tensor([1, 2, 3]), locations, weights)


@pytest.mark.parametrize(
    "sizes",
    [{"B": 0}, {"Q": 0}, {"H": 0}, {"D": 0}, {"P": 0}, {"shapes": ()}],
    ids=["no image", "no query", "no head", "no channel", "no point", "no level"],
)
def test_empty(sizes):
    inputs = ms_deform_attn_inputs(**sizes)
    leaves = [t.requires_grad_() for t in inputs if isinstance(t, torch.Tensor)]
    out = ms_deform_attn(*inputs)
    assert out.shape == ms_deform_attn_reference(*inputs).shape
    assert (out == 0).all()
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()


def test_non_contiguous():
    inputs = ms_deform_attn_inputs(D=16)
    strided = [
        t.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(t, torch.Tensor) else t
        for t in inputs
    ]
    assert not strided[0].is_contiguous()
    assert torch.equal(ms_deform_attn(*strided), ms_deform_attn(*inputs))
    value = inputs[0].requires_grad_()
    out = ms_deform_attn(*inputs)
    (grad,) = torch.autograd.grad(out, value, torch.ones(()).expand_as(out))
    torch.testing.assert_close(grad, torch.autograd.grad(ms_deform_attn(*inputs).sum(), value)[0])


@pytest.mark.parametrize("D", [16, 7])
def test_unaligned(D):
    inputs = ms_deform_attn_inputs(D=D)
    shifted = [
        torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)
        if isinstance(t, torch.Tensor)
        else t
        for t in inputs
    ]
    assert shifted[0].is_contiguous()
    assert torch.equal(ms_deform_attn(*shifted), ms_deform_attn(*inputs))


@pytest.mark.parametrize("Q", [40, None], ids=["decoder", "encoder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_deterministic_gradients(dtype, Q):
    shapes = ((1, 1), (6, 9))
    value, _, *rest = ms_deform_attn_inputs(shapes=shapes, Q=Q, D=16, P=4, dtype=dtype)
    grad = torch.randn(2, rest[1].shape[1], 48, dtype=dtype)
    args = (grad, value, [n for size in shapes for n in size], *rest, False)
    backward = torch.ops.segkern.ms_deform_attn_backward
    once, again, other = backward(*args, True), backward(*args, True), backward(*args, False)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    for a, b in zip(once, other):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", [2, 3], ids=["reference", "offsets"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
@pytest.mark.parametrize("D", [5, 32])
def test_samples_that_are_nowhere_count_as_zero(D, number, which):
    inputs = ms_deform_attn_inputs(D=D)
    inputs[which][:, 0] = number
    if which == 3:
        inputs[3][:, 1, :, 0, 0, 0] = number  # one of the samples of query 1
    leaves = [t.requires_grad_() for t in inputs if isinstance(t, torch.Tensor)]
    out = ms_deform_attn(*inputs)
    assert (out[:, 0] == 0).all()
    assert out.isfinite().all()
    torch.testing.assert_close(out, ms_deform_attn_reference(*inputs))
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("D", [5, 32])
def test_nan_in_value_stays_where_it_is(D):
    value, shapes, reference, offsets, logits = ms_deform_attn_inputs(D=D, Q=200, spread=4)
    value[:, 0] = float("nan")  # the corner of the first level
    value[:, 35] = float("nan")  # and of the second
    out = ms_deform_attn(value, shapes, reference, offsets, logits).isfinite()
    want = ms_deform_attn_reference(value, shapes, reference, offsets, logits).isfinite()
    assert torch.equal(out, want)
    assert out.any()
    assert not out.all()


def test_nan_logits_stay_in_their_head():
    inputs = ms_deform_attn_inputs(D=16)
    inputs[4][0, 3, 1, 0, 0] = float("nan")
    out = ms_deform_attn(*inputs).isfinite().unflatten(2, (3, 16)).all(3)
    assert (~out).nonzero().tolist() == [[0, 3, 1]]


@pytest.mark.cpu_only
@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_nothing(threads):
    inputs = ms_deform_attn_inputs(D=32, H=5, Q=400)
    leaves = [t.requires_grad_() for t in inputs if isinstance(t, torch.Tensor)]

    def run():
        out = ms_deform_attn(*inputs)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    two = run()
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(run(), two))


@pytest.mark.cpu_only
@pytest.mark.skipif(
    _library.PURE
    or _library.simd_level() != "x86-64-v4 (AVX-512)"
    or shutil.which("objdump") is None,
    reason="needs the kernels, AVX-512 and objdump",
)
@pytest.mark.parametrize("loop", ["gather<float, 32>", "scatter<float, 32>", "locate<float>"])
def test_hot_loops_use_wide_registers(loop):
    library = _library.PACKAGE / "_C_cpu.abi3.so"
    run = ["objdump", "-d", "-C", "--no-show-raw-insn", library]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    if "__asan" in text:
        pytest.skip("built with sanitizers, without clones")
    name = re.escape(f"(anonymous namespace)::{loop}")
    blocks = re.findall(
        rf"^\w+ <[^\n]*{name}[^\n]*x86_64_v4[^\n]*>:\n(.*?)\n\n", text, re.M | re.S
    )
    assert any("%zmm" in block for block in blocks)
