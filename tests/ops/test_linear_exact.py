"""linear_exact: two bfloat16 terms of each factor, as on a GPU, here with products in float32."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from segkern.nn.pixel_decoder import PixelDecoderLayer
from segkern.nn.position import pixel_centres
from segkern.ops import linear
from segkern.ops._linear_exact import _Split, linear_exact

SINGLE, HALF = torch.float32, (torch.bfloat16, torch.float16)
DTYPES = [(SINGLE, SINGLE), *((half, SINGLE) for half in HALF), *((half, half) for half in HALF)]


def offsets(x_dtype, w_dtype, N=64, K=256, M=192):
    """x, weight and bias of offsets around ten pixels, made of terms of either sign."""
    g = torch.Generator(device="cpu").manual_seed(0)
    x, weight = (torch.randn(s, generator=g, device="cpu") for s in ((N, K), (M, K)))
    weight = weight * (10 / (K**0.5)) + 10 * x[:1] / x[0].square().sum()
    bias = 2 * torch.randn(M, generator=g, device="cpu")
    return [
        t.to(d).requires_grad_() for t, d in ((x, x_dtype), (weight, w_dtype), (bias, w_dtype))
    ]


@pytest.mark.cpu_only
@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPES, ids=str)
def test_offsets_are_within_the_stated_error(x_dtype, w_dtype):
    x, weight, bias = offsets(x_dtype, w_dtype)
    a, b = x.detach().double(), weight.detach().double()
    exact = a @ b.mT + bias.detach().double()
    magnitudes = a.abs() @ b.abs().mT + bias.detach().double().abs()
    error = (_Split.apply(x, weight, bias).detach() - exact).abs()
    # two terms hold 16 bits of a factor, and the product of both second ones is left out; then
    # the sum's own roundings
    bound = (3 * 2.0**-18 + 256 * 2.0**-24) * magnitudes
    assert (error <= bound).all()
    ten = (exact.abs() - 10).abs() < 1
    assert ten.sum() > 100
    assert error[ten].max() < 3e-4
    plain = F.linear(*(t.detach().bfloat16() for t in (x, weight, bias))).double()
    assert (plain - exact)[ten].abs().max() > 0.02  # what half precision would do


@pytest.mark.cpu_only
@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPES, ids=str)
def test_gradients(x_dtype, w_dtype):
    """Within the rounding of two factors to half precision, and of the result."""
    tensors = offsets(x_dtype, w_dtype)
    weights = torch.randn(64, 192)
    got = torch.autograd.grad((_Split.apply(*tensors) * weights).sum(), tensors)
    x, weight, bias = (t.detach().double().requires_grad_() for t in tensors)
    want = torch.autograd.grad((F.linear(x, weight, bias) * weights).sum(), (x, weight, bias))
    w, x, g = weight.detach().abs(), x.detach().abs(), weights.double().abs()
    for a, b, magnitude, t in zip(got, want, (g @ w, g.mT @ x, g.sum(0)), tensors):
        assert a.dtype == t.dtype
        assert (
            (a - b).abs() <= 2.1 * 2.0**-9 * magnitude + b.abs() * torch.finfo(t.dtype).eps
        ).all()


@pytest.mark.cpu_only
def test_compile():
    tensors = offsets(SINGLE, SINGLE)
    compiled = torch.compile(_Split.apply, fullgraph=True, backend="aot_eager")
    both = [f(*tensors) for f in (_Split.apply, compiled)]
    assert torch.equal(*both)
    grads = [torch.autograd.grad(out.square().sum(), tensors) for out in both]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.cpu_only
@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPES, ids=str)
def test_what_a_gpu_runs(x_dtype, w_dtype, monkeypatch):
    """Single precision keeps its product; beside half precision the operands are halves."""
    with FakeTensorMode():
        x, weight, bias = (t.to("cuda") for t in offsets(x_dtype, w_dtype))
        for autocast in (False, True):
            # torch.autocast does nothing without a GPU
            monkeypatch.setattr(torch, "is_autocast_enabled", lambda _, on=autocast: on)
            out = linear_exact(x[None], weight, bias)
            assert (out.shape, out.dtype) == ((1, 64, 192), SINGLE)
            split = type(out.grad_fn.next_functions[0][0]).__name__.startswith("_Split")
            assert split == (autocast or x_dtype != SINGLE)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [SINGLE, torch.float64, *HALF], ids=str)
def test_on_a_cpu_it_is_the_layer_in_single_precision(dtype):
    x, weight, bias = offsets(dtype, dtype)
    exact = torch.promote_types(dtype, SINGLE)
    want = linear(x.to(exact), weight.to(exact), bias.to(exact))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(linear_exact(x, weight, bias), want)


def as_on_a_gpu(x, weight, bias):
    with torch.autocast(x.device.type, enabled=False):
        return _Split.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


@pytest.mark.cpu_only
def test_a_layer_of_the_decoder_takes_it(monkeypatch):
    shapes = ((2, 3), (4, 6), (8, 12))
    layer = PixelDecoderLayer(32, 2, 4, 64, 0.0)
    S = sum(h * w for h, w in shapes)
    x, position = torch.randn(2, S, 32), torch.randn(S, 32)
    reference = pixel_centres(shapes, x.device, x.dtype)
    weight, grads = layer.attn.sampling_offsets.weight, []
    torch.nn.init.normal_(weight, std=0.1)
    # away from the kinks of bilinear sampling, where gradients jump
    torch.nn.init.normal_(layer.attn.sampling_offsets.bias, std=0.3)
    for patched in (False, True):
        if patched:
            monkeypatch.setattr("segkern.nn.pixel_decoder.linear_exact", as_on_a_gpu)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x, None, position, shapes, reference, False)
        grads.append(torch.autograd.grad((out * x.flip(1)).sum(), weight)[0])
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[0].norm()
