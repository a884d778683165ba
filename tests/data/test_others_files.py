"""Files as other tools wrote them, in tests/expected/written: LabelMe 6.3.1 with each of its usual
shapes, and an export of supervision 0.31.2 as COCO and as YOLO: two boxes and a disc."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from segkern.data import build_dataset, find_format
from support.pictures import noise, write

WRITTEN = Path(__file__).parents[1] / "expected/written"


def sample_of(root):
    config, _ = find_format(root)
    config.read.val_share = 0
    data = build_dataset(config, "train")
    assert data.faults == []
    return data.classes, data[0]


@pytest.fixture
def drawn():
    """What the tool was given: the masks of the export."""
    y, x = np.ogrid[:60, :80]
    boxes = [
        (y >= 5) & (y < 25) & (x >= 8) & (x < 40),
        (y >= 30) & (y < 55) & (x >= 20) & (x < 33),
    ]
    return np.array([*boxes, (y - 30) ** 2 + (x - 60) ** 2 < 15**2])


def near(masks, drawn):
    """Polygons through the centres of a mask's border lose half a pixel at the edges."""
    masks = np.asarray(masks).astype(bool)
    joint, either = (masks & drawn).sum((1, 2)), (masks | drawn).sum((1, 2))
    assert (joint / either > 0.85).all()


def test_coco(tmp_path, drawn):
    write(tmp_path / "street.png", noise(0, (60, 80)))
    shutil.copy(WRITTEN / "coco.json", tmp_path)
    classes, sample = sample_of(tmp_path)
    assert classes == ["car", "person"]
    assert sample["labels"].tolist() == [0, 1, 0]
    official = COCO(str(WRITTEN / "coco.json"))
    want = [official.annToMask(row) for row in official.loadAnns(official.getAnnIds())]
    assert np.array_equal(np.asarray(sample["masks"]), want)
    near(sample["masks"], drawn)


def test_yolo(tmp_path, drawn):
    """Its data.yaml says nothing of folders."""
    write(tmp_path / "images/train/street.png", noise(0, (60, 80)))
    (tmp_path / "labels/train").mkdir(parents=True)
    shutil.copy(WRITTEN / "yolo.txt", tmp_path / "labels/train/street.txt")
    shutil.copy(WRITTEN / "yolo.yaml", tmp_path / "data.yaml")
    classes, sample = sample_of(tmp_path)
    assert classes == ["car", "person"]
    assert sample["labels"].tolist() == [0, 1, 0]
    near(sample["masks"], drawn)


def test_labelme(tmp_path):
    write(tmp_path / "p0.jpg", noise(0, (90, 120)))
    shutil.copy(WRITTEN / "labelme.json", tmp_path / "p0.json")
    classes, sample = sample_of(tmp_path)
    assert classes == ["cat", "dog"]
    assert sample["labels"].tolist() == [0, 1, 0, 1]  # polygon, rectangle, circle, mask
    masks = np.asarray(sample["masks"])
    assert masks.sum((1, 2)).tolist() == [611, 525, 200, 63]  # as its own shape_to_mask has them
    assert masks[1, 20:45, 60:81].all()
    assert masks[3, 62:69, 93:102].all()
