"""Annotation files with anything in any place: read as far as they go, or refused by name."""

import json
import random

import numpy as np
import pytest

from segkern.data import (
    Ade20kConfig,
    CityscapesConfig,
    CocoConfig,
    LabelMeConfig,
    ReadConfig,
    build_dataset,
)
from support.pictures import (
    in_base64,
    labelme_shape,
    noise,
    write,
    write_coco,
    write_labelme,
    write_panoptic,
)
from support.spoilt import spoil

ALL = ReadConfig(val_share=0)


def write_shapes(root):
    mask = in_base64(np.full((6, 10), 255, np.uint8))
    shapes = [
        labelme_shape("a", [[1, 1], [9, 9]], "rectangle", 1),
        labelme_shape("b", [[1, 1], [9, 9], [3, 20]]),
        labelme_shape("c", [[3, 4], [12, 9]], "mask", mask=mask),
    ]
    return write_labelme(root, shapes)


def write_polygons(root):
    write(root / "leftImg8bit/train/u/a_leftImg8bit.png", noise(0))
    path = root / "gtFine/train/u/a_gtFine_polygons.json"
    path.parent.mkdir(parents=True)
    corners = [[1, 1], [30, 1], [30, 20]]
    rows = [{"label": name, "polygon": corners} for name in ("car", "road", "cargroup")]
    path.write_text(json.dumps({"imgHeight": 30, "imgWidth": 40, "objects": rows}))
    return path


def write_full_ade20k(root):
    folder = root / "images/ADE/training/home"
    write(folder / "a.jpg", noise(0))
    write(folder / "a_seg.png", np.full((30, 40, 3), (10, 7, 1), np.uint8))
    rows = [
        {"id": i, "name_ndx": 263 + i, "name": f"thing {i}", "parts": {"part_level": 0}}
        for i in range(4)
    ]
    path = folder / "a.json"
    path.write_text(json.dumps({"annotation": {"filename": "a.jpg", "object": rows}}))
    return path


KINDS = {
    "coco": (write_coco, lambda root: CocoConfig(root, read=ALL)),
    "panoptic": (write_panoptic, lambda root: CocoConfig(root, "panoptic", read=ALL)),
    "cityscapes": (write_polygons, lambda root: CityscapesConfig(root, read=ALL)),
    "ade20k": (write_full_ade20k, lambda root: Ade20kConfig(root, "semantic", read=ALL)),
    "labelme": (write_shapes, lambda root: LabelMeConfig(root, read=ALL)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_spoilt_files(kind, tmp_path):
    make, config = KINDS[kind]
    path = make(tmp_path)
    text, rng, read = path.read_text(), random.Random(0), 0
    for _ in range(120):
        content = json.loads(text)
        spoil(content, rng)
        path.write_text(json.dumps(content))
        try:
            data = build_dataset(config(tmp_path), "train")
            assert all(data[i]["image"].shape == (30, 40, 3) for i in range(len(data)))
            read += 1
        except ValueError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
    assert 60 < read < 120
