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
