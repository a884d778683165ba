"""conv3x3: a 3 x 3 convolution by Winograd's minimal filters."""

import pytest
import torch

from segkern.ops import conv3x3
from segkern.ops.conv3x3 import conv3x3_reference
from support.comparison import DTYPES, assert_same, compare
from support.inputs import conv3x3_inputs

CASES = {
    "even and odd": {"h": 8, "w": 9},
    "odd and even": {"h": 7, "w": 10},
    "one pixel": {"h": 1, "w": 1},
    "one row": {"h": 1, "w": 5},
    "one channel to one": {"C": 1, "K": 1},
    "more than a vector": {"C": 37, "K": 50},
    "several bands": {"C": 500, "K": 420, "h": 18, "w": 16, "B": 1},
    "a level of the pixel decoder": {"B": 1, "C": 256, "K": 256, "h": 20, "w": 18},
    "no image": {"B": 0},
}
CHECKED = [torch.float32, torch.float64]  # half precision is PyTorch's own
SMALL = [c for c in CASES if c not in ("several bands", "a level of the pixel decoder")]
BOTH = [(case, dtype) for case in CASES for dtype in (DTYPES if case in SMALL else CHECKED)]
TAPS = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])  # G
PATCH = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])  # B^T
BACK = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])  # A^T


def winograd(x, weight):
    """The formula of the kernel in plain PyTorch, whose gradients are its transpose.

    A tile's pixels, and a filter's taps, share the roundings of their transforms.
    """
    (h, w), taps, patch, back = x.shape[2:], *(t.to(x) for t in (TAPS, PATCH, BACK))
    x = torch.nn.functional.pad(x, (1, 1 + w % 2, 1, 1 + h % 2))
    pixels = patch @ x.unfold(2, 4, 2).unfold(3, 4, 2) @ patch.T  # [B, C, down, across, 4, 4]
    filters = taps @ weight @ taps.T  # [K, C, 4, 4]
    tiles = back @ torch.einsum("bcyxij,kcij->bkyxij", pixels, filters) @ back.T
    return tiles.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :h, :w]


def check(inputs, grads=()):
    if inputs[0].dtype not in CHECKED:
        assert_same(conv3x3, conv3x3_reference, inputs, grads)
    else:
        algorithm = None if inputs[0].is_cuda else winograd
        compare(conv3x3, conv3x3_reference, inputs, grads, algorithm=algorithm)


@pytest.mark.parametrize(("case", "dtype"), BOTH, ids=str)
def test_forward(case, dtype):
    check(conv3x3_inputs(**CASES[case], dtype=dtype))


@pytest.mark.parametrize(("case", "dtype"), BOTH, ids=str)
def test_gradients(case, dtype):
    check(conv3x3_inputs(**CASES[case], dtype=dtype), grads=(0, 1))


@pytest.mark.cpu_only
def test_no_pixel_and_no_channel():
    """PyTorch's convolution raises; sums over nothing are zeros."""
    x, weight = conv3x3_inputs(h=0)
    assert conv3x3(x, weight).shape == (2, 5, 0, 10)
    assert not conv3x3(*conv3x3_inputs(C=0)).any()


@pytest.mark.parametrize("wanted", [(0,), (1,)], ids=["x", "weight"])
def test_one_gradient(wanted):
    inputs = conv3x3_inputs(dtype=torch.float64)
    check(inputs, grads=wanted)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in conv3x3_inputs(1, 2, 3, 3, 4, torch.float64)]
    assert torch.autograd.gradcheck(conv3x3, inputs)


def test_any_strides_in_and_channels_last_out():
    x, weight = conv3x3_inputs()
    want = conv3x3(x, weight)
    assert want.is_contiguous(memory_format=torch.channels_last)
    turned = weight.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    assert torch.equal(conv3x3(x.contiguous(), turned), want)
    part = torch.cat([x, x], 3)[..., : x.shape[3]]
    assert torch.equal(conv3x3(part, weight), want)


def test_what_is_not_finite_stays_where_it_is_read():
    """Up to the tile: each of its 2 x 2 pixels is a sum over the 4 x 4 that they read together."""
    x, weight = conv3x3_inputs(1, 3, 4, 12, 12)
    x[0, 1, 5, 7] = torch.inf
    finite = conv3x3(x, weight).isfinite().all(1)[0]
    read = torch.zeros(12, 12, dtype=torch.bool)
    read[4:7, 6:9] = True
    assert not finite[read].any()
    reached = torch.zeros(12, 12, dtype=torch.bool)
    reached[4:8, 6:10] = True
    assert finite[~reached].all()


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", CHECKED, ids=str)
def test_opcheck(dtype):
    x, weight = conv3x3_inputs(dtype=dtype)
    filters = torch.randn(16, *weight.shape[:2], dtype=dtype)
    x = x.permute(0, 2, 3, 1)
    torch.library.opcheck(torch.ops.segkern.conv3x3, (x, filters))
    grad = torch.ones(*x.shape[:3], len(weight), dtype=dtype)
    torch.library.opcheck(torch.ops.segkern.conv3x3_backward, (grad, x))


@pytest.mark.cpu_only
def test_compile():
    inputs = [t.requires_grad_() for t in conv3x3_inputs()]
    compiled = torch.compile(conv3x3, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(conv3x3(*inputs).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, w in zip(actual, want):
        assert torch.equal(a, w)


@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_autocast_is_that_of_a_convolution(impl):
    inputs = conv3x3_inputs()
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        out = conv3x3(*inputs, impl=impl)
        want = conv3x3_reference(*inputs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)


BAD = {
    "x 3-d": (lambda x, w: (x[0], w), ValueError, r"x must be \[B, C, h, w\] float, got"),
    "x int": (lambda x, w: (x.int(), w), TypeError, r"x must be .* got .* int32"),
    "channels": (lambda x, w: (x, w[:, 1:]), ValueError, "weight must be .* with C = 6, got"),
    "5 x 5": (
        lambda x, w: (x, w.repeat(1, 1, 2, 2)),
        ValueError,
        r"weight must be \[K, C, 3, 3\]",
    ),
    "dtype": (lambda x, w: (x, w.double()), TypeError, "weight must be torch.float32 as x, got"),
    "device": (lambda x, w: (x, w.to("meta")), ValueError, "weight must be on .*, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        conv3x3(*change(*conv3x3_inputs()))
