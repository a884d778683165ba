"""Run-length encoding against pycocotools, and back."""

import numpy as np
import pytest
from pycocotools import mask as coco

from segkern.io import rle

MAPS = {
    "random": lambda g: g.integers(0, 4, (17, 23)),
    "blocks": lambda g: np.kron(g.integers(0, 5, (4, 6)), np.ones((9, 7), int)),
    "one label": lambda g: np.ones((5, 8), int),
    "nothing": lambda g: np.zeros((5, 8), int),
    "one pixel": lambda g: np.ones((1, 1), int),
    "long runs": lambda g: np.repeat(g.integers(0, 3, (1, 40)), 900, 0),
    "stripes": lambda g: np.tile(np.arange(3), (50, 20)),
}


@pytest.fixture(params=["C++", "NumPy"])
def way(request, monkeypatch):
    if request.param == "C++":
        assert rle._host is not None, "segkern._host was not built"
    else:
        monkeypatch.setattr(rle, "_host", None)


@pytest.mark.parametrize("case", MAPS)
def test_encode_equals_pycocotools_and_decodes_back(case, way):
    labels = MAPS[case](np.random.default_rng(0)).astype(np.int32)
    ids = [3, 1, 2, 4]
    segments = rle.encode(labels, ids)
    for i, segment in zip(ids, segments):
        want = coco.encode(np.asfortranarray(labels == i, dtype=np.uint8))
        assert segment == {"size": list(labels.shape), "counts": want["counts"].decode()}
    assert np.array_equal(rle.decode(segments, ids, labels.shape), labels)


BAD = {
    "labels 3-d": (lambda: rle.encode(np.zeros((2, 2, 2), int), [1]), r"labels must be \[H, W\]"),
    "labels float": (lambda: rle.encode(np.zeros((2, 2)), [1]), "integers, got .* float64"),
    "ids twice": (lambda: rle.encode(np.zeros((2, 2), int), [1, 1]), "ids must be distinct"),
    "another size": (
        lambda: rle.decode([{"size": [3, 2], "counts": "6"}], [1], (2, 2)),
        r"size must be \[2, 2\], got \[3, 2\]",
    ),
    "too long": (lambda: rle.decode([{"size": [2, 2], "counts": "9"}], [1], (2, 2)), "exceed"),
    "too short": (lambda: rle.decode([{"size": [2, 2], "counts": "2"}], [1], (2, 2)), "not fill"),
    "foreign": (lambda: rle.decode([{"size": [2, 2], "counts": "!"}], [1], (2, 2)), "foreign"),
    "negative": (lambda: rle.decode([{"size": [2, 2], "counts": "O5"}], [1], (2, 2)), "exceed"),
    "cut off": (lambda: rle.decode([{"size": [2, 2], "counts": "P"}], [1], (2, 2)), "cut off"),
    "ids missing": (
        lambda: rle.decode([{"size": [2, 2], "counts": "4"}], [], (2, 2)),
        "as many ids",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, way):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
