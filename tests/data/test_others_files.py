"""Files as other tools wrote them, in tests/expected/written: LabelMe 6.3.1 with each of its usual
shapes, an export of supervision 0.31.2 as COCO and as YOLO: two boxes and a disc, maps that
cityscapesScripts 2.3.0 drew of polygons, and TIFFs of five bands by tifffile 2026.3.3."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from segkern.data import CityscapesConfig, build_dataset, find_format
from segkern.io.tiff import read_bands
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


def cityscapes(root, end):
    """A set of one picture with one of the files of its truth."""
    name = "ulm_000000_000019"
    for split in ("train", "val"):
        write(root / f"leftImg8bit/{split}/ulm/{name}_leftImg8bit.png", noise(0, (40, 64)))
        to = root / f"gtFine/{split}/ulm/{name}_gtFine_{end}"
        to.parent.mkdir(parents=True)
        shutil.copyfile(WRITTEN / f"cityscapes/{name}_gtFine_{end}", to)
    return root


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_polygons_of_cityscapes_are_what_its_scripts_draw(task, tmp_path):
    polygons, maps = (
        build_dataset(CityscapesConfig(cityscapes(tmp_path / end, end), task), "train")[0]
        for end in ("polygons.json", "instanceIds.png")
    )
    assert polygons.keys() == maps.keys()
    for name in polygons.keys() - {"path", "id"}:
        assert np.array_equal(np.asarray(polygons[name]), np.asarray(maps[name])), name
    assert len(maps["labels"]) > (2 if task == "instance" else 4)
    assert maps["crowd"].sum() == (task != "semantic")


@pytest.mark.parametrize("end", ["labelIds.png", "labelTrainIds.png", "polygons.json"])
def test_labels_of_cityscapes_are_its_train_ids(end, tmp_path):
    sample = build_dataset(CityscapesConfig(cityscapes(tmp_path, end), "semantic"), "train")[0]
    wanted = np.asarray(
        Image.open(WRITTEN / "cityscapes/ulm_000000_000019_gtFine_labelTrainIds.png")
    )
    assert np.array_equal(sample["semantic"], wanted)


@pytest.mark.parametrize("kind", ["planar", "pages", "tiled"])
def test_bands_of_a_tiff(kind):
    bands, _ = read_bands(WRITTEN / f"bands_{kind}.tif")
    wanted = np.moveaxis(np.load(WRITTEN / "bands.npy"), 0, 2)
    assert np.array_equal(bands, wanted * np.uint16(257) if kind == "pages" else wanted)
