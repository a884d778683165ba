"""resize_argmax: the likeliest class of each pixel of resized class logits."""

import pytest
import torch
import torch.nn.functional as F

from segkern.ops import _bands, resize_argmax
from segkern.ops.resize_argmax import resize_argmax_reference
from support.comparison import DTYPES
from support.inputs import resize_argmax_inputs

CASES = {
    "small": {},
    "one pixel": {"h": 1, "w": 1, "H": 1, "W": 1},
    "one class": {"K": 1},
    "a tile and one": {"W": 17, "H": 3},
    "smaller": {"h": 40, "w": 50, "H": 7, "W": 9},
    "two windows": {"w": 12, "W": 90, "windows": 2},
    "many classes": {"B": 1, "K": 150, "h": 4, "w": 9, "H": 10, "W": 140},
    "nothing": {"B": 0},
}


def assert_labels(found, maps, rows, columns):
    """The exact logit of each label is the highest one, up to the rounding of the sums.

    A sum of n products in precision eps is off by at most n eps sum |a b|, here twice over.
    """
    exact = torch.einsum("yi,bkij,xj->bkyx", rows.double(), maps.double(), columns.double())
    size = torch.einsum("yi,bkij,xj->bkyx", rows.double(), maps.double().abs(), columns.double())
    assert found.dtype == torch.int32
    assert found.shape == (len(maps), len(rows), len(columns))
    if found.numel() == 0:
        return
    chosen = exact.gather(1, found[:, None].long())[:, 0]
    eps = torch.finfo(torch.promote_types(maps.dtype, torch.float32)).eps
    n = (rows != 0).sum(1).max() + (columns != 0).sum(1).max() + 1
    assert (exact.amax(1) - chosen <= 2 * n * eps * size.amax(1)).all(), "not the likeliest"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    inputs = resize_argmax_inputs(**CASES[case], dtype=dtype)
    assert_labels(resize_argmax(*inputs), *inputs)
    assert_labels(resize_argmax_reference(*inputs), *inputs)


def test_is_interpolate_and_argmax():
    maps, rows, columns = resize_argmax_inputs(dtype=torch.float64)
    want = F.interpolate(maps, size=(37, 50), mode="bilinear").argmax(1)
    assert torch.equal(resize_argmax(maps, rows, columns), want.int())


def test_reference_by_bands(monkeypatch):
    inputs = resize_argmax_inputs(dtype=torch.float64)
    whole = resize_argmax_reference(*inputs)
    for device in ("ON_CPU", "ELSEWHERE"):
        monkeypatch.setattr(_bands, device, 3 * 2 * 7 * 50)
    assert torch.equal(resize_argmax_reference(*inputs), whole)


@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_the_first_of_equals_wins_and_nan_never(impl):
    one = torch.ones(1, 1)
    for logits, label in (
        ([2.0, 3.0, 3.0, 1.0], 1),
        ([2.0, torch.nan, 3.0, torch.nan], 2),
        ([torch.nan, -1.0, torch.nan, -2.0], 1),
        ([torch.nan] * 4, 0),
        ([-torch.inf] * 4, 0),
        ([-torch.inf, torch.inf, 5.0, torch.inf], 1),
    ):
        maps = torch.tensor(logits).view(1, 4, 1, 1).expand(1, 4, 1, 1)
        assert resize_argmax(maps, one.expand(3, 1), one.expand(20, 1), impl).unique() == label


def test_strides_and_gradients():
    maps, rows, columns = resize_argmax_inputs(w=5)
    want = resize_argmax(maps, rows, columns)
    turned = maps.mT.contiguous().mT.requires_grad_()
    found = resize_argmax(turned, rows.mT.contiguous().mT, columns)
    assert torch.equal(found, want)
    assert not found.requires_grad


def test_autocast_changes_nothing():
    inputs = resize_argmax_inputs(K=40, H=9)
    for impl in ("kernel", "reference"):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            under = resize_argmax(*inputs, impl=impl)
        assert torch.equal(under, resize_argmax(*inputs, impl=impl))


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    maps, *sides = resize_argmax_inputs(dtype=dtype)
    torch.library.opcheck(torch.ops.segkern.resize_argmax, (maps, *sides))


@pytest.mark.cpu_only
def test_compile():
    inputs = resize_argmax_inputs()
    compiled = torch.compile(resize_argmax, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), resize_argmax(*inputs))


BAD = {
    "maps 3-d": (lambda m, r, c: (m[0], r, c), ValueError, r"maps must be \[B, K, h, w\] float"),
    "maps int": (lambda m, r, c: (m.int(), r, c), TypeError, "maps must be .* got .* int32"),
    "rows": (lambda m, r, c: (m, r[:, 1:], c), ValueError, r"rows must be .* with h = 5, got"),
    "columns": (lambda m, r, c: (m, r, c.mT), ValueError, r"columns must be .* with w = 6, got"),
    "no class": (lambda m, r, c: (m[:, :0], r, c), ValueError, "at least one class, got K = 0"),
    "device": (lambda m, r, c: (m, r.to("meta"), c), ValueError, "must be on .*, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        resize_argmax(*change(*resize_argmax_inputs()))
