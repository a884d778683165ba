"""norm_relu: a norm of known moments, a sum and a ReLU."""

import os

import pytest
import torch
import torch.nn.functional as F

from segkern.kernels import _launch
from segkern.ops._norm_relu import norm_relu
from support.comparison import DTYPES, compare

CASES = {  # B, C, h, w, what is added
    "alone": (2, 12, 7, 5, None),
    "sum": (2, 12, 7, 5, "sum"),
    "sum of norms": (1, 300, 9, 8, "norms"),
    "one pixel": (1, 3, 1, 1, "norms"),
    "no image": (0, 4, 3, 3, "sum"),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that each has several tiles, where the Triton kernel is interpreted."""
    monkeypatch.setattr(_launch, "ASSUMED", _launch.ASSUMED._replace(multiprocessors=1))


def inputs(B, C, h, w, added, dtype, statistics=None):
    g = torch.Generator(device="cpu").manual_seed(0)
    count = 1 if added is None else 2
    maps = [torch.randn(B, h, w, C, generator=g, device="cpu") for _ in range(count)]
    norms = torch.randn(2 if added == "norms" else 1, 4, C, generator=g, device="cpu")
    norms[:, 1] = norms[:, 1].square() + 0.1
    values = [m.permute(0, 3, 1, 2).to(dtype) for m in maps]
    values += [t.to(statistics or dtype) for norm in norms for t in norm]
    return [v.to(torch.get_default_device()) for v in values]


def split(values, added):
    count = 1 if added is None else 2
    return [*values[:count], *([None] * (2 - count))], values[count:]


def run(added):
    def call(*values):
        (x, other), norms = split(values, added)
        second = (list(norms[4:]), 1e-3) if added == "norms" else None
        return norm_relu(x, (list(norms[:4]), 1e-5), other, second)

    return call


def reference(added):
    def normed(x, norm, eps):
        mean, variance, weight, bias = (t.to(x.dtype)[:, None, None] for t in norm)
        return (x - mean) / (variance + eps).sqrt() * weight + bias

    def call(*values):
        (x, other), norms = split(values, added)
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        y = normed(x.to(wide), norms[:4], 1e-5)
        if added == "norms":
            other = normed(other.to(wide), norms[4:], 1e-3)
        return F.relu(y if other is None else y + other).to(dtype)

    return call


def needs_kernel(dtype):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if dtype.itemsize == 2 and not interpreted and torch.get_default_device().type == "cpu":
        pytest.skip("on a CPU it is PyTorch's")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    needs_kernel(dtype)
    values = inputs(*CASES[case], dtype)
    compare(run(CASES[case][4]), reference(CASES[case][4]), values)


def trained(added):
    """The places of inputs that have gradients: maps, weights and biases."""
    maps = 1 if added is None else 2
    norms = range(maps, maps + (8 if added == "norms" else 4), 4)
    return [*range(maps), *(i for n in norms for i in (n + 2, n + 3))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, dtype):
    needs_kernel(dtype)
    added = CASES[case][4]
    compare(run(added), reference(added), inputs(*CASES[case], dtype), trained(added))


@pytest.mark.parametrize("which", ["x", "other", "weight of x", "bias of other"])
def test_gradients_of_a_few(which):
    """Those of the others are not formed, and only what they need is kept."""
    values, kept = inputs(2, 12, 7, 5, "norms", torch.float64), []
    place = {"x": 0, "other": 1, "weight of x": 4, "bias of other": 9}[which]
    for call in (run("norms"), reference("norms")):
        of = values[place].detach().requires_grad_()
        given = [*values[:place], of, *values[place + 1 :]]

        def keep(t):
            kept.append(t.data_ptr())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = call(*given)
        if call.__qualname__.startswith("run"):
            assert (values[0].data_ptr() in kept) == (which == "weight of x")
            assert (values[1].data_ptr() in kept) == (which == "bias of other")
        (grad,) = torch.autograd.grad(y.square().sum(), of)
        if call.__qualname__.startswith("run"):
            got = grad
    torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.cpu_only
@pytest.mark.parametrize("added", [None, "sum", "norms"], ids=str)
def test_gradcheck(added):
    values = inputs(2, 3, 4, 3, added, torch.float64)
    for i in trained(added):
        values[i].requires_grad_()
    assert torch.autograd.gradcheck(run(added), values)


def test_gradient_of_nan_flows():
    x, *norm = inputs(1, 4, 3, 5, None, torch.float32)
    x[0, 1, 2, 3] = torch.nan
    x.requires_grad_()
    grads = torch.ones_like(x) * 2
    (got,) = torch.autograd.grad(norm_relu(x, (norm, 1e-5)), x, grads)
    y = F.relu(F.batch_norm(x, *norm))
    (want,) = torch.autograd.grad(y, x, grads)
    assert got[0, 1, 2, 3] != 0
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("half", DTYPES[2:], ids=str)
def test_half_precision_beside_single(half):
    needs_kernel(half)
    values = inputs(2, 12, 7, 5, "norms", half, torch.float32)
    compare(run("norms"), reference("norms"), values)


def test_nan_stays_and_any_strides():
    x, *norm = inputs(1, 4, 3, 5, None, torch.float32)
    x[0, 1, 2, 3] = torch.nan
    out = norm_relu(x, (norm, 1e-5))
    assert out.isnan().sum() == 1
    assert out[0, 1, 2, 3].isnan()
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(norm_relu(x.contiguous(), (norm, 1e-5)), out, equal_nan=True)


@pytest.mark.cpu_only
def test_opcheck():
    x, other, *norms = inputs(2, 4, 3, 5, "norms", torch.float32)
    for more in ((None, []), (other, []), (other, norms[4:])):
        arguments = (x, norms[:4], 1e-5, *more, 1e-3)
        torch.library.opcheck(torch.ops.segkern.norm_relu, arguments)
    grad, out = other, norm_relu(x, (norms[:4], 1e-5))
    for summed, a, b, more in ((False, x, None, []), (True, None, None, []), (True, x, other, 4)):
        arguments = (grad, out, summed, a, norms[:4], 1e-5, b, norms[4:] if more else [], 1e-3)
        torch.library.opcheck(torch.ops.segkern.norm_relu_backward, arguments)


def test_compile():
    values = inputs(2, 4, 3, 5, "norms", torch.float64)
    for i in trained("norms"):
        values[i].requires_grad_()
    wanted = [values[i] for i in trained("norms")]
    call = torch.compile(run("norms"), fullgraph=True, backend="aot_eager")
    got, want = call(*values), run("norms")(*values)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(y.square().sum(), wanted) for y in (got, want))
    torch.testing.assert_close(*grads)
