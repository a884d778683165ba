"""point_sample and random_points."""

import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from segkern.ops import point_sample, random_points
from segkern.ops.point_sample import point_sample_reference, random_points_reference
from support.comparison import DTYPES, compare
from support.inputs import point_sample_inputs

CASES = {
    "small": {},
    "one point": {"P": 1},
    "one pixel": {"h": 1, "w": 1},
    "wide": {"h": 3, "w": 257, "C": 5, "P": 333},
    "many channels": {"B": 1, "C": 64, "h": 32, "w": 32, "P": 300},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradient(case, dtype):
    compare(
        point_sample, point_sample_reference, point_sample_inputs(**CASES[case], dtype=dtype), [0]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["small", "one point", "one pixel", "wide"])
def test_deterministic_gradient(case, dtype):
    features, points = point_sample_inputs(**CASES[case], dtype=dtype)
    (B, C, h, w), P = features.shape, points.shape[1]
    points[:, :7] = points[:, :1]  # many in one place
    grad = torch.randn(B, C, P).to(dtype)

    def kernel(grad, points):
        return torch.ops.segkern.point_sample_backward(grad, points, h, w, True)

    def reference(grad, points):
        features = torch.zeros(B, C, h, w, dtype=grad.dtype, requires_grad=True)
        with torch.enable_grad():
            out = point_sample_reference(features, points)
        return torch.autograd.grad(out, features, grad)[0]

    compare(kernel, reference, [grad, points])
    actual = kernel(grad, points)
    assert torch.equal(actual, kernel(grad, points))
    assert torch.equal(actual[:1], kernel(grad[:1], points[:1]))


def test_deterministic_algorithms_are_asked_for(monkeypatch):
    asked = []
    features, points = point_sample_inputs()
    monkeypatch.setattr(
        sys.modules["segkern.ops.point_sample"],
        "_backward",
        lambda *args: asked.append(args[-1]) or torch.zeros_like(features),
    )
    for on in (True, False):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda on=on: on)
        point_sample(features.requires_grad_(), points).sum().backward()
    assert asked == [True, False]


def test_channels_that_share_a_program(monkeypatch):
    kernels = pytest.importorskip("segkern.kernels.point_sample", reason="no Triton")
    monkeypatch.setattr(kernels, "FILL", 1)
    compare(point_sample, point_sample_reference, point_sample_inputs(C=75), [0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
def test_masks_are_read_in_place(dtype):
    features, points = point_sample_inputs()
    masks = (features > 0).to(dtype)
    out = point_sample(masks, points)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, point_sample(masks.float(), points), rtol=0, atol=0)


def test_gradcheck():
    features, points = point_sample_inputs(B=1, C=2, h=3, w=4, P=6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: point_sample(f, points), features.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_opcheck(dtype):
    features, points = point_sample_inputs()
    torch.library.opcheck(torch.ops.segkern.point_sample, (features.to(dtype), points))
    grad = torch.randn(2, 3, 50)
    for deterministic in (False, True):
        inputs = (grad, points, 17, 23, deterministic)
        torch.library.opcheck(torch.ops.segkern.point_sample_backward, inputs)


def test_compile():
    features, points = point_sample_inputs()
    features.requires_grad_()
    compiled = torch.compile(point_sample, fullgraph=True, backend="aot_eager")
    out = compiled(features, points)
    torch.testing.assert_close(out, point_sample(features, points))
    (grad,) = torch.autograd.grad(out.sum(), features)
    torch.testing.assert_close(
        grad, torch.autograd.grad(point_sample(features, points).sum(), features)[0]
    )


def test_a_new_size_of_maps_compiles_nothing():
    compiled = CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda f, p: point_sample(f, p).square().sum(),
        fullgraph=True,
        dynamic=True,
        backend=compiled,
    )
    for h, w in ((9, 11), (12, 7), (30, 16)):
        features, points = point_sample_inputs(h=h, w=w)
        features.requires_grad_()
        got, want = (
            torch.autograd.grad(f(features, points), features)[0]
            for f in (run, lambda f, p: point_sample(f, p).square().sum())
        )
        torch.testing.assert_close(got, want)
    assert compiled.frame_count == 1


BAD = {
    "features 3-d": (lambda f, p: (f[0], p), ValueError, r"features must be \[B, C, h, w\]"),
    "features int64": (
        lambda f, p: (f.long(), p),
        TypeError,
        "features must be .* float, bool or uint8, got .* int64",
    ),
    "points 3 columns": (
        lambda f, p: (f, p.repeat(1, 1, 2)),
        ValueError,
        r"points must be \[B, P, 2\]",
    ),
    "points int": (lambda f, p: (f, p.long()), TypeError, "points must be .* float"),
    "other batch": (lambda f, p: (f, p[:1]), ValueError, "with B = 2, got"),
    "no tensor": (lambda f, p: ([1.0], p), TypeError, "features must be .* got list"),
    "other device": (
        lambda f, p: (f, p.to("meta")),
        ValueError,
        r"points must be on \S+, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        point_sample(*change(*point_sample_inputs()))


def test_unknown_impl():
    with pytest.raises(ValueError, match="impl must be 'kernel' or 'reference', got 'fast'"):
        point_sample(*point_sample_inputs(), impl="fast")


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 5, 5, 4), (2, 0, 5, 5, 4), (2, 3, 5, 5, 0)],
    ids=["no image", "no channel", "no point"],
)
def test_empty(shape):
    B, C, h, w, P = shape
    features = torch.zeros(B, C, h, w, requires_grad=True)
    out = point_sample(features, torch.zeros(B, P, 2))
    assert out.shape == (B, C, P)
    out.sum().backward()
    assert not features.grad.any()
    deterministic = torch.ops.segkern.point_sample_backward(
        torch.zeros_like(out), torch.zeros(B, P, 2), h, w, True
    )
    assert torch.equal(deterministic, features.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("C", [3, 17, 24])
def test_non_contiguous(C, dtype):
    features, points = point_sample_inputs(C=C)
    features = (9 * features).to(dtype)
    want = point_sample(features, points)
    for other in (
        features.transpose(2, 3).contiguous().transpose(2, 3),
        features.to(memory_format=torch.channels_last),
        torch.cat((features, features), 3)[..., : features.shape[3]],
    ):
        assert other.stride() != features.stride()
        assert torch.equal(point_sample(other, points), want)
    turned = points.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(point_sample(features, turned), want)


def test_gradients_that_are_not_contiguous():
    _, points = point_sample_inputs()
    for grad in (torch.randn(2, 50, 3).transpose(1, 2), torch.randn(2, 1, 50).expand(2, 3, 50)):
        for deterministic in (False, True):
            function = torch.ops.segkern.point_sample_backward
            want = function(grad.contiguous(), points, 17, 23, deterministic)
            torch.testing.assert_close(function(grad, points, 17, 23, deterministic), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_points_that_are_nowhere_read_zero(value):
    features, points = point_sample_inputs()
    points[:, 0] = value
    for impl in ("kernel", "reference"):
        assert (point_sample(features, points, impl)[:, :, 0] == 0).all()
    grad = torch.full((2, 3, 50), float("nan"))
    grad[:, :, 1:] = 0
    for deterministic in (False, True):
        out = torch.ops.segkern.point_sample_backward(grad, points, 17, 23, deterministic)
        assert (out == 0).all(), "a point that is nowhere has no gradient to give"


def test_nan_in_the_map_stays_where_it_is():
    features, points = point_sample_inputs(spread=2)
    features[:, :, 0, 0] = float("nan")
    away = (points * torch.tensor([23, 17]) - 0.5).amax(2) > 1
    assert point_sample(features, points).isfinite().all(1)[away].all()


# known answers of Philox4x32-10 (Random123): counter, key, first two words out
PHILOX = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB],
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), PHILOX, ids=["zeros", "ones", "pi"])
def test_random_points_known_answers(counter, key, want, monkeypatch):
    point, target, prediction, sample = counter
    # points are counted from 0: let arange start at the wanted counter
    monkeypatch.setattr(torch, "arange", lambda n, device=None: torch.tensor([point]))
    seed = torch.tensor(
        [
            int.from_bytes(
                key[0].to_bytes(4, "little") + key[1].to_bytes(4, "little"), "little", signed=True
            )
        ]
    )
    got = random_points_reference(seed, torch.tensor([sample, prediction, target]), 1)
    assert torch.equal(got, torch.tensor([[(w >> 8) * 2.0**-24 for w in want]]))


def test_random_points_do_not_depend_on_the_batch():
    seed, ids = torch.tensor([42]), torch.randint(0, 1000, (5, 7, 3))
    points = random_points(seed, ids, 33)
    assert points.shape == (5, 7, 33, 2)
    assert torch.equal(points[3, 2], random_points(seed, ids[3, 2], 33))
    assert torch.equal(points[:, :, :10], random_points(seed, ids, 10))
    assert points.min() >= 0
    assert points.max() < 1
    assert abs(points.mean().item() - 0.5) < 0.02


ONE, IDS = torch.tensor([1]), torch.zeros(3, dtype=torch.int64)
BAD_POINTS = {
    "seed float": (ONE.float(), IDS, 4, TypeError, r"seed must be \[1\] int64, got \[1\] float32"),
    "seed number": (1, IDS, 4, TypeError, "seed must be .* got int"),
    "seed 0-d": (ONE[0], IDS, 4, ValueError, r"seed must be \[1\] int64, got \[\] int64"),
    "seed of two": (ONE.repeat(2), IDS, 4, ValueError, "seed must be"),
    "ids float": (ONE, IDS.float(), 4, TypeError, r"ids must be \[..., 3\] int64"),
    "ids list": (ONE, [0, 0, 0], 4, TypeError, "ids must be .* got list"),
    "ids of two": (ONE, IDS[:2], 4, ValueError, r"ids must be .* got \[2\] int64"),
    "ids 0-d": (ONE, IDS[0], 4, ValueError, "ids must be"),
    "n": (ONE, IDS, -1, ValueError, "n must be at least 0, got -1"),
}


@pytest.mark.parametrize("case", BAD_POINTS)
def test_random_points_bad_input(case):
    seed, ids, n, error, message = BAD_POINTS[case]
    with pytest.raises(error, match=message):
        random_points(seed, ids, n)


def test_random_points_may_be_none():
    assert random_points(ONE, IDS, 0).shape == (0, 2)


def test_random_points_opcheck_and_compile():
    seed, ids = torch.tensor([42]), torch.randint(0, 1000, (5, 7, 3))
    torch.library.opcheck(torch.ops.segkern.random_points, (seed, ids, 9))
    compiled = torch.compile(random_points, fullgraph=True, backend="aot_eager")
    for n in (33, 12):
        want = random_points(seed, ids, n, impl="reference")
        assert torch.equal(compiled(seed, ids, n), want)
        assert torch.equal(random_points(seed, ids, n), want)
