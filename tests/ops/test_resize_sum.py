"""resize_sum: the sum of maps of several sizes, resized to the first one's."""

import pytest
import torch
import torch.nn.functional as F

from segkern.ops import resize_sum
from segkern.ops.resize_sum import resize_sum_reference
from support.comparison import DTYPES, compare
from support.inputs import resize_sum_inputs

CASES = {  # inputs, relu
    "one map": ({"sizes": ((7, 10),)}, True),
    "a pyramid": ({"B": 1, "sizes": ((8, 12), (4, 6), (2, 3), (1, 2))}, True),
    "odd sizes": ({}, False),
    "larger, and as large": ({"B": 1, "sizes": ((5, 6), (7, 13), (5, 6))}, True),
    "one side alone": ({"B": 1, "sizes": ((6, 9), (6, 4), (3, 9))}, False),
    "one pixel": ({"sizes": ((1, 1), (3, 4))}, False),
    "of one pixel": ({"sizes": ((5, 4), (1, 1), (1, 4))}, True),
    "eight maps": ({"B": 1, "E": 3, "sizes": [(i % 3 + 1, 3 - i // 3) for i in range(8)]}, True),
    "more than a vector": ({"B": 1, "E": 37, "sizes": ((4, 5), (2, 3))}, True),
    "several tiles": ({"B": 1, "E": 300, "sizes": ((3, 11), (2, 6))}, True),
    "no image": ({"B": 0}, True),
}


def run(function, relu, **options):
    def call(bias, *maps):
        return function(maps, bias, relu, **options)

    return call


def check(sizes, relu, dtype, grads=False):
    inputs = resize_sum_inputs(**sizes, dtype=dtype)
    kernel, reference = (run(f, relu) for f in (resize_sum, resize_sum_reference))
    compare(kernel, reference, inputs, range(len(inputs)) if grads else ())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    check(*CASES[case], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, dtype):
    check(*CASES[case], dtype, grads=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 3)], ids=str)
def test_some_gradients(wanted):
    kernel, reference = (run(f, True) for f in (resize_sum, resize_sum_reference))
    compare(kernel, reference, resize_sum_inputs(dtype=torch.float64), wanted)


def test_is_interpolate_of_what_lies_side_by_side():
    """As SegFormer's head: resized, side by side and projected is projected and summed."""
    _, *maps = resize_sum_inputs(dtype=torch.float64)
    weight = torch.randn(5, 18, 1, 1, dtype=torch.float64)
    size = maps[0].shape[2:]
    wide = torch.cat([F.interpolate(x, size, mode="bilinear") for x in maps], 1)
    want = F.conv2d(wide, weight)
    parts = [F.conv2d(x, w) for x, w in zip(maps, weight.split(6, 1))]
    torch.testing.assert_close(resize_sum(parts), want)


@pytest.mark.cpu_only
@pytest.mark.parametrize("relu", [False, True], ids=["sum", "relu"])
def test_gradcheck(relu):
    sizes = (3, 4), (2, 2), (5, 3)
    inputs = resize_sum_inputs(1, 2, sizes, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(run(resize_sum, relu), inputs)


def test_any_strides_in_and_channels_last_out():
    bias, *maps = resize_sum_inputs()
    want = resize_sum(maps, bias)
    assert want.is_contiguous(memory_format=torch.channels_last)
    planar = [x.contiguous() for x in maps]
    assert torch.equal(resize_sum(planar, bias.repeat_interleave(2)[::2]), want)
    # levels of a pyramid, beside each other in memory
    levels = torch.cat([x.flatten(2) for x in maps], 2).mT.contiguous().mT.split([70, 20, 6], 2)
    beside = [x.unflatten(2, m.shape[2:]) for x, m in zip(levels, maps)]
    assert torch.equal(resize_sum(beside, bias), want)


@pytest.mark.cpu_only
def test_any_number_of_threads_gives_the_same_bits():
    inputs = [t.requires_grad_() for t in resize_sum_inputs(1, 64, ((40, 33), (20, 17)))]

    def results():
        out = run(resize_sum, True)(*inputs)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    both = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        both.append(results())
    assert all(torch.equal(a, b) for a, b in zip(*both))


def test_what_is_not_finite_stays_where_it_is_read():
    bias, x, y, _ = resize_sum_inputs(1, 4, ((8, 8), (4, 4), (8, 8)))
    x[0, 0, 3, 3], y[0, 1, 0, 0], y[0, 2, 3, 3] = torch.nan, torch.inf, -torch.inf
    out = resize_sum((x, y), bias, relu=True)[0]
    assert out[0].isnan().sum() == 1
    assert out[0, 3, 3].isnan()
    assert (out[1, :3, :3] == torch.inf).all()
    assert (out[2, 5:, 5:] == 0).all()
    assert out[1, 3:].isfinite().all()
    assert out[1, :, 3:].isfinite().all()
    assert out[3].isfinite().all()


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    bias, *maps = resize_sum_inputs(dtype=dtype)
    maps = [x.permute(0, 2, 3, 1) for x in maps]
    for given in (bias, None):
        torch.library.opcheck(torch.ops.segkern.resize_sum, (maps, given, True))
    sizes = [4, 5, 2, 3, 9, 12]
    torch.library.opcheck(torch.ops.segkern.resize_sum_backward, (maps[0], sizes))


@pytest.mark.cpu_only
def test_compile():
    inputs = [t.requires_grad_() for t in resize_sum_inputs()]
    function = run(resize_sum, True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, w in zip(actual, want):
        torch.testing.assert_close(a, w)


BAD = {
    "no map": (lambda b, x, y, z: ([], b), ValueError, "maps must be 1 to 8 tensors, got 0"),
    "nine": (lambda b, x, y, z: ([x] * 9, b), ValueError, "maps must be 1 to 8 tensors, got 9"),
    "a tensor": (lambda b, x, y, z: (x, b), ValueError, r"maps must be 1 to 8 tensors, got \[2, "),
    "3-d": (
        lambda b, x, y, z: ((x, y[0]), b),
        ValueError,
        r"maps\[1\] must be \[B, E, h_1, w_1\]",
    ),
    "int": (lambda b, x, y, z: ((x.int(), y), b), TypeError, r"maps\[0\] must be .* got .* int32"),
    "channels": (lambda b, x, y, z: ((x, y[:, 1:]), b), ValueError, r"with B = 2, E = 6, got"),
    "dtype": (
        lambda b, x, y, z: ((x, y, z.double()), b),
        TypeError,
        r"maps\[2\] must be torch.float32 as maps\[0\], got torch.float64",
    ),
    "no pixel": (
        lambda b, x, y, z: ((x, y[:, :, :0]), b),
        ValueError,
        r"maps\[1\] must have at least one pixel, got \[2, 6, 0, 5\]",
    ),
    "bias": (lambda b, x, y, z: ((x, y), b[1:]), ValueError, r"bias must be \[E\] .* E = 6, got"),
    "bias's dtype": (
        lambda b, x, y, z: ((x, y), b.half()),
        TypeError,
        r"bias must be torch.float32 as maps\[0\], got torch.float16",
    ),
    "device": (lambda b, x, y, z: ((x, y.to("meta")), b), ValueError, r"maps\[1\] must be on .*"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        resize_sum(*change(*resize_sum_inputs()))
