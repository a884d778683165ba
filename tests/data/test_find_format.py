"""The format of a folder, from its files, and data sets of what was found."""

from dataclasses import asdict

import numpy as np
import pytest

from segkern.data import build_dataset, data_config, find_format
from support.pictures import coded_values as coded
from support.pictures import labelme_shape as shape
from support.pictures import (
    noise,
    write,
    write_coco,
    write_labelme,
    write_maps,
    write_panoptic,
    write_yolo,
)


def both_of_coco(root):
    write_coco(root)
    write_panoptic(root)
    (root / "annotations/captions_train2017.json").write_text('{"annotations": []}')


def maps(root, images, of_maps, names=None):
    write(root / images, noise(0))
    write(root / of_maps, np.ones((30, 40), np.uint8))
    if names:
        (root / "classes.txt").write_text("a\nb")


SETS = {  # how it is written, what is found
    "coco": (write_coco, "coco (instance): it has annotations/instances_train2017.json"),
    "panoptic": (write_panoptic, "coco (panoptic): it has annotations/panoptic_train2017.json"),
    "both": (both_of_coco, "coco (panoptic): it has annotations/panoptic_train2017.json"),
    "labelme": (
        lambda root: write_labelme(root, [shape("a", [[1, 1], [9, 9]], "rectangle")]),
        "labelme (instance): it has a.json",
    ),
    "yolo": (write_yolo, "yolo (instance): it has data.yaml"),
    "instance maps": (
        lambda root: write_maps(root, coded().astype(np.uint16)),
        "instance_maps (instance): it has images and instances",
    ),
    "plain": (
        lambda root: maps(root, "images/train/a.jpg", "labels/train/a.png", "ab"),
        "folder (plain): it has images and labels",
    ),
    "ade20k": (
        lambda root: maps(root, "images/training/a.jpg", "annotations/training/a.png"),
        "ade20k (semantic): it has annotations/training",
    ),
    "cityscapes": (
        lambda root: maps(
            root,
            "leftImg8bit/train/u/a_leftImg8bit.png",
            "gtFine/train/u/a_gtFine_labelTrainIds.png",
        ),
        "cityscapes (semantic): it has leftImg8bit",
    ),
}


@pytest.mark.parametrize("case", SETS)
@pytest.mark.filterwarnings("ignore")
def test_found(case, tmp_path):
    make, message = SETS[case]
    make(tmp_path)
    config, line = find_format(tmp_path)
    assert line == f"{tmp_path}: found data of kind {message}"
    assert build_dataset(config, "train")[0]["image"].shape == (30, 40, 3)
    assert data_config({"kind": config.kind, **asdict(config)}) == config  # as a run stores it


def test_nothing_found(tmp_path):
    (tmp_path / "a.json").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path}: holds no data set of a known format"):
        find_format(tmp_path)
    with pytest.raises(ValueError, match="none: no such folder"):
        find_format(tmp_path / "none")
    write(tmp_path / "b.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"beside images \(1 pictures are there\)"):
        find_format(tmp_path)


def test_rows_of_yolo_without_their_yaml_are_no_maps(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(
        ValueError, match=r"text files as of YOLO \(labels.*txt\), but no data.yaml"
    ):
        find_format(tmp_path)
