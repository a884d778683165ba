"""exp, 1 / x and sigmoid of the Triton kernels: off by an ulp or two, a GPU's own by more."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="no Triton on this platform")

import triton
import triton.language as tl

from segkern.kernels.sigmoid import exp_negative, reciprocal, sigmoid_and_factor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else []  # there kernels are compiled for GPUs
DEVICES += [pytest.param("cuda", marks=pytest.mark.gpu)]


@triton.jit
def every_function(
    x,  # [n]
    out,  # [4, n]: exp(-|x|), sigmoid(x), 1 + exp(-|x|), 1 / (1 + |x|)
    n,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    s, factor = sigmoid_and_factor(value)
    tl.store(out + i, exp_negative(-tl.abs(value)), mask=i < n)
    tl.store(out + n + i, s, mask=i < n)
    tl.store(out + 2 * n + i, factor, mask=i < n)
    tl.store(out + 3 * n + i, reciprocal(1.0 + tl.abs(value)), mask=i < n)


def run(x):
    out = x.new_full((4, len(x)), float("nan"))
    every_function[(triton.cdiv(len(x), 1024),)](x, out, len(x), 1024)
    return out


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The interpreter's exp, exp2 and division become as wrong as a GPU's instructions may be."""
    if not INTERPRETED:
        return
    import numpy as np
    from triton.runtime.interpreter import interpreter_builder as builder

    def off(x, by):  # the result, wrong by a relative error; 0 where it is subnormal
        wrong = (x * (1 + by)).astype(x.dtype)
        return np.where(np.abs(wrong) < np.finfo(np.float32).tiny, 0, wrong).astype(x.dtype)

    def exp2(x):
        return off(np.exp2(x), 2**-22.5)

    def exp(x):
        return exp2(x * x.dtype.type(1.4426950408889634))

    def divide(lhs, rhs):
        return builder.binary_op(lhs, rhs, lambda a, b: off(np.divide(a, b), -(2**-22.5)))

    monkeypatch.setattr(type(builder), "create_exp2", lambda self, x: self.unary_op(x, exp2))
    monkeypatch.setattr(type(builder), "create_exp", lambda self, x: self.unary_op(x, exp))
    monkeypatch.setattr(type(builder), "create_fdiv", lambda self, a, b: divide(a, b))


@pytest.mark.parametrize("device", DEVICES)
def test_float32_rounds_as_pytorch_does(device, as_on_a_gpu):
    x = torch.cat((torch.linspace(-110, 110, 200_001), torch.linspace(-1, 1, 50_001)))
    x = torch.cat((x, torch.tensor([0.0, -0.0, 1e30, -1e30, float("inf"), float("-inf")])))
    got = run(x.to(device)).cpu()
    exact = x.double()
    small = (-exact.abs()).exp()
    want = torch.stack((small, exact.sigmoid(), 1 + small, 1 / (1 + exact.abs())))
    got[3, x.isinf()] = 0  # not promised
    # an ulp of the result; below the normal numbers of float32 the spacing is 2^-149
    ulp = 2.0 ** (want.clamp(min=2.0**-126).log2().floor() - 23)
    worst = ((got.double() - want).abs() / ulp).amax(1)
    # the result's rounding, and what an ulp in exp and in 1 + ... makes of it
    assert (worst <= torch.tensor([1.0, 2.5, 1.0, 1.6])).all(), worst


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_float64(device):
    x = torch.tensor([float("nan"), 0.0, -1.5, 3.0, -600.0], device=device)
    assert run(x)[:, 0].isnan().all()
    got = run(x.double())
    assert got[:, 0].isnan().all()
    torch.testing.assert_close(got[1, 1:], x[1:].double().sigmoid(), rtol=1e-15, atol=0)
