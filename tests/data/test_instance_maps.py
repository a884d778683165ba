"""Folders with PNGs of objects: both encodings, every depth of PNG, faults by file and value."""

import warnings

import numpy as np
import pytest
from PIL import Image

from segkern.data import InstanceMapsConfig, ReadConfig, build_dataset
from support.pictures import CODED_NAMES as NAMES
from support.pictures import SIZE, id_pixels, noise, write, write_maps
from support.pictures import coded_values as coded


def opened(root, encoding="auto", split="train"):
    config = InstanceMapsConfig(root, encoding, read=ReadConfig(val_share=0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*encoding of its values")
        return build_dataset(config, split)


@pytest.mark.parametrize("end", [".png", ".PNG"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_class_and_instance(end, split, tmp_path, recwarn):
    data = opened(write_maps(tmp_path, coded().astype(np.uint16), end=end), split=split)
    assert data.classes == NAMES
    sample = data[0]
    assert sample["labels"].tolist() == [1, 0, 0, 1]
    assert sample["crowd"].tolist() == [True, False, False, False]
    want = [coded() == i for i in (2, 1001, 1002, 2001)]
    assert np.array_equal(np.asarray(sample["masks"]), want)
    assert f"/{split}/" in sample["path"]
    assert not recwarn


FORMS = {
    "8 bits": lambda values: values.astype(np.uint8),
    "16 bits": lambda values: values.astype(np.uint16) * 200,
    "colours": lambda values: id_pixels(values * 70_000),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labelled", [True, False])
def test_ids(form, labelled, tmp_path):
    values = np.unique(coded(), return_inverse=True)[1].reshape(SIZE)
    labels = np.full(SIZE, 255, np.uint8)
    labels[values == 2], labels[values == 4] = 1, 0
    labels[values == 3] = 1
    labels[2:4, 12:15] = 0  # less than half of object 3
    labels[values == 1] = 1
    names = NAMES if labelled else None
    write_maps(tmp_path, FORMS[form](values), names, labels if labelled else None)
    data = opened(tmp_path)
    sample = data[0]
    assert data.classes == (NAMES if labelled else ["object"])
    assert sample["labels"].tolist() == ([1, 1, 1, 0] if labelled else [0] * 4)
    assert np.array_equal(np.asarray(sample["masks"]), [values == i for i in range(1, 5)])


@pytest.mark.parametrize("encoding", ["class_instance", "ids"])
def test_the_encoding_is_told_and_said(encoding, tmp_path):
    values = coded().astype(np.uint16)
    names = NAMES if encoding == "class_instance" else ["one"]
    write_maps(tmp_path, values, names)
    message = f"instances/train: encoding of its values: {encoding}"
    with pytest.warns(UserWarning, match=message):
        build_dataset(InstanceMapsConfig(tmp_path), "train")


@pytest.mark.parametrize("coded_ids", [True, False])
def test_codes_without_the_names_of_their_classes(coded_ids, tmp_path, recwarn):
    write_maps(tmp_path, coded().astype(np.uint16) if coded_ids else np.eye(*SIZE, dtype=np.uint8))
    (tmp_path / "classes.txt").unlink()
    data = build_dataset(InstanceMapsConfig(tmp_path), "train")
    assert data.classes == ["object"]
    said = [
        fault for fault in data.faults if "but there is no classes.txt with the names" in fault
    ]
    assert len(said) == coded_ids
    assert any("no classes.txt" in str(warning.message) for warning in recwarn) == coded_ids
    assert not build_dataset(InstanceMapsConfig(tmp_path, "ids"), "train").faults


FAULTS = {
    "foreign class": (3001, None, "a.png: value 3001 is of class 3 of 2; left out"),
    "no label": (7, 255, "a.png: object 7 has label 255 in .*labels/train/city/a.png; left out"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_values(case, tmp_path):
    value, label, message = FAULTS[case]
    values = coded().astype(np.uint16)
    values[0, 0] = value
    labels = None
    if label is not None:
        labels = np.zeros(SIZE, np.uint8)
        labels[0, 0] = label
    data = opened(
        write_maps(tmp_path, values, labels=labels), "ids" if label else "class_instance"
    )
    with pytest.warns(UserWarning, match=message):
        assert len(data[0]["labels"]) == 4


def test_faults_of_files(tmp_path):
    with pytest.raises(ValueError, match=r"images: no such folder"):
        opened(tmp_path)
    write_maps(tmp_path, coded().astype(np.uint16))
    with pytest.raises(ValueError, match="encoding must be class_instance for 2 classes"):
        opened(tmp_path, "ids")
    write(tmp_path / "images/train/lone.png", noise(0))
    with pytest.warns(UserWarning, match=r"lone.png: has no map .*instances/train/lone.png"):
        data = opened(tmp_path)
    assert len(data) == 1
    Image.fromarray(np.zeros((3, 4), np.uint16)).save(tmp_path / "instances/train/city/a.png")
    with (
        pytest.warns(UserWarning, match="the next picture stands"),
        pytest.raises(ValueError, match=r"a.png: must have the size .* \[30, 40\], got \[3, 4\]"),
    ):
        data[0]
    (tmp_path / "instances/train/city/a.png").unlink()
    with pytest.raises(ValueError, match=r"city/a.jpg: has no map .*instances/train/city/a.png"):
        opened(tmp_path)
    write_maps(tmp_path, coded().astype(np.uint16), labels=np.zeros(SIZE, np.uint8))
    (tmp_path / "labels/train/city/a.png").unlink()
    with pytest.raises(ValueError, match=r"city/a.jpg: has no map .*labels/train/city/a.png"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="encoding must be auto, ids or class_instance"):
        InstanceMapsConfig(tmp_path, "rgb")


def test_a_map_may_be_as_large_as_its_picture(tmp_path, monkeypatch):
    """Also beyond Pillow's limit, once the picture may."""
    root = write_maps(tmp_path, coded().astype(np.uint16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    read = ReadConfig(val_share=0, max_pixels=SIZE[0] * SIZE[1])
    data = build_dataset(InstanceMapsConfig(root, "class_instance", read=read), "train")
    assert data[0]["labels"].tolist() == [1, 0, 0, 1]
