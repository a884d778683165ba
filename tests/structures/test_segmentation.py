"""Results as boxes, picture, JSON and line; masks of large pictures within memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segkern.inference.segment import segment
from segkern.io import rle
from segkern.ops import pack_bits
from segkern.structures.segmentation import Masks, Segment, Segmentation
from support.models import Squares, half_bright

NAMES = {0: "sky", 1: "car"}


def instances(*masks):
    """A result of masks [H, W] bool, all of label 1; the slots lie in another order."""
    masks = torch.stack(masks)
    n = len(masks)
    bits, areas = pack_bits(masks.flip(0))[0], masks.sum((1, 2)).tolist()
    segments = [Segment(i + 1, 1, 0.5, area, True) for i, area in enumerate(areas)]
    slots = list(reversed(range(n)))
    return Segmentation(
        "instance",
        (torch.arange(1, n + 1)[:, None, None] * masks).max(0).values.int(),
        segments,
        NAMES,
        Masks(bits, slots, masks.shape[2]),
        torch.ones(n, dtype=torch.int64),
        torch.full((n,), 0.5),
    )


def rectangle(x0, y0, x1, y1, size=(40, 70)):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


BOXES = {
    "inside": [3, 5, 20, 9],
    "one pixel": [31, 7, 32, 8],
    "over a word's edge": [30, 0, 65, 40],
    "the last pixel": [69, 39, 70, 40],
    "whole": [0, 0, 70, 40],
    "no pixel": [0, 0, 0, 0],
}


def test_boxes_of_instances_are_edges_in_pixels():
    out = instances(*(rectangle(*box) for box in BOXES.values()))
    assert out.boxes.dtype == torch.int64
    assert out.boxes.tolist() == list(BOXES.values())
    assert out.above(0.9).boxes.shape == (0, 4)
    told = [s["bbox"] for s in out.to_json()["segments"]]
    assert told == [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in BOXES.values()]


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_boxes_of_a_map(task):
    found = segment(Squares(), half_bright(), task)
    assert found.boxes.tolist() == [[30, 0, 60, 40], [0, 0, 30, 40]]


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
@pytest.mark.parametrize("suffix", [".png", ".JPG", ".json"])
def test_a_result_is_saved_by_suffix(task, suffix, tmp_path):
    found = segment(Squares(), half_bright(), task)
    path = tmp_path / f"new/out{suffix}"
    found.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left
    if suffix == ".json":
        assert json.loads(path.read_text()) == found.to_json()
        return
    drawn = Image.open(path)
    assert drawn.size == found.plot().size == (600, 400)
    assert suffix != ".png" or np.array_equal(drawn, found.plot())


def test_a_result_without_picture_is_drawn_on_one(tmp_path):
    bare = instances(rectangle(*BOXES["inside"]))
    with pytest.raises(ValueError, match="plot: image must be given for a result that holds none"):
        bare.plot()
    assert bare.plot(np.zeros((40, 70, 3), np.uint8)).size == (700, 400)
    with pytest.raises(ValueError, match=r"save: path must end with \.json or as a picture does"):
        bare.save(tmp_path / "out.xyz")
    with pytest.raises(ValueError, match="plot: image"):
        bare.save(tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "labels", "line"),
    [
        ("panoptic", (1, 0, 1), "2 car, 1 sky"),
        ("instance", (5,), "1 5"),
        ("semantic", (0, 1), "car 67 %, sky 33 %"),
        ("panoptic", (), ""),
    ],
)
def test_summary(task, labels, line):
    segments = [Segment(i + 1, k, None, 10 * (i + 1), k != 0) for i, k in enumerate(labels)]
    assert Segmentation(task, torch.zeros(5, 6), segments, NAMES).summary() == line


def test_a_segment_without_pixels_has_a_box_of_zeros():
    ids = torch.zeros(4, 5, dtype=torch.int32)
    ids[1:3, 2] = 2
    segments = [Segment(i, 0, 0.5, 0, True) for i in (1, 2, 3)]
    found = Segmentation("panoptic", ids, segments)
    assert found.boxes.tolist() == [[0] * 4, [2, 1, 3, 3], [0] * 4]
    assert [s["bbox"] for s in found.to_json()["segments"]] == [[0] * 4, [2, 1, 1, 2], [0] * 4]


@pytest.mark.parametrize("shape", [(5, 33, 45), (3, 1, 64), (2, 40, 1), (0, 7, 9), (4, 6, 32)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_masks_pack_and_unpack(shape, density):
    masks = torch.rand(shape) < density
    bits, count = pack_bits(masks)
    assert (bits.dtype, bits.shape) == (torch.int32, (*shape[:2], -(-shape[2] // 32)))
    assert torch.equal(count.long(), masks.sum(-1))
    dense = Masks(bits, range(len(masks)), shape[2]).dense()
    assert torch.equal(dense, masks)
    assert dense.is_contiguous()


LARGE = """
import resource, sys, time
import torch
from segkern.structures.segmentation import Masks, Segment, Segmentation

n, H, W = 40, 1500, 2003
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

y, x = torch.arange(H)[:, None], torch.arange(W)
disc = ((y - 700) ** 2 + (x - 900) ** 2 < 600**2)
from segkern.ops import pack_bits
bits = pack_bits(disc)[0].expand(n, -1, -1).clone()
masks = Masks(bits, range(n), W)
masks[0]
before = peak()
dense = masks.dense()
print(peak() - before)
assert int(dense.sum()) == n * int(disc.sum())
segments = [Segment(i + 1, 0, 1.0, int(disc.sum()), True) for i in range(n)]
result = Segmentation("instance", torch.zeros(H, W, dtype=torch.int32), segments, masks=masks,
                      labels=torch.zeros(n, dtype=torch.int64), scores=torch.ones(n))
del dense
start = time.process_time()
told = result.to_json()["segments"]
print(time.process_time() - start)
assert told[0]["bbox"] == [301, 101, 1199, 1199], told[0]["bbox"]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_large_masks_take_their_own_memory_and_little_time():
    """40 masks of 1500 x 2003: by way of int64 it was 16 times the result."""
    assert rle._host is not None, "segkern._host was not built"
    run = subprocess.run(
        [sys.executable, "-c", LARGE],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    memory, seconds = map(float, run.stdout.split())
    assert memory < 1.5 * 40 * 1500 * 2003
    assert seconds < 0.5
