"""window_attn: Swin's attention in windows of a padded, rolled map."""

import os

import pytest
import torch

from segkern.ops import window_attn
from segkern.ops.window_attn import window_attn_reference
from support.comparison import DTYPES, compare
from support.inputs import window_attn_inputs

CASES = {
    "whole windows": {"h": 8},
    "padded": {},
    "padded, shifted": {"shift": 2},
    "whole windows, shifted": {"h": 8, "shift": 3},
    "swin": {"B": 1, "h": 16, "w": 20, "window": 7, "shift": 3, "D": 32},
    "wide windows": {"B": 1, "h": 17, "w": 12, "H": 2, "window": 12, "shift": 6, "D": 32},
    "map below a window": {"h": 2, "w": 3, "window": 7, "shift": 3},
    "one token": {"B": 8, "h": 1, "w": 1, "window": 3, "shift": 2},
    "one token a window": {"B": 1, "h": 3, "w": 5, "window": 1},
    "two tokens a window and axis": {"h": 8, "window": 2, "shift": 1},
    "odd channels": {"D": 7, "shift": 2},
    "one channel, one head": {"D": 1, "H": 1, "shift": 2},
    "wide heads": {"D": 72, "H": 1, "window": 3, "shift": 1},
    "many heads": {"B": 1, "H": 10, "h": 6, "window": 3, "shift": 1},
    "many windows": {"B": 1, "h": 30, "w": 41, "H": 1, "D": 8, "window": 3, "shift": 1},
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# the interpreter takes seconds for each: all in one precision, some in the others
SOME = ("padded, shifted", "one token", "odd channels")
PAIRS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if not INTERPRETED or dtype == torch.float32 or case in SOME
]


def check(inputs):
    # the GPU's kernel multiplies with what it has in the dtype of qkv: rows and weights
    triton = inputs[0].is_cuda or INTERPRETED
    stored = inputs[0].dtype if triton else None
    compare(window_attn, window_attn_reference, inputs, [0, 1, 2], stored)


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=str)
def test_forward_and_gradients(case, dtype):
    inputs = window_attn_inputs(**CASES[case], dtype=dtype)
    check(inputs)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale):
    inputs = [*window_attn_inputs(shift=2), scale]
    check(inputs)


def by_definition(qkv, qkv_bias, bias, window, shift):
    """One image, token by token: who shares a window, and which of those are neighbours."""
    h, w, _, H, D = qkv.shape
    y, x = -(-h // window) * window, -(-w // window) * window
    out = qkv.new_zeros(h, w, H, D)
    for at in range(h):
        for to in range(w):
            rolled = (at - shift) % y, (to - shift) % x
            first = rolled[0] // window * window, rolled[1] // window * window
            keys, added = [], []
            for i in range(window):
                for j in range(window):
                    place = first[0] + i + shift, first[1] + j + shift
                    wrapped = place[0] >= y, place[1] >= x
                    row, column = place[0] % y, place[1] % x
                    keys.append(qkv[row, column] if row < h and column < w else 0 * qkv_bias)
                    same = wrapped == (rolled[0] + shift >= y, rolled[1] + shift >= x)
                    added.append(0.0 if same else -100.0)
            _, k, v = (torch.stack(keys) + qkv_bias).unbind(1)  # [S, H, D]
            own = (rolled[0] - first[0]) * window + rolled[1] - first[1]
            scores = torch.einsum("hd,shd->hs", qkv[at, to, 0] + qkv_bias[0], k) * D**-0.5
            weights = (scores + bias[:, own] + torch.tensor(added)).softmax(-1)
            out[at, to] = torch.einsum("hs,shd->hd", weights, v)
    return out.flatten(2)


def test_the_reference_rolls_only_what_is_shifted(monkeypatch):
    inputs = window_attn_inputs()
    want = window_attn_reference(*inputs)
    monkeypatch.setattr(torch.Tensor, "roll", None)
    assert torch.equal(window_attn_reference(*inputs), want)


@pytest.mark.cpu_only
@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("size", [(6, 9), (5, 7), (2, 4)], ids=str)
def test_definition(size, shift):
    qkv, qkv_bias, bias, _, _ = window_attn_inputs(
        B=1, h=size[0], w=size[1], H=2, D=4, window=3, dtype=torch.float64
    )
    want = by_definition(qkv[0], qkv_bias, bias, 3, shift)
    for impl in ("kernel", "reference"):
        out = window_attn(qkv, qkv_bias, bias, 3, shift, impl=impl)
        torch.testing.assert_close(out[0], want)


@pytest.mark.parametrize("shift", [0, 1])
def test_gradcheck(shift):
    *leaves, window, _ = window_attn_inputs(B=1, h=3, w=2, H=1, D=2, window=2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *t: window_attn(*t, window, shift), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    qkv, qkv_bias, bias, window, shift = window_attn_inputs(shift=1, dtype=dtype)
    if dtype != torch.float64:
        qkv_bias, bias = qkv_bias.float(), bias.float()
    inputs = qkv, qkv_bias, bias, window, shift, 0.25
    torch.library.opcheck(torch.ops.segkern.window_attn, inputs)
    out = torch.ops.segkern.window_attn(*inputs)
    torch.library.opcheck(torch.ops.segkern.window_attn_backward, (out, *inputs))


def test_compile():
    *leaves, window, _ = window_attn_inputs()
    leaves = [t.requires_grad_() for t in leaves]
    compiled = torch.compile(window_attn, fullgraph=True, backend="aot_eager")
    out, want = compiled(*leaves, window, 1), window_attn(*leaves, window, 1)
    torch.testing.assert_close(out, want)
    for actual, grad in zip(
        torch.autograd.grad(out.sin().sum(), leaves), torch.autograd.grad(want.sin().sum(), leaves)
    ):
        torch.testing.assert_close(actual, grad)


BAD = {
    "qkv 4-d": (
        lambda x, p, b: (x.flatten(3), p, b, 4),
        ValueError,
        r"qkv must be \[B, h, w, 3, H, D\] float, got \[2, 9, 12, 144\] float32",
    ),
    "qkv int64": (lambda x, p, b: (x.long(), p, b, 4), TypeError, "qkv must be .* int64"),
    "qkv_bias of a head": (
        lambda x, p, b: (x, p[:, 0], b, 4),
        ValueError,
        r"qkv_bias must be \[3, H, D\] float with H = 3, D = 16, got \[3, 16\]",
    ),
    "qkv_bias int32": (lambda x, p, b: (x, p.int(), b, 4), TypeError, "qkv_bias must be .* int32"),
    "bias of another window": (
        lambda x, p, b: (x, p, b, 3),
        ValueError,
        r"bias must be \[H, S, S\] float with H = 3, S = 9, got \[3, 16, 16\]",
    ),
    "bias of other heads": (lambda x, p, b: (x, p, b[1:], 4), ValueError, "bias must be .*H = 3"),
    "no window": (lambda x, p, b: (x, p, b, 0), ValueError, "window must be at least 1, got 0"),
    "shift of a window": (
        lambda x, p, b: (x, p, b, 4, 4),
        ValueError,
        r"shift must be in \[0, 4\), got 4",
    ),
    "shift negative": (lambda x, p, b: (x, p, b, 4, -1), ValueError, "shift must be in .* got -1"),
    "other device": (
        lambda x, p, b: (x, p, b.to("meta"), 4),
        ValueError,
        r"bias must be on \S+, got meta",
    ),
    "impl": (
        lambda x, p, b: (x, p, b, 4, 0, None, "fast"),
        ValueError,
        "impl must be 'kernel' or 'reference', got 'fast'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        window_attn(*change(*window_attn_inputs()[:3]))


@pytest.mark.parametrize(
    "sizes",
    [{"B": 0}, {"h": 0}, {"w": 0}, {"H": 0}],
    ids=["no image", "no row", "no column", "no head"],
)
def test_empty(sizes):
    *leaves, window, _ = window_attn_inputs(**sizes)
    leaves = [t.requires_grad_() for t in leaves]
    out = window_attn(*leaves, window, 1)
    assert out.shape == (*leaves[0].shape[:3], leaves[1].shape[1] * 16)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_non_contiguous():
    qkv, qkv_bias, bias, window, _ = window_attn_inputs()
    want = window_attn(qkv, qkv_bias, bias, window, 1)
    turned = [t.mT.contiguous().mT for t in (qkv.transpose(1, 2), qkv_bias, bias)]
    turned[0] = turned[0].transpose(1, 2)
    leaves = [t.requires_grad_() for t in turned]
    out = window_attn(*leaves, window, 1)
    assert torch.equal(out, want)
    weight = torch.randn(out.shape)
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    dense = [t.detach().clone(memory_format=torch.contiguous_format) for t in leaves]
    dense = [t.requires_grad_() for t in dense]
    out = window_attn(*dense, window, 1)
    for actual, grad in zip(grads, torch.autograd.grad((out * weight).sum(), dense)):
        assert torch.equal(actual, grad)


def test_a_padded_token_asks_nothing():
    """The bias of q has the gradients of the tokens alone, those of k and v the padding's too."""
    qkv, qkv_bias, *rest = window_attn_inputs(shift=2, dtype=torch.float64)
    inputs = qkv.requires_grad_(), qkv_bias.requires_grad_()
    tokens, bias = torch.autograd.grad(window_attn(*inputs, *rest).sin().sum(), inputs)
    tokens = tokens.sum((0, 1, 2))
    torch.testing.assert_close(bias[0], tokens[0])
    for padded in (bias - tokens)[1:]:
        assert (padded.abs() > 1e-3).any()


def test_the_ends_of_the_map_do_not_meet():
    qkv, qkv_bias, bias, window, _ = window_attn_inputs(h=8, w=8)
    want = window_attn(qkv, qkv_bias, bias, window, 2)
    qkv[:, :, :2] += 1
    out = window_attn(qkv, qkv_bias, bias, window, 2)
    assert torch.equal(out[:, :, 2:], want[:, :, 2:])


@pytest.mark.parametrize("shift", [300.0, -300.0], ids=["high", "low"])
def test_large_scores(shift):
    qkv, qkv_bias, bias, window, _ = window_attn_inputs()
    inputs = [10 * qkv, qkv_bias, bias + shift, window, 1]
    check(inputs)


def test_nan_stays_in_its_row():
    qkv, qkv_bias, bias, window, shift = window_attn_inputs(shift=1)
    clean = window_attn(qkv, qkv_bias, bias, window, shift)
    qkv[1, 3, 5, 0] = float("nan")
    out = window_attn(qkv, qkv_bias, bias, window, shift)
    assert out[1, 3, 5].isnan().all()
    keep = torch.ones(2, 9, 12, dtype=torch.bool)
    keep[1, 3, 5] = False
    assert torch.equal(out[keep], clean[keep])


@pytest.mark.cpu_only
def test_autocast_keeps_the_bias():
    """The projection comes in bfloat16, its bias and the table's in float32, as in a model."""
    layer = torch.nn.Linear(48, 144)
    x = torch.randn(2, 9, 12, 48)
    bias = torch.randn(3, 16, 16)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        qkv = torch.nn.functional.linear(x, layer.weight)
        qkv, qkv_bias = (t.unflatten(-1, (3, 3, 16)) for t in (qkv, layer.bias))
        out = window_attn(qkv, qkv_bias, bias, 4, 2)
    assert qkv.dtype == out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), [*layer.parameters()])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    want = window_attn(qkv.float(), qkv_bias, bias, 4, 2)
    torch.testing.assert_close(out.float(), want, rtol=0.01, atol=0.01)


@pytest.mark.cpu_only
def test_same_bits_on_any_number_of_threads():
    *leaves, window, _ = window_attn_inputs(B=3, h=40, w=50, H=6)
    leaves = [t.requires_grad_() for t in leaves]
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out = window_attn(*leaves, window, 1)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
