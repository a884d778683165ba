"""group_norm: a group norm, a resized coarser map added, and a ReLU."""

import os

import pytest
import torch

from segkern.kernels import _launch
from segkern.ops import group_norm
from segkern.ops.group_norm import _GroupNorm, group_norm_reference
from support.comparison import DTYPES, assert_same, compare
from support.inputs import group_norm_inputs

CASES = {  # inputs, groups, relu
    "norm": ({}, 3, False),
    "relu": ({}, 4, True),
    "twice as large": ({"up": (4, 5), "h": 8}, 3, False),
    "another size": ({"up": (3, 7)}, 2, True),
    "smaller than the map added": ({"up": (20, 23)}, 12, False),
    "one pixel added": ({"up": (1, 1)}, 1, False),
    "one pixel": ({"h": 1, "w": 1}, 3, False),
    "several parts": ({"C": 40, "h": 20, "w": 33, "up": (9, 48)}, 8, True),
    "no image": ({"B": 0, "up": (2, 2)}, 3, True),
}


def run(function, groups, relu, **options):
    def call(x, weight, bias, up=None):
        return function(x, groups, weight, bias, 1e-5, relu, up, **options)

    return call


def inside(groups, relu):
    """What runs on a GPU, wherever its tensors are."""

    def call(x, weight, bias, up=None):
        rows, coarse = (t if t is None else t.permute(0, 2, 3, 1) for t in (x, up))
        cut = relu and up is None
        out = _GroupNorm.apply(rows, weight, bias, groups, 1e-5, cut, coarse)
        return (out.relu() if cut != relu else out).permute(0, 3, 1, 2)

    return call


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that each has several tiles, where the Triton kernels are interpreted."""
    monkeypatch.setattr(_launch, "ASSUMED", _launch.ASSUMED._replace(multiprocessors=1))


def check(inputs, groups, relu, grads=()):
    kernel, reference = (run(f, groups, relu) for f in (group_norm, group_norm_reference))
    # on a CPU half precision is PyTorch's own, where there is no map to add or gradients flow
    own = inputs[0].dtype.itemsize == 2 and not inputs[0].is_cuda and not INTERPRETED
    own = own and (len(inputs) == 3 or bool(grads))
    rule = assert_same if own else compare
    rule(inside(groups, relu) if INTERPRETED else kernel, reference, inputs, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    sizes, *options = CASES[case]
    check(group_norm_inputs(**sizes, dtype=dtype), *options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, dtype):
    sizes, *options = CASES[case]
    inputs = group_norm_inputs(**sizes, dtype=dtype)
    check(inputs, *options, grads=range(len(inputs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_through_the_relu_inside(dtype):
    sizes, *options = CASES["relu"]
    inputs = group_norm_inputs(**sizes, dtype=dtype)
    compare(inside(*options), run(group_norm_reference, *options), inputs, range(3))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_beside_single(half):
    """As under autocast on a GPU: the map alone is in half precision, and so is the result."""
    if not INTERPRETED and torch.get_default_device().type == "cpu":
        pytest.skip("the kernel for CPUs has no half precision")

    def reference(x, weight, bias, up):
        return group_norm_reference(x.to(weight), 3, weight, bias, 1e-5, False, up).to(x)

    x, *others = group_norm_inputs(up=(4, 5))
    compare(inside(3, False), reference, [x.to(half), *others], range(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_from_zero(dtype):
    """PyTorch's channels-last norm takes the variance as a difference of squares, which is wrong
    there even in float64; its planar one does not."""

    def planar(x, *rest):
        return group_norm_reference(x.contiguous(), *rest)

    inputs = group_norm_inputs(h=33, mean=300.0, dtype=dtype)
    if INTERPRETED or inputs[0].is_cuda:  # nor does the first pixel tell where the others lie
        inputs[0][:, :, 0, 0] = -300.0
    compare(run(group_norm, 3, False), run(planar, 3, False), inputs)


@pytest.mark.cpu_only
@pytest.mark.parametrize("relu", [False, True], ids=["norm", "relu"])
def test_gradcheck(relu):
    sizes = {"B": 2, "C": 4, "h": 3, "w": 4, "up": (2, 2)}
    inputs = [t.requires_grad_() for t in group_norm_inputs(**sizes, dtype=torch.float64)]
    assert torch.autograd.gradcheck(run(group_norm, 2, relu), inputs)


def test_any_strides():
    x, weight, bias, up = group_norm_inputs(up=(4, 5))
    want = group_norm(x, 3, weight, bias, up=up)
    assert torch.equal(group_norm(x.contiguous(), 3, weight, bias, up=up.contiguous()), want)
    # levels of a pyramid, beside each other in memory
    levels = torch.cat([t.permute(0, 2, 3, 1).flatten(1, 2) for t in (up, x)], 1)
    beside = [
        t.unflatten(1, s.shape[2:]).permute(0, 3, 1, 2)
        for s, t in ((up, levels[:, :20]), (x, levels[:, 20:]))
    ]
    assert torch.equal(group_norm(beside[1], 3, weight, bias, up=beside[0]), want)


def test_nan_stays():
    """Of its group; of the map that is added, where it is read."""
    x, weight, bias, up = group_norm_inputs(1, 4, 8, 8, (4, 4))
    x[0, 0, 3, 3] = torch.nan
    out = group_norm(x, 2, weight, bias, relu=True)[0]
    assert out[:2].isnan().all()
    assert out[2:].isfinite().all()
    x[0, 0, 3, 3], up[0, 1, 0, 0] = 0, torch.nan
    out = group_norm(x, 2, weight, bias, relu=True, up=up)[0].isnan()
    assert out[1, :2, :2].all()
    assert not out[1, 3:].any()
    assert not out[[0, 2, 3]].any()


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    x, weight, bias, up = group_norm_inputs(up=(3, 4), dtype=dtype)
    x, up = x.permute(0, 2, 3, 1), up.permute(0, 2, 3, 1)
    for coarse in (None, up):
        inputs = (x, weight, bias, 3, 1e-5, True, coarse)
        torch.library.opcheck(torch.ops.segkern.group_norm, inputs)
        _, *moments = torch.ops.segkern.group_norm(*inputs)
        size = (None, None) if coarse is None else (coarse.shape[1:3], dtype)
        inputs = (x.cos(), x, weight, bias, *moments, 3, coarse is None, *size)
        torch.library.opcheck(torch.ops.segkern.group_norm_backward, inputs)


@pytest.mark.cpu_only
def test_compile():
    inputs = [t.requires_grad_() for t in group_norm_inputs(up=(4, 5))]
    function = run(group_norm, 3, True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, w in zip(actual, want):
        torch.testing.assert_close(a, w)


@pytest.mark.cpu_only
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_autocast_on_a_cpu_is_that_of_plain_pytorch(impl):
    inputs = group_norm_inputs(up=(4, 5))
    given = inputs if impl == "reference" else inputs[:3]
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        out = run(group_norm, 3, True, impl=impl)(*given)
        want = run(group_norm_reference, 3, True)(*given)
    assert torch.equal(out, want)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_map_of_another_dtype_is_added_under_autocast(dtype):
    x, *others = group_norm_inputs(up=(4, 5))

    def kernel(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return group_norm(inputs[0], 3, *others[:2], 1e-5, True, others[2])

    def reference(x):
        weight, bias, up = (t.to(x.dtype) for t in others)
        return group_norm_reference(x, 3, weight, bias, 1e-5, True, up)

    compare(kernel, reference, [x.to(dtype)])


BAD = {
    "x 3-d": (lambda x, w, b, u: (x[0], 3, w, b), ValueError, r"x must be \[B, C, h, w\] float"),
    "x int": (lambda x, w, b, u: (x.int(), 3, w, b), TypeError, "x must be .* got .* int32"),
    "weight": (lambda x, w, b, u: (x, 3, w[1:], b), ValueError, "weight must be .* with C = 12"),
    "groups": (lambda x, w, b, u: (x, 5, w, b), ValueError, "groups must divide C = 12, got 5"),
    "no group": (lambda x, w, b, u: (x, 0, w, b), ValueError, "groups must divide C = 12, got 0"),
    "dtype": (lambda x, w, b, u: (x, 3, w, b.double()), TypeError, "bias must be torch.float32"),
    "up": (
        lambda x, w, b, u: (x, 3, w, b, 1e-5, False, u[:, 1:]),
        ValueError,
        r"up must be \[B, C, H, W\] float with B = 2, C = 12, got",
    ),
    "up's dtype": (
        lambda x, w, b, u: (x, 3, w, b, 1e-5, False, u.half()),
        TypeError,
        "up must be torch.float32 as x, got torch.float16",
    ),
    "no pixel": (lambda x, w, b, u: (x[:, :, :0], 3, w, b), ValueError, "pixel, got h = 0"),
    "device": (lambda x, w, b, u: (x, 3, w.to("meta"), b), ValueError, "weight must be on .*"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        group_norm(*change(*group_norm_inputs(up=(4, 5))))
