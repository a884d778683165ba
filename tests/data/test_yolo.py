"""YOLO-seg sets: polygons against pycocotools, layouts of exports, faults by file and row."""

import numpy as np
import pytest
from pycocotools import mask as coco

from segkern.data import ReadConfig, YoloConfig, build_dataset
from support.pictures import RINGS, SIZE, noise, rectangle, write, write_yolo
from support.pictures import yolo_row as row


def opened(root, split="train"):
    return build_dataset(YoloConfig(root, read=ReadConfig(val_share=0)), split)


@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_are_the_polygons(split, tmp_path, recwarn):
    data = opened(write_yolo(tmp_path), split)
    assert data.classes == ["ring", "box"]
    assert (len(data), data.stuff) == (2, ())
    empty, sample = data[0], data[1]
    assert empty["masks"].shape == (0, *SIZE)
    assert sample["labels"].tolist() == [0, 1, 0]
    assert not sample["crowd"].any()
    want = [coco.decode(coco.frPyObjects([ring], *SIZE)[0]) for ring in RINGS]
    assert np.array_equal(np.asarray(sample["masks"]), want)
    assert np.array_equal(sample["image"], noise(0))
    assert sample["path"].endswith(f"images/{split}/b.png")
    assert not [w for w in recwarn if w.category is UserWarning]


LAYOUTS = {
    "split first": ({}, "{}/images", "{}/labels"),
    "one level too high": (
        {"path": None, "train": "../train/images", "val": "../val/images"},
        *("{}/images", "{}/labels"),
    ),
    "moved": ({"path": "/not/here", "train": "images/train"}, "images/{}", "labels/{}"),
    "beside": ({}, "{}", "{}"),
    "valid": ({"val": None, "valid": "images/val"}, "images/{}", "labels/{}"),
    "folders not said": (
        {"path": None, "train": None, "val": None},
        *("images/{}", "labels/{}"),
    ),
    "folders not said, split first": ({"train": None, "val": None}, "{}/images", "{}/labels"),
    "names in a list": ({"names": ["ring", "box"]}, "images/{}", "labels/{}"),
    "folders in a list": ({"train": ["images/train"]}, "images/{}", "labels/{}"),
    "a list of names": ({"train": "train.txt", "val": "val.txt"}, "images/{}", "labels/{}"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(case, tmp_path, recwarn):
    content, pictures, labels = LAYOUTS[case]
    write_yolo(tmp_path, None, content, pictures, labels)
    for split in ("train", "val"):
        names = "".join(f"./images/{split}/{name}\n" for name in ("a.jpg", "b.png"))
        if case == "a list of names":
            (tmp_path / f"{split}.txt").write_text(names)
        data = opened(tmp_path, split)
        assert [len(data[i]["labels"]) for i in range(2)] == [0, 3]
        assert f"/{split}" in data[1]["path"]
    assert not recwarn


FAULTS = {
    "box": ("0 .5 .5 .2 .2", r"must be a polygon, got a box \(4 numbers\)"),
    "two points": ("0 .1 .1", "a polygon must have 6 numbers or more, x and y by turns, got 2"),
    "odd": ("0 .1 .1 .2 .2 .3 .3 .4", "a polygon must have 6 .* got 7"),
    "pixels": ("0 1 1 20 1 20 20", r"x and y must be in \[0, 1\], .* got 1 to 20"),
    "class": ("2 .1 .1 .2 .1 .2 .2", r"the class must be in \[0, 2\), got 2"),
    "negative": ("-1 .1 .1 .2 .1 .2 .2", r"the class must be in \[0, 2\), got -1"),
    "text": ("ring .1 .1 .2 .1 .2 .2", "must be numbers, got 'ring .1"),
    "NaN": ("0 .1 nan .2 .1 .2 .2", r"x and y must be in \[0, 1\]"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_rows(case, tmp_path):
    text, message = FAULTS[case]
    good = row(1, [8, 8, 30, 8, 30, 20, 8, 20])
    data = opened(write_yolo(tmp_path, f"{text}\n\n{good}\n"))
    path = tmp_path / "labels/train/b.txt"
    with pytest.warns(UserWarning, match=f"{path}: row 1: {message}"):
        sample = data[1]
    assert np.array_equal(np.asarray(sample["masks"]), rectangle(8, 8, 22, 12)[None])


FILES = {
    "no names": ({"names": None}, r"names must be a list, or name 0, 1, 2, \.\.\., got None"),
    "names with a gap": ({"names": {0: "a", 2: "b"}}, "names must be a list"),
    "no folder": ({"train": "nothing"}, "nothing: no such folder of pictures"),
    "no entry": ({"train": None}, "must say where the pictures are"),
}


@pytest.mark.parametrize("case", FILES)
def test_faults_of_files(case, tmp_path):
    content, message = FILES[case]
    with pytest.raises(ValueError, match=message):
        opened(write_yolo(tmp_path, None, content))


def test_no_text_file_at_all(tmp_path):
    write_yolo(tmp_path, None, {"train": "images/train"}, labels="rows/{}")
    with pytest.raises(ValueError, match=r"labels/train/a.txt: no such file, the rows of .*a.jpg"):
        opened(tmp_path)


def test_yaml_files(tmp_path):
    with pytest.raises(
        ValueError, match=r"must have one YAML file of names, data.yaml, found none"
    ):
        opened(tmp_path)
    write_yolo(tmp_path)
    (tmp_path / "other.yaml").write_text("x: 1")
    assert len(opened(tmp_path)) == 2
    (tmp_path / "data.yaml").write_text("names: [")
    with pytest.raises(ValueError, match=r"data.yaml: not a readable YAML file"):
        opened(tmp_path)


def test_a_share_is_held_out_where_there_is_no_val(tmp_path):
    write_yolo(tmp_path, None, {"val": None})
    with pytest.warns(UserWarning, match=r"data.yaml: has no val split, so 1 of its 2 pictures"):
        train = build_dataset(YoloConfig(tmp_path), "train")
    val = build_dataset(YoloConfig(tmp_path), "val")
    assert (len(train), len(val)) == (1, 1)
    assert train.paths[0] != val.paths[0]


@pytest.mark.filterwarnings("ignore")
def test_what_is_held_out_stays_so_when_the_folder_moves(tmp_path):
    names = []
    for root in (tmp_path / "a", tmp_path / "elsewhere/b"):
        write_yolo(root, None, {"val": None})
        for i in range(30):
            write(root / f"images/train/{i}.png", noise(i, (4, 4)))
        names.append([p.name for p in build_dataset(YoloConfig(root), "val").paths])
    assert names[0] == names[1]
    assert len(names[0]) == 3
