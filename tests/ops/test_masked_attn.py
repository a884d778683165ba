"""masked_attn: attention under a packed mask that all heads share."""

import os

import pytest
import torch

from segkern.ops import masked_attn
from segkern.ops._checks import exact_dtype
from segkern.ops.mask_bits import pack_bits, unpack_bits
from segkern.ops.masked_attn import masked_attn_reference
from support.comparison import DTYPES, compare
from support.inputs import masked_attn_inputs

CASES = {
    "small": {},
    "scattered": {"compact": False},
    "all open": {"density": 1.0},
    "all rows closed": {"density": 0.0},
    "one key open a row": {"density": 1 / 70},
    "one key": {"S": 1, "density": 1.0},
    "whole words": {"S": 64},
    "tail of one": {"S": 33, "density": 0.5},
    "odd channels": {"D": 7},
    "one channel, one head, one query": {"D": 1, "H": 1, "Q": 1},
    "wide heads": {"D": 72, "H": 2, "S": 40},
    "the widest heads": {"D": 200, "H": 1, "S": 40},
    "decoder": {"B": 1, "Q": 100, "H": 8, "D": 32, "S": 300, "density": 0.1},
    "several chunks": {"B": 1, "H": 2, "D": 32, "S": 2500, "density": 0.1},
    "many queries": {"B": 1, "H": 1, "Q": 300, "S": 40, "density": 0.5},
}


class _Gradient(torch.autograd.Function):
    """The reference with its gradient by FlashAttention-2's formulas, in plain PyTorch.

    The same mathematics as autograd's (tested below); but sum_s p dp is formed from the output, as
    no kernel without stored weights can do otherwise, and so it rounds as the kernel does.
    """

    @staticmethod
    def forward(ctx, q, k, v, bits, open, scale):
        ctx.save_for_backward(q, k, v, bits, open)
        ctx.scale = scale
        return masked_attn_reference(q, k, v, bits, open, scale)

    @staticmethod
    def backward(ctx, grad):
        *inputs, bits, open = ctx.saved_tensors
        dtype, exact = inputs[0].dtype, exact_dtype(inputs[0])
        scale = inputs[0].shape[3] ** -0.5 if ctx.scale is None else ctx.scale
        q, k, v = (t.to(exact).transpose(1, 2) for t in inputs)  # [B, H, Q|S, D]
        g = grad.to(exact).unflatten(2, (q.shape[1], q.shape[3])).transpose(1, 2)
        closed = ~unpack_bits(bits, k.shape[2]) & (open > 0).unsqueeze(-1)
        p = (scale * q @ k.mT).masked_fill(closed.unsqueeze(1), -torch.inf).softmax(-1)
        ds = p * (g @ v.mT - (p @ v * g).sum(-1, keepdim=True))
        grads = (scale * ds @ k, scale * ds.mT @ q, p.mT @ g)
        return *(t.transpose(1, 2).to(dtype) for t in grads), None, None, None


def with_gradient(q, k, v, bits, open, scale=None):
    return _Gradient.apply(q, k, v, bits, open, scale)


def check(inputs):
    # the GPU's kernels multiply with weights in the dtype of the values
    triton = inputs[0].is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    stored = inputs[0].dtype if triton else None
    arguments = masked_attn, masked_attn_reference, inputs, [0, 1, 2]
    compare(*arguments, stored, algorithm=with_gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case, dtype):
    inputs = masked_attn_inputs(**CASES[case], dtype=dtype)
    check(inputs)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale):
    check([*masked_attn_inputs(), scale])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_reference(case):
    q, k, v, bits, open = masked_attn_inputs(**CASES[case], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    weight = torch.randn(q.shape[0], q.shape[1], q.shape[2] * q.shape[3], dtype=q.dtype)
    for function in (masked_attn, with_gradient):
        grads, want = (
            torch.autograd.grad((f(q, k, v, bits, open) * weight).sum(), leaves)
            for f in (function, masked_attn_reference)
        )
        for actual, expected in zip(grads, want):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


def test_agrees_with_torch():
    q, k, v, _, _ = masked_attn_inputs(dtype=torch.float64)
    mask = torch.rand(2, 13, 70) < 0.3
    mask[0, 0] = False
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        attn_mask=(mask | ~mask.any(-1, keepdim=True)).unsqueeze(1),
    )
    torch.testing.assert_close(
        masked_attn(q, k, v, *pack_bits(mask)), want.transpose(1, 2).flatten(2)
    )


def test_gradcheck():
    q, k, v, bits, open = masked_attn_inputs(B=1, Q=3, S=35, H=1, D=2, dtype=torch.float64)
    open[0, 0], bits[0, 0] = 0, 0
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: masked_attn(*t, bits, open), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    q, k, v, bits, open = masked_attn_inputs(dtype=dtype)
    torch.library.opcheck(torch.ops.segkern.masked_attn, (q, k, v, bits, open, 0.25))
    out, norm = torch.ops.segkern.masked_attn(q, k, v, bits, open, 0.25)
    torch.library.opcheck(
        torch.ops.segkern.masked_attn_backward,
        (out.to(dtype), q, k, v, bits, open, out, norm, 0.25),
    )


def test_compile():
    q, k, v, bits, open = masked_attn_inputs()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    compiled = torch.compile(masked_attn, fullgraph=True, backend="aot_eager")
    out, want = compiled(q, k, v, bits, open), masked_attn(q, k, v, bits, open)
    assert torch.equal(out, want)
    for actual, grad in zip(
        torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(want.sum(), leaves)
    ):
        assert torch.equal(actual, grad)


BAD = {
    "q 3-d": (lambda q, k, v, b, o: (q[0], k, v, b, o), ValueError, r"q must be \[B, Q, H, D\]"),
    "q int64": (lambda q, k, v, b, o: (q.long(), k, v, b, o), TypeError, "q must be .* int64"),
    "k other heads": (
        lambda q, k, v, b, o: (q, k[:, :, 1:], v, b, o),
        ValueError,
        r"k must be \[B, S, H, D\] float with B = 2, H = 3, D = 16, got \[2, 70, 2, 16\]",
    ),
    "v other keys": (lambda q, k, v, b, o: (q, k, v[:, 1:], b, o), ValueError, "with .*S = 70"),
    "k other dtype": (
        lambda q, k, v, b, o: (q, k.half(), v, b, o),
        TypeError,
        "k must be torch.float32 as q, got torch.float16",
    ),
    "no key": (
        lambda q, k, v, b, o: (q, k[:, :0], v[:, :0], b[:, :, :0], o),
        ValueError,
        "k must have at least one key",
    ),
    "bits too few": (
        lambda q, k, v, b, o: (q, k, v, b[:, :, 1:], o),
        ValueError,
        r"bits must be \[B, Q, ceil\(S/32\)\] int32 with .* = 3, got \[2, 13, 2\] int32",
    ),
    "bits bool": (lambda q, k, v, b, o: (q, k, v, b.bool(), o), TypeError, "bits must be .* bool"),
    "open int64": (lambda q, k, v, b, o: (q, k, v, b, o.long()), TypeError, "open must be .* int"),
    "open 1-d": (lambda q, k, v, b, o: (q, k, v, b, o[0]), ValueError, r"open must be \[B, Q\]"),
    "other device": (
        lambda q, k, v, b, o: (q, k, v, b.to("meta"), o),
        ValueError,
        r"bits must be on \S+, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        masked_attn(*change(*masked_attn_inputs()))


@pytest.mark.parametrize(
    "sizes", [{"B": 0}, {"Q": 0}, {"H": 0}], ids=["no image", "no query", "no head"]
)
def test_empty(sizes):
    q, k, v, bits, open = masked_attn_inputs(**sizes)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = masked_attn(q, k, v, bits, open)
    assert out.shape == (q.shape[0], q.shape[1], q.shape[2] * q.shape[3])
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_a_closed_row_attends_to_every_key():
    q, k, v, bits, open = masked_attn_inputs(B=1, S=70)
    full = pack_bits(torch.ones(1, 13, 70, dtype=torch.bool))
    dense = masked_attn(q, k, v, *full)
    bits[0, 4], open[0, 4] = 0, 0
    out = masked_attn(q, k, v, bits, open)
    assert torch.equal(out[0, 4], dense[0, 4])
    assert not torch.equal(out[0, 5], dense[0, 5])


def test_one_open_key_returns_its_value():
    q, k, v, _, _ = masked_attn_inputs(B=1, Q=70, S=70)
    out = masked_attn(q, k, v, *pack_bits(torch.eye(70, dtype=torch.bool)[None]))
    assert torch.equal(out, v.flatten(2))


def test_non_contiguous():
    q, k, v, bits, open = masked_attn_inputs()
    want = masked_attn(q, k, v, bits, open)
    layers = torch.stack((k, v, k, v), 2)  # [B, S, 4, H, D]: one projection for several layers
    assert torch.equal(masked_attn(q, layers[:, :, 2], layers[:, :, 3], bits, open), want)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(masked_attn(*turned, bits, open), want)
    turned = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    assert torch.equal(
        masked_attn(*turned, bits.mT.contiguous().mT, open.mT.contiguous().mT), want
    )


def test_gradients_of_slices():
    q, k, v, bits, open = masked_attn_inputs()
    both = torch.stack((k, v), 2).requires_grad_()
    leaves = [t.requires_grad_() for t in (k, v)]
    weight = torch.randn(2, 13, 48)
    (grad,) = torch.autograd.grad(
        (masked_attn(q, both[:, :, 0], both[:, :, 1], bits, open) * weight).sum(), both
    )
    want = torch.autograd.grad((masked_attn(q, k, v, bits, open) * weight).sum(), leaves)
    assert torch.equal(grad, torch.stack(want, 2))


@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0], ids=["spread", "high", "low"])
def test_large_logits(shift):
    q, k, v, bits, open = masked_attn_inputs()
    q[..., 0], k[..., 0] = 4 * shift / 10, 10  # every score moves by `shift`
    check([30 * q, k, v, bits, open])


def test_nan_stays_in_its_row():
    q, k, v, bits, open = masked_attn_inputs()
    clean = masked_attn(q, k, v, bits, open)
    q[1, 3] = float("nan")
    out = masked_attn(q, k, v, bits, open)
    assert out[1, 3].isnan().all()
    keep = torch.arange(13) != 3
    assert torch.equal(out[1, keep], clean[1, keep])
    assert torch.equal(out[0], clean[0])


def test_nan_of_a_closed_key_is_not_seen():
    q, k, v, _, _ = masked_attn_inputs()
    mask = torch.ones(2, 13, 70, dtype=torch.bool)
    mask[:, :5, 17] = False
    k[:, 17] = float("nan")
    out = masked_attn(q, k, v, *pack_bits(mask))
    assert out[:, :5].isfinite().all()
    assert out[:, 5:].isnan().all()


def test_keys_that_nobody_wants_are_not_read():
    mask = torch.rand(2, 13, 400) < 0.5
    mask[:, :, 128:320] = False  # whole tiles of every kernel
    q, k, v, _, _ = masked_attn_inputs(S=400)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    want = masked_attn(q, k, v, *pack_bits(mask))
    grads = torch.autograd.grad(want.square().sum(), leaves)
    with torch.no_grad():
        k[:, 128:320], v[:, 128:320] = float("nan"), float("inf")
    out = masked_attn(q, k, v, *pack_bits(mask))
    assert torch.equal(out, want)
    for actual, grad in zip(torch.autograd.grad(out.square().sum(), leaves), grads):
        assert torch.equal(actual, grad)
    assert not grads[1][:, 128:320].any()
    assert not grads[2][:, 128:320].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_keys_that_only_later_queries_want(dtype):
    """On a GPU the gradients of more than 128 queries come in turns, which add to one another."""
    q, k, v, _, _ = masked_attn_inputs(B=1, Q=150, S=200, H=1, dtype=dtype)
    mask = torch.zeros(1, 150, 200, dtype=torch.bool)
    mask[:, :130, :64], mask[:, 130:, 64:] = True, True
    check([q, k, v, *pack_bits(mask)])


@pytest.mark.cpu_only
def test_same_bits_on_any_number_of_threads():
    q, k, v, bits, open = masked_attn_inputs(S=2500, D=32)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out = masked_attn(q, k, v, bits, open)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
