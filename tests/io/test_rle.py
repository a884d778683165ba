"""Run-length encoding against pycocotools, and back."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from segkern.io import rle
from segkern.ops import pack_bits

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


COUNTS = {
    "text": lambda mask: coco.encode(mask)["counts"].decode(),
    "bytes": lambda mask: coco.encode(mask)["counts"],
    "list": lambda mask: rle._runs(mask.astype(bool)),
    "tuple": lambda mask: tuple(rle._runs(mask.astype(bool))),
    "array": lambda mask: np.array(rle._runs(mask.astype(bool)), np.uint32),
    "numpy ints": lambda mask: [np.int64(n) for n in rle._runs(mask.astype(bool))],
}


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("case", MAPS)
def test_decode_takes_every_kind_of_counts(kind, case, way):
    mask = np.asfortranarray(MAPS[case](np.random.default_rng(1)) == 1, dtype=np.uint8)
    segment = {"size": list(mask.shape), "counts": COUNTS[kind](mask)}
    assert np.array_equal(rle.decode([segment], [7], mask.shape), 7 * mask)
    if isinstance(segment["counts"], list):
        segment["counts"] = [int(n) for n in segment["counts"]]  # pycocotools takes no others
        assert np.array_equal(coco.decode(coco.frPyObjects(segment, *mask.shape)), mask)


@pytest.mark.parametrize("shape", [(3, 17, 23), (2, 1, 40), (2, 40, 1), (2, 9, 64), (1, 5, 33)])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
def test_packed_masks_equal_pycocotools(shape, density, way):
    masks = np.random.default_rng(0).random(shape) < density
    masks[0, -1, -1] |= density > 0
    bits = pack_bits(torch.from_numpy(masks))[0].numpy()
    want = [coco.encode(np.asfortranarray(m, dtype=np.uint8))["counts"].decode() for m in masks]
    assert rle.encode_bits(bits, shape[2]) == [
        {"size": list(shape[1:]), "counts": c} for c in want
    ]


@pytest.mark.parametrize("shape", [(2, 0, 5), (0, 4, 5), (2, 4, 0)])
def test_masks_without_pixels(shape, way):
    bits = np.zeros((*shape[:2], -(-shape[2] // 32)), np.int32)
    codes = rle.encode_bits(bits, shape[2])
    assert codes == shape[0] * [{"size": list(shape[1:]), "counts": ""}]


BAD = {
    "labels too large": (lambda: rle.encode(np.full((2, 2), 2**32 + 1), [1]), "must fit int32"),
    "bits of another width": (
        lambda: rle.encode_bits(np.zeros((1, 2, 2), np.int32), 32),
        r"bits must be \[n, H, 1\] int32 for width 32, got \(1, 2, 2\) int32",
    ),
    "negative list": (
        lambda: rle.decode([{"size": [2, 2], "counts": [5, -1]}], [1], (2, 2)),
        "exceed",
    ),
    "bytes that are no text": (
        lambda: rle.decode([{"size": [2, 2], "counts": b"\xff\xfe"}], [1], (2, 2)),
        "foreign",
    ),
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
    "counts beyond 64 bits": (
        lambda: rle.decode([{"size": [2, 2], "counts": [2**63]}], [1], (2, 2)),
        "counts must fit int64, got values of 9223372036854775808",
    ),
    "ids beyond 32 bits": (
        lambda: rle.decode([{"size": [2, 2], "counts": "4"}], [2**40], (2, 2)),
        "ids must fit int32, got values of 1099511627776",
    ),
    "size of nothing": (
        lambda: rle.decode([{"size": None, "counts": "4"}], [1], (2, 2)),
        r"size must be \[2, 2\], got None",
    ),
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


@pytest.mark.parametrize("counts", [None, 4, 4.0, [4.0], [[4]], [[4], 1], ["4"], {"4"}], ids=repr)
def test_counts_of_no_kind(counts, way):
    message = "rle.decode: counts must be (text, bytes or )?a list of integers, got"
    with pytest.raises(TypeError, match=message):
        rle.decode([{"size": [2, 2], "counts": counts}], [1], (2, 2))


@pytest.mark.parametrize("segment", [[[0, 0, 1, 1]], {"counts": "4"}, {"size": [2, 2]}], ids=repr)
def test_segments_of_no_kind(segment, way):
    with pytest.raises(TypeError, match="segments must be dicts of size and counts, got"):
        rle.decode([segment], [1], (2, 2))
