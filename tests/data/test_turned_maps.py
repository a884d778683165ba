"""Pictures that their EXIF tag turns, beside maps drawn on either raster, in formats of maps."""

import numpy as np
import pytest
from PIL import Image

from segkern.data import (
    Ade20kConfig,
    CityscapesConfig,
    InstanceMapsConfig,
    PascalContextConfig,
    ReadConfig,
    build_dataset,
)
from support.pictures import noise, write

CITY = "{}/train/ulm/ulm_0_{}.png"
# settings, a picture, and its maps with one value
KINDS = {
    "instance maps": (
        lambda root, read: InstanceMapsConfig(root, "ids", read=read),
        "images/train/a.jpg",
        {"instances/train/a.png": 1},
    ),
    "labelled": (
        lambda root, read: InstanceMapsConfig(root, "ids", read=read),
        "images/train/a.jpg",
        {"instances/train/a.png": 1, "labels/train/a.png": 0},
    ),
    "ade20k": (
        lambda root, read: Ade20kConfig(root, "semantic", read=read),
        "images/training/a.jpg",
        {"annotations/training/a.png": 1},
    ),
    "cityscapes": (
        lambda root, read: CityscapesConfig(root, "semantic", read=read),
        CITY.format("leftImg8bit", "leftImg8bit"),
        {CITY.format("gtFine", "gtFine_labelIds"): 7},
    ),
    "pascal context": (
        lambda root, read: PascalContextConfig(root, read=read),
        "JPEGImages/a.jpg",
        {"SegmentationClassContext/a.png": 1},
    ),
}
# orientation, sizes of the file's pixels and of the map, whether the picture is turned, said
TURNS = {
    "map upright": (6, (40, 30), (30, 40), True, False),
    "map raw": (6, (30, 40), (30, 40), False, False),
    "upside down": (3, (30, 40), (30, 40), True, True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", TURNS)
def test_turned_pictures(case, kind, tmp_path, recwarn):
    (make, name, maps), (orientation, raw, drawn, turned, said) = KINDS[kind], TURNS[case]
    tags = Image.Exif()
    tags[274] = orientation
    path = write(tmp_path / name, noise(0, raw))
    plain = np.asarray(Image.open(path))
    Image.fromarray(noise(0, raw)).save(path, exif=tags)
    for of_map, value in maps.items():
        write(tmp_path / of_map, np.full(drawn, value, np.uint8))
    if kind == "pascal context":
        (tmp_path / "ImageSets/Main").mkdir(parents=True)
        (tmp_path / "ImageSets/Main/train.txt").write_text("a")
    sample = build_dataset(make(tmp_path, ReadConfig(val_share=0)), "train")[0]
    assert sample["image"].shape[:2] == drawn
    assert (not np.array_equal(sample["image"], plain)) == turned
    told = [str(w.message) for w in recwarn if "orientation" in str(w.message)]
    assert bool(told) == said
    if raw == drawn:
        read = ReadConfig("raw", val_share=0)
        sample = build_dataset(make(tmp_path, read), "train")[0]
        assert np.array_equal(sample["image"], plain)
