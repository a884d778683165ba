"""COCO files with faults: each is named with its file and annotation, and the rest is read."""

import json
import os
import re
import unicodedata

import numpy as np
import pytest
from PIL import Image

from segkern.data import CocoConfig, ReadConfig, build_dataset
from support.pictures import (
    CATEGORIES,
    SEGMENTS,
    annotation,
    box,
    compressed,
    image_rows,
    instance_rows,
    noise,
    rectangle,
    write,
    write_coco,
    write_panoptic,
)

ALL = ReadConfig(val_share=0)
GOOD = annotation(1, 7, 3, box(3, 4, 10, 6))


def opened(root, task="instance", **read):
    return build_dataset(CocoConfig(root, task, read=ReadConfig(val_share=0, **read)), "train")


def segment(segmentation, **more):
    return annotation(17, 7, 3, segmentation, **more)


def without(key):
    return {k: v for k, v in segment(box(1, 1, 5, 5)).items() if k != key}


# a second annotation, what is said of it, and how many segments the picture has
ANNOTATIONS = {
    "4 numbers": (segment([[1, 2, 3, 4]]), "annotation 17: a polygon must have 6 .* got 4", 1),
    "2 numbers": (segment([[1, 2]]), "annotation 17: a polygon must have 6 .* got 2", 1),
    "odd": (segment([[1, 2, 3, 4, 5, 6, 7]]), "annotation 17: a polygon .* got 7", 1),
    "no polygon": (segment([]), r"annotation 17: segmentation must be polygons .* got \[\]", 1),
    "empty polygon": (segment([[]]), "annotation 17: a polygon must have .* got 0", 1),
    "no segmentation": (without("segmentation"), "annotation 17: segmentation .* got None", 1),
    "text": (segment([["a"] * 6]), r"annotation 17: a polygon .* got \['a'", 1),
    "NaN": (segment([[float("nan")] * 6]), r"annotation 17: a polygon .* got \[nan", 1),
    "far": (segment([[1, 1, 1e9, 1, 1, 9]]), "annotation 17: a polygon .* up to 100000", 1),
    "one of two": (
        segment([[1, 2], *box(2, 2, 5, 5)]),
        "annotation 17: .* got 2; this part is left out",
        2,
    ),
    "flat numbers": (segment([1, 1, 9, 1, 9, 9]), None, 2),
    "size turned": (
        segment(compressed(rectangle(1, 1, 5, 5).T.copy())),
        r"annotation 17: size of the run-length code must be \[30, 40\], .* got \[40, 30\]",
        1,
    ),
    "no size": (segment({"counts": "abc"}), r"annotation 17: size .* got None", 1),
    "counts too few": (
        segment({"size": [30, 40], "counts": [5, 5]}),
        "annotation 17: counts must sum to 1200, the pixels, got 10",
        1,
    ),
    "counts negative": (
        segment({"size": [30, 40], "counts": [-5, 1205]}),
        "annotation 17: counts must be text or a list of integers >= 0",
        1,
    ),
    "damaged": (
        segment({"size": [30, 40], "counts": "é\x01"}),
        "annotation 17: rle: counts hold a foreign character; left out",
        1,
    ),
    "cut off": (
        segment({"size": [30, 40], "counts": compressed(rectangle(1, 1, 5, 5))["counts"][:3]}),
        "annotation 17: rle: counts",
        1,
    ),
    "outside": (segment(box(100, 100, 5, 5)), "a.png: 1 segments without a pixel are left out", 1),
    "crowd missing": (without("iscrowd"), None, 2),
    "area missing": (without("area"), None, 2),
    "bbox missing": (without("bbox"), None, 2),
    "id missing": (without("id"), None, 2),
    "id of no kind": (segment(box(1, 1, 5, 5), id=[3]), None, 2),
    "id twice": (segment(box(1, 1, 5, 5), id=1), "annotation 1: the id is there twice; both", 2),
    "foreign picture": (
        segment(box(1, 1, 5, 5), image_id=99),
        "annotation 17: is of picture 99, which is not in the file; left out",
        1,
    ),
    "foreign category": (
        segment(box(1, 1, 5, 5), category_id=91),
        "annotation 17: is of category 91, which the table does not have; left out",
        1,
    ),
    "no category": (without("category_id"), "annotation 17: is of category None", 1),
    "ids of other types": (
        segment(box(1, 1, 5, 5), image_id="7", category_id=3.0, iscrowd=False),
        None,
        2,
    ),
}


@pytest.mark.parametrize("case", ANNOTATIONS)
def test_annotations(case, tmp_path, recwarn):
    row, message, count = ANNOTATIONS[case]
    path = write_coco(tmp_path, [GOOD, row])
    data = opened(tmp_path)
    sample, found = data.examined(0)
    assert len(sample["labels"]) == count
    assert np.array_equal(np.asarray(sample["masks"])[0], rectangle(3, 4, 10, 6))
    found = data.faults + found
    if message is None:
        assert not found
        return
    assert len(found) == 1
    assert re.search(message, found[0]), found[0]
    assert str(path) in found[0] or str(data.paths[0]) in found[0]
    data[0]
    assert any(found[0] in str(w.message) for w in recwarn)


def test_nothing_left_is_an_error_that_names_the_first(tmp_path):
    path = write_coco(tmp_path)
    for picture in (tmp_path / "train2017").iterdir():
        picture.unlink()
    with pytest.raises(ValueError, match=r"train2017/a.png: no such picture, which .*json lists"):
        opened(tmp_path)
    path.write_text(json.dumps({"images": [], "categories": CATEGORIES, "annotations": []}))
    with pytest.raises(ValueError, match="holds no picture"):
        opened(tmp_path)
    write_coco(tmp_path, [])
    with pytest.raises(ValueError, match="json: has no annotation: there is nothing to train on"):
        opened(tmp_path)


def test_boxes_alone_are_an_error(tmp_path):
    path = write_coco(tmp_path, [without("segmentation")] * 3)
    message = f"{path}: annotation 17: segmentation must be .* None; left out; none of 3 annot"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


def test_all_crowds_are_read_as_objects_and_it_is_said(tmp_path):
    path = write_coco(tmp_path, [GOOD | {"iscrowd": 1}, segment(box(1, 1, 3, 3), iscrowd=1)])
    with pytest.warns(UserWarning, match=f"{path}: every annotation is marked as a crowd"):
        data = opened(tmp_path)
    assert data[0]["crowd"].tolist() == [False, False]


@pytest.mark.parametrize(
    "ids", [(0, 3, 90), (10**12, 1, 2), (1.0, 2.0, 3.0), ("1", "2", "10"), ("b", "a", 5)], ids=str
)
def test_category_ids(ids, tmp_path):
    rows = [{"id": i, "name": f"name {i}"} for i in ids]
    marked = [annotation(k, 7, i, box(1, 1, 5, 5)) for k, i in enumerate(ids)]
    write_coco(tmp_path, marked, categories=rows)
    data = opened(tmp_path)
    assert not data.faults
    order = sorted(ids, key=lambda i: (i in ("a", "b"), i if i in ("a", "b") else float(i)))
    assert data.classes == [f"name {i}" for i in order]
    assert [data.classes[k] for k in data[0]["labels"]] == [f"name {i}" for i in ids]


TABLES = {
    "twice": ([{"id": 3, "name": "a"}, {"id": 3, "name": "b"}], "category 3 is there twice"),
    "no id": ([{"id": 3, "name": "a"}, {"name": "b"}], "category 'b' has no id; left out"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(case, tmp_path):
    rows, message = TABLES[case]
    path = write_coco(tmp_path, [GOOD], categories=rows)
    with pytest.warns(UserWarning, match=f"{path}: {message}"):
        data = opened(tmp_path)
    assert data.classes == ["a"]
    assert data[0]["labels"].tolist() == [0]


def test_another_table_in_val_is_matched_by_names(tmp_path):
    write_coco(tmp_path, categories=[{"id": 3, "name": "box"}, {"id": 90, "name": "ring"}])
    rows = [{"id": 3, "name": "ring"}, {"id": 5, "name": "hat"}]
    marked = [GOOD, segment(box(1, 1, 5, 5), category_id=5)]
    path = write_coco(tmp_path, marked, categories=rows, name="val")
    with pytest.warns(UserWarning, match="category 3 is matched with that of"):
        data = build_dataset(CocoConfig(tmp_path), "val")
    assert data.classes == ["box", "ring"]
    assert data[0]["labels"].tolist() == [1]
    assert f"{path}: category 5, 'hat', is not in" in data.faults[1]
    assert f"{path}: annotation 17: is of category 5" in data.faults[2]


def truncated(path):
    path.write_bytes(path.read_bytes()[:600])


PICTURES = {
    "missing": (lambda path: path.unlink(), "a.png: no such picture"),
    "link to nothing": (lambda path: (path.unlink(), path.symlink_to("x")), "a.png: no such"),
    "truncated": (truncated, "a.png: not a readable image"),
    "empty": (lambda path: path.write_bytes(b""), "a.png: not an image that PIL can read"),
    "no picture": (lambda path: path.write_text("<html>"), "a.png: not an image that PIL can"),
    "another size": (
        lambda path: write(path, noise(0, (31, 40))),
        r"a.png: the picture must have the size .* \[30, 40\], got \[31, 40\]",
    ),
}


@pytest.mark.parametrize("case", PICTURES)
def test_pictures(case, tmp_path):
    spoil, message = PICTURES[case]
    write_coco(tmp_path, [GOOD, segment(box(1, 1, 5, 5), image_id=9)])
    spoil(tmp_path / "train2017/a.png")
    with pytest.warns(UserWarning, match=message):
        sample = opened(tmp_path)[0]
    assert sample["path"].endswith("b.png")
    assert np.array_equal(np.asarray(sample["masks"])[0], rectangle(1, 1, 5, 5))


def test_a_huge_picture_is_read_where_it_is_allowed(tmp_path, monkeypatch):
    write_coco(tmp_path, [GOOD])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match=r"too large .* raise max_pixels"):
        opened(tmp_path)[0]
    assert opened(tmp_path, max_pixels=1200)[0]["image"].shape == (30, 40, 3)


def test_sizes_that_are_missing_are_those_of_the_pictures(tmp_path):
    rows = [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png", "height": None}]
    write_coco(tmp_path, [GOOD], rows)
    data = opened(tmp_path)
    assert not data.faults
    assert data.sizes.tolist() == [[30, 40], [30, 40]]


def test_pictures_twice_in_a_file(tmp_path):
    rows = image_rows([(7, "a.png"), (7, "b.png"), (9, "a.png")])
    write_coco(tmp_path, [GOOD], rows)
    data = opened(tmp_path)
    assert "picture 7 is there twice; the first counts" in data.faults[0]
    assert [path.name for path in data.paths] == ["a.png", "a.png"]


NAMES = {
    "accents": ("für élèves 猫.png", unicodedata.normalize("NFD", "für élèves 猫.png")),
    "backslash": ("sub/a.png", "sub\\a.png"),
    "another folder": ("sub/a.png", "/home/me/x/a.png"),
    "suffix": ("A.PNG", "A.PNG"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_files(case, tmp_path):
    name, given = NAMES[case]
    path = write_coco(tmp_path, [GOOD], image_rows([(7, name)]))
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = given
    path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")  # a BOM, too
    assert len(opened(tmp_path)[0]["labels"]) == 1


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    path = write_coco(tmp_path / "there", [GOOD])
    root = tmp_path / "set"
    (root / "annotations").mkdir(parents=True)
    os.rename(path, root / "annotations" / path.name)
    (root / "train2017").symlink_to(tmp_path / "there/train2017")
    (tmp_path / "there/train2017/again").symlink_to(tmp_path / "there")
    write(tmp_path / "there/train2017/._a.png", noise(3))
    assert len(opened(root)[0]["labels"]) == 1


TURNS = {  # orientation, size of the file's pixels, stated size, whether it is turned, said
    "stated upright": (6, (30, 40), (40, 30), True, False),
    "stated raw": (6, (30, 40), (30, 40), False, False),
    "upside down": (3, (30, 40), (30, 40), True, True),
    "square": (8, (30, 30), (30, 30), True, True),
}


@pytest.mark.parametrize("case", TURNS)
def test_turned_pictures(case, tmp_path, recwarn):
    orientation, raw, stated, turned, said = TURNS[case]
    picture = {"id": 7, "file_name": "a.png"} | dict(zip(("height", "width"), stated))
    write_coco(tmp_path, instance_rows()[:1], [picture])
    tags = Image.Exif()
    tags[274] = orientation
    Image.fromarray(noise(0, raw)).save(tmp_path / "train2017/a.png", exif=tags)
    image = opened(tmp_path)[0]["image"]
    assert (not np.array_equal(image, noise(0, raw))) == turned
    told = [w for w in recwarn if "orientation" in str(w.message)]
    assert bool(told) == said
    assert all("a.png" in str(w.message) for w in told)
    if stated == raw:
        image = opened(tmp_path, exif="raw")[0]["image"]
        assert np.array_equal(image, noise(0, raw))


FILES = {
    "no JSON": ("{", "not a readable JSON file"),
    "a list": ("[]", "must have a list of images"),
    "no categories": ('{"images": [], "annotations": []}', "must have a list of categories"),
    "empty table": ('{"images": [], "annotations": [], "categories": []}', "must have a category"),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case, tmp_path):
    text, message = FILES[case]
    path = write_coco(tmp_path)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        opened(tmp_path)


def test_files_of_a_split_that_are_missing_or_too_many(tmp_path):
    with pytest.raises(
        ValueError, match="must have one annotation file of the train split, found none"
    ):
        opened(tmp_path)
    for part in ("a", "b"):
        write_coco(tmp_path, file=f"annotations/{part}_train.json")
    with pytest.raises(
        ValueError,
        match=r"found annotations/a_train.json, .*name it with train \(train --data.train",
    ):
        opened(tmp_path)
    config = CocoConfig(tmp_path, train="annotations/a_train.json", read=ALL)
    with pytest.raises(ValueError, match="task must be 'instance', got 'panoptic'"):
        build_dataset(
            CocoConfig(tmp_path, "panoptic", train=config.train, val=config.train), "train"
        )


# changed segments, what is said, and the labels that are left
PANOPTIC = {
    "id without pixels": (
        [*SEGMENTS, {"id": 9, "category_id": 3}],
        "a.png: segment 9 has no pixel",
        [2, 0, 0, 1],
    ),
    "pixels without id": (
        SEGMENTS[:3],
        "a.png: id 16777215 is that of no segment",
        [2, 0, 0],
    ),
    "two under one colour": (
        [*SEGMENTS, {"id": 256, "category_id": 90}],
        "a.png: segment 256: the id is there twice; the first counts",
        [2, 0, 0, 1],
    ),
    "foreign category": (
        [*SEGMENTS[:3], SEGMENTS[3] | {"category_id": 8}],
        "a.png: segment 16777215: category 8 is not in the table; left out",
        [2, 0, 0],
    ),
    "id out of range": (
        [*SEGMENTS, {"id": 2**24, "category_id": 3}],
        "a.png: segment 16777216: the id must be in",
        [2, 0, 0, 1],
    ),
    "no list": ({"id": 5}, "a.png: segments_info must be a list of segments", []),
    "crowd and area missing": (
        [{k: s[k] for k in ("id", "category_id")} for s in SEGMENTS],
        None,
        [2, 0, 0, 1],
    ),
}


@pytest.mark.parametrize("case", PANOPTIC)
@pytest.mark.filterwarnings("ignore")
def test_panoptic(case, tmp_path):
    segments, message, labels = PANOPTIC[case]
    write_panoptic(tmp_path, segments)
    data = opened(tmp_path, "panoptic")
    sample, found = data.examined(0)
    assert sample["labels"].tolist() == labels
    found = data.faults + found
    assert bool(found) == (message is not None)
    assert message is None or any(message in fault for fault in found)
    assert set(np.unique(sample["semantic"])) == {*labels, 255}


def test_categories_that_do_not_say_what_they_are_are_things(tmp_path):
    rows = [{k: row[k] for k in ("id", "name")} for row in CATEGORIES]
    path = write_panoptic(tmp_path, categories=rows)
    with pytest.warns(
        UserWarning, match=f"{path}: category 90 does not say whether it is a thing"
    ):
        data = opened(tmp_path, "panoptic")
    assert data.stuff == ()


@pytest.mark.parametrize("case", ["no PNG", "no folder", "another size", "no annotation"])
@pytest.mark.filterwarnings("ignore")
def test_panoptic_files(case, tmp_path):
    path = write_panoptic(tmp_path)
    png = path.with_suffix("") / "a.png"
    if case == "another size":
        Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(png)
        with pytest.raises(
            ValueError, match=r"a.png: must have the size .* \[30, 40\], got \[3, 4\]"
        ):
            opened(tmp_path, "panoptic")[0]
        return
    png.unlink()
    message = "a.png: no such file, the segments of"
    if case == "no folder":
        png.parent.rmdir()
        message = "must have its PNGs in a folder .*; name it with masks"
    if case == "no annotation":
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"annotations": []}))
        message = "json: has no annotation: there is nothing to train on"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, "panoptic")
