"""The comparison itself: the faults that it must find, for every op and precision."""

import importlib
import re

import pytest
import test_conv3x3
import test_linear_assignment
import test_mask_bits
import test_masked_attn
import test_resize_argmax
import test_segment_map
import torch
from torch import Tensor

from segkern import ops
from segkern.ops.linear_assignment import linear_assignment_reference
from support import inputs
from support.comparison import DTYPES, Yardstick, compare, results

pytestmark = pytest.mark.cpu_only
FEW_POINTS = (40, 3.0, 0.75)
CASES = {  # inputs, what follows them, places of the gradients
    "conv3x3": (inputs.conv3x3_inputs(), (), (0, 1)),
    "dwconv3x3_gelu": (inputs.dwconv3x3_gelu_inputs(), (), (0, 1, 2)),
    "feed_forward": (inputs.feed_forward_inputs(), (), range(5)),
    "group_norm": (inputs.group_norm_inputs(), (), (0, 1, 2)),
    "masked_attn": (inputs.masked_attn_inputs(), (), (0, 1, 2)),
    "matching_cost": (inputs.matching_cost_inputs(), (), ()),
    "ms_deform_attn": (inputs.ms_deform_attn_inputs(margin=0.01), (), (0, 2, 3, 4)),
    "neighborhood_attn": (inputs.neighborhood_attn_inputs(dilation=2), (), (0, 1, 2, 3)),
    "point_mask_loss": (inputs.point_mask_loss_inputs(), FEW_POINTS, (0,)),
    "point_sample": (inputs.point_sample_inputs(spread=0.0), (), (0,)),
    "resize_sum": (inputs.resize_sum_inputs(), (), range(4)),
    "window_attn": (inputs.window_attn_inputs(shift=1), (), (0, 1, 2)),
}
ALGORITHMS = {"conv3x3": test_conv3x3.winograd, "masked_attn": test_masked_attn.with_gradient}
COORDINATES = {("ms_deform_attn", 2), ("ms_deform_attn", 3), ("matching_cost", 5)}
COORDINATES |= {("point_sample", 1)}
PLANTED = [(op, dtype) for op in CASES for dtype in DTYPES]
# in half precision these run PyTorch's own, and must be the same to the bit
SAME = {(op, dtype) for op in ("conv3x3", "group_norm") for dtype in DTYPES[2:]}
PLANTED = [p for p in PLANTED if p not in SAME]


def functions(op):
    kernel = getattr(ops, op)
    reference = getattr(importlib.import_module(f"segkern.ops.{op}"), f"{op}_reference")
    if op == "group_norm":
        return [lambda x, w, b, f=f: f(x, 3, w, b) for f in (kernel, reference)]
    if op == "resize_sum":
        return [lambda bias, *maps, f=f: f(maps, bias) for f in (kernel, reference)]
    return kernel, reference


def in_precision(op, values, dtype):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        v.to(exact if (op, i) in COORDINATES else dtype)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for i, v in enumerate(values)
    ]


@pytest.mark.parametrize(("op", "dtype"), PLANTED, ids=str)
def test_planted_faults_are_found(op, dtype):
    """A lane that is off by 1e-10 (float64), 1e-5 (float32) or two roundings of itself; one tap,
    key, weight or pixel left out; one with the other sign."""
    values, settings, grads = CASES[op]
    values = [*in_precision(op, values, dtype), *settings]
    kernel, reference = functions(op)
    # the products of feed_forward are PyTorch's, which stores the hidden layer in half precision
    stored = dtype if op == "feed_forward" else None
    yardstick = Yardstick(reference, values, grads, stored, ALGORITHMS.get(op))
    actual = results(kernel, values, grads, dtype)
    yardstick.check(actual)

    half = (16 if stored else 2) * torch.finfo(dtype).eps
    share = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, half)
    for i, (right, exact, moved) in enumerate(zip(actual, yardstick.exact, yardstick.moved)):
        lane = (moved / exact.abs()).nan_to_num(torch.inf).argmin()  # of sums that cancel least
        wrong = right.clone().contiguous()
        wrong.view(-1)[lane] += wrong.view(-1)[lane] * share
        with pytest.raises(AssertionError, match=r"error .* allowed"):
            yardstick.check([*actual[:i], wrong, *actual[i + 1 :]])

    for i, value in enumerate(values):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        weight = (0.5 - value.double()).reciprocal()  # a point that lies on the map
        if i in grads:  # what matters most
            weight = yardstick.exact[len(actual) - len(grads) + list(grads).index(i)] * value
        place = torch.unravel_index(weight.abs().argmax(), value.shape)
        for change in (0, -1):
            wrong = value.clone()
            wrong[place] = wrong[place] * change
            altered = [*values[:i], wrong, *values[i + 1 :]]
            with pytest.raises(AssertionError, match=r"error .* allowed"):
                yardstick.check(results(kernel, altered, grads, dtype))


def test_one_key_too_many_is_found():
    q, k, v, bits, open = inputs.masked_attn_inputs()
    yardstick = Yardstick(functions("masked_attn")[1], [q, k, v, bits, open])
    wrong = bits.clone()
    wrong[0, 0, 0] ^= 1
    with pytest.raises(AssertionError, match=r"error .* allowed"):
        yardstick.check([ops.masked_attn(q, k, v, wrong, open)])


def test_a_wrong_bit_is_found():
    queries, features = inputs.mask_bits_inputs()
    bits, open = ops.mask_bits(queries, features)
    product = queries[0, 0] @ features[0]
    for key in (int(product[:32].argmax()), int(product[:32].argmin())):
        wrong, count = bits.clone(), open.clone()
        was = int(bits[0, 0, 0]) >> key & 1
        wrong[0, 0, 0] ^= 1 << key if key < 31 else -(2**31)
        count[0, 0] += 1 - 2 * was
        with pytest.raises(AssertionError, match="a bit is wrong"):
            test_mask_bits.assert_bits((wrong, count), queries, features)


def test_a_wrong_label_is_found():
    values = inputs.resize_argmax_inputs()
    labels = ops.resize_argmax(*values)
    labels[0, 3, 4] = (labels[0, 3, 4] + 1) % 7
    with pytest.raises(AssertionError, match="not the likeliest"):
        test_resize_argmax.assert_labels(labels, *values)


def test_a_wrong_pair_is_found():
    cost, counts = inputs.linear_assignment_inputs(dtype=torch.float64)
    wanted = linear_assignment_reference(cost, counts)
    query, target = (t.clone() for t in ops.linear_assignment(cost, counts))
    test_linear_assignment.assert_optimal(cost, counts, (query, target), wanted)
    n = int(counts.argmax())
    query[n, :2] = query[n, :2].flip(0)
    target[n, query[n, :2]] = torch.arange(2)
    with pytest.raises(AssertionError, match="e-"):
        test_linear_assignment.assert_optimal(cost, counts, (query, target), wanted)


@pytest.mark.parametrize("option", test_segment_map.OPTIONS)
def test_a_wrong_pixel_is_found(option, monkeypatch):
    def spoiled(*args, **kwargs):
        found = ops.segment_map(*args, **kwargs)
        found.map[0, 50, 60] += 1
        return found

    monkeypatch.setattr(test_segment_map, "segment_map", spoiled)
    task, options = test_segment_map.OPTIONS[option]
    values = inputs.segment_map_inputs(kind="shapes")
    with pytest.raises(AssertionError, match="a pixel is another"):
        test_segment_map.check(values, task, test_segment_map.EASY, **options)


def test_shape_dtype_and_what_is_not_finite():
    x = torch.randn(5)
    with pytest.raises(AssertionError, match=re.escape("shape torch.Size([4])")):
        compare(lambda x: x[:4], lambda x: x * 1, [x])
    with pytest.raises(AssertionError, match=r"output 0: torch\.float64, want torch\.float32"):
        compare(lambda x: x.double(), lambda x: x * 1, [x])
    for bad in (torch.inf, torch.nan):
        with pytest.raises(AssertionError, match="finite in other places"):
            compare(lambda x, bad=bad: x.index_fill(0, torch.tensor(2), bad), lambda x: x * 1, [x])
    with pytest.raises(AssertionError, match="not the infinity of float64"):
        compare(lambda x: -x, lambda x: x * 1, [torch.full((3,), torch.inf)])
    with pytest.raises(AssertionError, match="not equal"):
        compare(lambda x: (x > 0).int() + 1, lambda x: (x > 0).int(), [x])


def test_the_allowance_knows_what_cancels():
    """Of x + y - x, with x large, y is known to the rounding of x; of y alone, to its own."""
    x, y = torch.full((1000,), 1e4), torch.randn(1000)
    yardstick = Yardstick(lambda x, y: (x + y - x, y * 1), [x, y])
    sums, alone = yardstick.moved
    assert 1e-3 < sums.median() < 2e-2  # a unit of x is 6e-4
    assert (alone.double() <= 12.001 * 2.0**-24 * y.abs()).all()


def test_the_allowance_is_the_same_each_time():
    values = inputs.masked_attn_inputs()
    first, second = (Yardstick(functions("masked_attn")[1], values).moved for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a, b)
