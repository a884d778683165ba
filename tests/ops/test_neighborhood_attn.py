"""neighborhood_attn: each pixel attends to the K x K pixels around it, dilated."""

import os

import pytest
import torch

from segkern.ops import neighborhood_attn
from segkern.ops.neighborhood_attn import neighborhood_attn_reference
from support.comparison import DTYPES, compare
from support.inputs import neighborhood_attn_inputs

CASES = {
    "one row of lines": {},
    "dilated": {"dilation": 3},
    "kernel fills the map": {"h": 7, "w": 7, "kernel": 7, "B": 1},
    "dilated kernel fills the map": {"B": 1, "h": 6, "w": 9, "kernel": 3, "dilation": (2, 3)},
    "groups of several sizes": {"h": 11, "w": 23, "dilation": (3, 5)},
    "dinat": {"B": 1, "h": 16, "w": 21, "H": 2, "D": 32, "kernel": 7, "dilation": 2},
    "oneformer": {"B": 1, "h": 13, "w": 25, "H": 1, "D": 32, "kernel": 11},
    "groups wider than a line": {"B": 1, "h": 5, "w": 61, "H": 1, "dilation": (1, 20)},
    "long rows": {"B": 1, "h": 3, "w": 70, "H": 2, "kernel": (3, 5)},
    "long columns": {"B": 1, "h": 61, "w": 5, "H": 1, "D": 8, "kernel": (5, 3)},
    "one key": {"B": 1, "kernel": 1, "dilation": 2},
    "a row of keys": {"kernel": (1, 5), "h": 2},
    "many keys": {"B": 1, "h": 1, "w": 30, "H": 1, "kernel": (1, 25)},
    "odd channels": {"D": 7, "dilation": 2},
    "one channel, one head": {"D": 1, "H": 1},
    "wide heads": {"B": 1, "D": 72, "H": 1, "h": 7, "w": 9},
    "many heads": {"B": 1, "H": 10, "h": 5, "w": 6, "D": 8},
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# the interpreter takes seconds for each: all in one precision, some in the others
SOME = ("dilated", "kernel fills the map", "odd channels")
PAIRS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if not INTERPRETED or dtype == torch.float32 or case in SOME
]


def check(inputs, grads=(0, 1, 2, 3)):
    # the GPU's kernel multiplies with what it has in the dtype of q: rows and weights
    triton = inputs[0].is_cuda or INTERPRETED
    stored = inputs[0].dtype if triton else None
    compare(neighborhood_attn, neighborhood_attn_reference, inputs, grads, stored)


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=str)
def test_forward_and_gradients(case, dtype):
    check(neighborhood_attn_inputs(**CASES[case], dtype=dtype))


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale):
    check([*neighborhood_attn_inputs(dilation=2), scale])


def test_without_a_bias():
    q, k, v, _, *numbers = neighborhood_attn_inputs(dilation=2)
    check([q, k, v, None, *numbers], (0, 1, 2))


def by_definition(q, k, v, bias, kernel, dilation):
    """One image, pixel by pixel and key by key, as the formula says; [h, w, H, D]."""
    h, w, H, D = q.shape
    out = torch.empty_like(q)

    def keys(i, length, kernel, dilation):
        group, place = i % dilation, i // dilation
        places = len(range(group, length, dilation))
        start = min(max(place - kernel // 2, 0), places - kernel)
        for j in range(kernel):
            yield (start + j) * dilation + group, start + j - place + kernel - 1

    for y in range(h):
        for x in range(w):
            for head in range(H):
                scores, values = [], []
                for row, of_row in keys(y, h, kernel[0], dilation[0]):
                    for column, of_column in keys(x, w, kernel[1], dilation[1]):
                        score = q[y, x, head] @ k[row, column, head] * D**-0.5
                        scores.append(score + bias[head, of_row, of_column])
                        values.append(v[row, column, head])
                out[y, x, head] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


DEFINED = {  # maps that are not square, on which axes and heads cannot change places unseen
    "a row of more pixels": {"h": 4, "w": 9, "kernel": 3, "dilation": 1},
    "a column of more pixels": {"h": 9, "w": 4, "kernel": 3, "dilation": 1},
    "dilated": {"h": 7, "w": 10, "kernel": 3, "dilation": 2},
    "axes of their own": {"h": 8, "w": 5, "kernel": (3, 5), "dilation": (2, 1)},
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", DEFINED)
def test_definition(case):
    sizes = DEFINED[case]
    q, k, v, bias, kernel, dilation = neighborhood_attn_inputs(
        B=1, H=3, D=4, dtype=torch.float64, **sizes
    )
    pairs = [n if isinstance(n, tuple) else (n, n) for n in (kernel, dilation)]
    want = by_definition(q[0], k[0], v[0], bias, *pairs)
    for impl in ("kernel", "reference"):
        out = neighborhood_attn(q, k, v, bias, kernel, dilation, impl=impl)
        torch.testing.assert_close(out[0], want)


@pytest.mark.parametrize("dilation", [1, (1, 2)], ids=str)
def test_gradcheck(dilation):
    *leaves, kernel, dilation = neighborhood_attn_inputs(
        B=1, h=3, w=6, H=1, D=2, dilation=dilation, dtype=torch.float64
    )
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *t: neighborhood_attn(*t, kernel, dilation), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    *tensors, _, _ = neighborhood_attn_inputs(dtype=dtype)
    if dtype != torch.float64:
        tensors[3] = tensors[3].float()
    inputs = *tensors, [3, 3], [2, 1], 0.25
    torch.library.opcheck(torch.ops.segkern.neighborhood_attn, inputs)
    out = torch.ops.segkern.neighborhood_attn(*inputs)
    torch.library.opcheck(torch.ops.segkern.neighborhood_attn_backward, (out, *inputs))


def test_compile():
    *leaves, kernel, _ = neighborhood_attn_inputs()
    leaves = [t.requires_grad_() for t in leaves]
    compiled = torch.compile(neighborhood_attn, fullgraph=True, backend="aot_eager")
    out, want = compiled(*leaves, kernel, 2), neighborhood_attn(*leaves, kernel, 2)
    torch.testing.assert_close(out, want)
    for actual, grad in zip(
        torch.autograd.grad(out.sin().sum(), leaves), torch.autograd.grad(want.sin().sum(), leaves)
    ):
        torch.testing.assert_close(actual, grad)


BAD = {
    "q 4-d": (
        lambda q, k, v, b: (q.flatten(3), k, v, b, 3),
        ValueError,
        r"q must be \[B, h, w, H, D\] float, got \[2, 9, 12, 48\] float32",
    ),
    "q int64": (lambda q, k, v, b: (q.long(), k, v, b, 3), TypeError, "q must be .* int64"),
    "k of another size": (
        lambda q, k, v, b: (q, k[:, 1:], v, b, 3),
        ValueError,
        r"k must be \[B, h, w, H, D\] float with B = 2, h = 9, .*got \[2, 8, 12, 3, 16\]",
    ),
    "v of another dtype": (
        lambda q, k, v, b: (q, k, v.double(), b, 3),
        TypeError,
        "v must be torch.float32 as q, got torch.float64",
    ),
    "bias of another kernel": (
        lambda q, k, v, b: (q, k, v, b, 5),
        ValueError,
        r"bias must be \[H, Y, X\] float with H = 3, Y = 9, X = 9, got \[3, 5, 5\]",
    ),
    "bias of other heads": (
        lambda q, k, v, b: (q, k, v, b[1:], 3),
        ValueError,
        r"bias must be .*H = 3.* got \[2, 5, 5\]",
    ),
    "bias int32": (lambda q, k, v, b: (q, k, v, b.int(), 3), TypeError, "bias must be .* int32"),
    "no kernel": (lambda q, k, v, b: (q, k, v, b, 0), ValueError, "kernel must be >= 1, got 0"),
    "even kernel": (
        lambda q, k, v, b: (q, k, v, b, (3, 4)),
        ValueError,
        r"kernel must be odd, got \(3, 4\)",
    ),
    "kernel of three axes": (
        lambda q, k, v, b: (q, k, v, b, (3, 3, 3)),
        ValueError,
        r"kernel must be a number or a pair .* got \(3, 3, 3\)",
    ),
    "kernel no integer": (
        lambda q, k, v, b: (q, k, v, b, 3.0),
        TypeError,
        "kernel must be an integer, got 3.0",
    ),
    "no dilation": (
        lambda q, k, v, b: (q, k, v, b, 3, (1, 0)),
        ValueError,
        "dilation must be >= 1, got 0",
    ),
    "rows too few": (
        lambda q, k, v, b: (q, k, v, b, 3, (4, 1)),
        ValueError,
        r"kernel \(3, 3\) x dilation \(4, 1\) must be at most the map's sides, got 9 x 12",
    ),
    "columns too few": (
        lambda q, k, v, b: (q, k, v, b, 3, (3, 5)),
        ValueError,
        "must be at most the map's sides, got 9 x 12: pad what q, k and v are made of",
    ),
    "other device": (
        lambda q, k, v, b: (q, k, v, b.to("meta"), 3),
        ValueError,
        r"bias must be on \S+, got meta",
    ),
    "impl": (
        lambda q, k, v, b: (q, k, v, b, 3, 1, None, "fast"),
        ValueError,
        "impl must be 'kernel' or 'reference', got 'fast'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        neighborhood_attn(*change(*neighborhood_attn_inputs()[:4]))


@pytest.mark.parametrize("sizes", [{"B": 0}, {"H": 0}], ids=["no image", "no head"])
def test_empty(sizes):
    *leaves, kernel, dilation = neighborhood_attn_inputs(**sizes)
    leaves = [t.requires_grad_() for t in leaves]
    out = neighborhood_attn(*leaves, kernel, dilation)
    assert out.shape == leaves[0].shape
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_any_strides():
    """Views of one projection, dense tensors and turned ones give the same bits."""
    *views, kernel, _ = neighborhood_attn_inputs()
    weight = torch.randn(views[0].shape)

    def run(tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = neighborhood_attn(*leaves, kernel, 2)
        return [out, *torch.autograd.grad((out * weight).sum(), leaves)]

    want = run(views)
    dense = [t.contiguous() for t in views]
    turned = [t.mT.contiguous().mT for t in views]
    images_last = [t.movedim(0, 2).contiguous().movedim(2, 0) for t in views[:3]] + [views[3]]
    mixed = [views[0], dense[1], turned[2], turned[3]]
    for other in (dense, turned, images_last, mixed):
        assert all(torch.equal(a, b) for a, b in zip(run(other), want))


def test_groups_do_not_meet():
    """Of a dilated kernel a pixel of another group is no key, and a window at the border is moved
    inwards: the border's pixel reads the K next ones of its group."""
    q, k, v, bias, *_ = neighborhood_attn_inputs(h=12, w=12)
    want = neighborhood_attn(q, k, v, bias, 3, 2)
    changed = v.clone()
    changed[:, :, 4] += 1
    out = neighborhood_attn(q, k, changed, bias, 3, 2)
    moved = (out - want).abs().amax((0, 1, 3, 4)) > 0
    assert moved.nonzero().flatten().tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("shift", [300.0, -300.0], ids=["high", "low"])
def test_large_scores(shift):
    q, k, v, bias, *numbers = neighborhood_attn_inputs()
    check([10 * q, k, v, bias + shift, *numbers])


def test_nan_stays_with_its_query():
    q, k, v, bias, *numbers = neighborhood_attn_inputs()
    clean = neighborhood_attn(q, k, v, bias, *numbers)
    q[1, 3, 5] = float("nan")
    out = neighborhood_attn(q, k, v, bias, *numbers)
    assert out[1, 3, 5].isnan().all()
    keep = torch.ones(2, 9, 12, dtype=torch.bool)
    keep[1, 3, 5] = False
    assert torch.equal(out[keep], clean[keep])


@pytest.mark.cpu_only
def test_autocast_keeps_the_bias():
    q, k, v, bias, *numbers = neighborhood_attn_inputs()
    half = [t.bfloat16() for t in (q, k, v)]
    bias.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = neighborhood_attn(half[0], k, half[2], bias, *numbers)
    assert out.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().square().sum(), [bias])
    assert grad.dtype == torch.float32
    assert grad.abs().max() > 0
    exact = neighborhood_attn(*(t.float() for t in half), bias, *numbers)
    torch.testing.assert_close(out.float(), exact, rtol=0.01, atol=0.01)


@pytest.mark.cpu_only
def test_same_bits_on_any_number_of_threads():
    *leaves, _, _ = neighborhood_attn_inputs(B=1, h=60, w=40, H=2, kernel=5)
    leaves = [t.requires_grad_() for t in leaves]
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out = neighborhood_attn(*leaves, 5, 2)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
