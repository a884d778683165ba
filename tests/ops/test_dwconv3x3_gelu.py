"""dwconv3x3_gelu: a depthwise 3 x 3 convolution of channels-last rows, with bias and GELU."""

import pytest
import torch

from segkern.ops import dwconv3x3_gelu
from segkern.ops.dwconv3x3_gelu import dwconv3x3_gelu_reference
from support.comparison import DTYPES, compare
from support.inputs import dwconv3x3_gelu_inputs

CASES = {
    "small": {},
    "one pixel": {"h": 1, "w": 1},
    "one row": {"h": 1, "w": 9},
    "one column": {"h": 9, "w": 1},
    "one channel": {"C": 1, "h": 4, "w": 8},
    "more than a vector": {"B": 1, "C": 37, "h": 3, "w": 5},
    "several bands": {"B": 2, "h": 19, "w": 6, "C": 3},
    "several tiles": {"B": 1, "h": 3, "w": 7, "C": 300},
    "no image": {"B": 0},
}


def check(inputs, grads=()):
    compare(dwconv3x3_gelu, dwconv3x3_gelu_reference, inputs, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    check(dwconv3x3_gelu_inputs(**CASES[case], dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, dtype):
    check(dwconv3x3_gelu_inputs(**CASES[case], dtype=dtype), grads=(0, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_from_zero(dtype):
    """Where the GELU is 0 or its argument, and where its gradient is 0 or 1."""
    x, weight, bias = dwconv3x3_gelu_inputs(dtype=dtype)
    check([20 * x, weight, bias], grads=(0, 1, 2))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,)], ids=["x", "weight", "bias"])
def test_one_gradient(wanted):
    check(dwconv3x3_gelu_inputs(dtype=torch.float64), grads=wanted)


@pytest.mark.cpu_only
def test_gradcheck():
    inputs = dwconv3x3_gelu_inputs(1, 3, 4, 2, torch.float64)
    assert torch.autograd.gradcheck(dwconv3x3_gelu, [t.requires_grad_() for t in inputs])


def test_no_pixel_and_no_channel():
    """PyTorch's convolution raises."""
    x, *rest = dwconv3x3_gelu_inputs(h=0)
    assert dwconv3x3_gelu(x, *rest).shape == (2, 0, 10, 6)
    assert dwconv3x3_gelu(*dwconv3x3_gelu_inputs(C=0)).shape == (2, 7, 10, 0)
    leaf = rest[1].requires_grad_()
    dwconv3x3_gelu(x, rest[0], leaf).sum().backward()
    assert not leaf.grad.any()


def test_any_strides():
    x, weight, bias = dwconv3x3_gelu_inputs()
    want = dwconv3x3_gelu(x, weight, bias)
    turned = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    others = weight.mT.contiguous().mT, bias.repeat_interleave(2)[::2]
    assert torch.equal(dwconv3x3_gelu(turned, *others), want)
    part = torch.cat([x, x], 3)[..., :6]
    assert torch.equal(dwconv3x3_gelu(part, weight, bias), want)
    tokens = x.flatten(1, 2)
    assert torch.equal(dwconv3x3_gelu(tokens.unflatten(1, (7, 10)), weight, bias), want)


@pytest.mark.cpu_only
def test_any_number_of_threads_gives_the_same_bits():
    inputs = [t.requires_grad_() for t in dwconv3x3_gelu_inputs(1, 40, 33, 24)]

    def results():
        out = dwconv3x3_gelu(*inputs)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    both = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        both.append(results())
    assert all(torch.equal(a, b) for a, b in zip(*both))


def test_nan_stays_where_it_is_read():
    x, weight, bias = dwconv3x3_gelu_inputs(1, 9, 9, 4)
    x[0, 4, 5, 2] = torch.nan
    found = dwconv3x3_gelu(x, weight, bias)[0].isnan()
    assert found[3:6, 4:7, 2].all()
    assert found.sum() == 9


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, weight, bias = dwconv3x3_gelu_inputs(dtype=dtype)
    filters = weight.reshape(-1, 9).mT.contiguous()
    torch.library.opcheck(torch.ops.segkern.dwconv3x3_gelu, (x, filters, bias))
    inputs = (x.cos(), x, filters, bias)
    torch.library.opcheck(torch.ops.segkern.dwconv3x3_gelu_backward, inputs)


@pytest.mark.cpu_only
def test_compile():
    inputs = [t.requires_grad_() for t in dwconv3x3_gelu_inputs()]
    compiled = torch.compile(dwconv3x3_gelu, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(dwconv3x3_gelu(*inputs).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, w in zip(actual, want):
        torch.testing.assert_close(a, w)


BAD = {
    "x 3-d": (lambda x, w, b: (x[0], w, b), ValueError, r"x must be \[B, h, w, C\] float, got"),
    "x int": (lambda x, w, b: (x.int(), w, b), TypeError, "x must be .* got .* int32"),
    "planar": (
        lambda x, w, b: (x.permute(0, 3, 1, 2), w, b),
        ValueError,
        r"weight must be \[C, 1, 3, 3\] float with C = 10, got \[6, 1, 3, 3\]",
    ),
    "no depthwise": (lambda x, w, b: (x, w.expand(6, 6, 3, 3), b), ValueError, "weight must be"),
    "bias": (lambda x, w, b: (x, w, b[1:]), ValueError, r"bias must be \[C\] .* C = 6, got"),
    "dtype": (lambda x, w, b: (x, w, b.double()), TypeError, "bias must be torch.float32 as x"),
    "device": (lambda x, w, b: (x, w.to("meta"), b), ValueError, "weight must be on .*, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        dwconv3x3_gelu(*change(*dwconv3x3_gelu_inputs()))
