"""LabelMe's files by its schema: every kind of shape, groups, pictures, and faults by name."""

import numpy as np
import pytest

from segkern.data import LabelMeConfig, ReadConfig, build_dataset
from support.pictures import SIZE, in_base64, noise, rectangle, write_labelme
from support.pictures import labelme_shape as shape

Y, X = np.indices(SIZE)


def opened(root, **settings):
    return build_dataset(LabelMeConfig(root, read=ReadConfig(val_share=0), **settings), "train")


def disc(x, y, r):
    return (X - x) ** 2 + (Y - y) ** 2 <= r**2


# kind, points, what LabelMe fills
SHAPES = {
    "polygon": ("polygon", [[3, 4], [12, 4], [12, 9], [3, 9]], rectangle(3, 4, 10, 6)),
    "no kind": (None, [[3, 4], [12, 4], [12, 9], [3, 9]], rectangle(3, 4, 10, 6)),
    "rectangle": ("rectangle", [[3, 4], [12, 9]], rectangle(3, 4, 10, 6)),
    "rectangle turned": ("rectangle", [[12, 9], [3, 4]], rectangle(3, 4, 10, 6)),
    "oriented": (
        "oriented_rectangle",
        [[3, 4], [12, 4], [12, 9], [3, 9]],
        rectangle(3, 4, 10, 6),
    ),
    "circle": ("circle", [[20, 15], [20, 22]], disc(20, 15, 7)),
    "point": ("point", [[20, 15]], disc(20, 15, 5)),
    "line": ("line", [[5, 15], [34, 15]], rectangle(5, 10, 30, 10)),
    "linestrip": ("linestrip", [[5, 15], [20, 15], [34, 15]], rectangle(5, 10, 30, 10)),
    "mask": ("mask", [[3, 4], [12, 9]], rectangle(3, 4, 10, 6)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case, tmp_path, recwarn):
    kind, points, want = SHAPES[case]
    more = {"mask": in_base64(np.full((6, 10), 255, np.uint8))} if kind == "mask" else {}
    write_labelme(tmp_path, [shape("thing", points, kind, **more)])
    sample = opened(tmp_path)[0]
    assert not recwarn
    (found,) = np.asarray(sample["masks"])
    # of round shapes and broad lines the rim is Pillow's
    assert (found != want).sum() <= (0 if want.sum() == 60 else 0.25 * want.sum())
    assert np.array_equal(sample["image"], noise(0))
    assert (sample["labels"].tolist(), sample["crowd"].tolist()) == ([0], [False])


def test_shapes_of_one_name_and_group_are_one_instance(tmp_path):
    corners = [[1, 1], [4, 4]], [[10, 10], [14, 14]], [[20, 20], [24, 24]], [[30, 5], [34, 9]]
    names = [("b", 1), ("b", 1), ("a", 1), ("b", None)]
    shapes = [shape(n, c, "rectangle", g) for c, (n, g) in zip(corners, names)]
    write_labelme(tmp_path, shapes)
    data = opened(tmp_path)
    assert data.classes == ["a", "b"]
    sample = data[0]
    assert sample["labels"].tolist() == [1, 0, 1]
    both = rectangle(1, 1, 4, 4) | rectangle(10, 10, 5, 5)
    assert np.array_equal(np.asarray(sample["masks"])[0], both)


def test_classes_are_those_of_both_splits_or_of_a_list(tmp_path):
    write_labelme(tmp_path / "train", [shape("b", [[1, 1], [4, 4]], "rectangle")])
    rows = [shape(n, [[1, 1], [4, 4]], "rectangle") for n in ("c", "a", "__ignore__")]
    write_labelme(tmp_path / "val", rows)
    train, val = (build_dataset(LabelMeConfig(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == ["a", "b", "c"]
    assert (len(train), len(val), val[0]["labels"].tolist()) == (1, 1, [2, 0])
    (tmp_path / "labels.txt").write_text("\ufeff__ignore__\n_background_\nc\nb\n", "utf-8")
    with pytest.warns(UserWarning, match="labels.txt: does not name 'a', which occurs"):
        val = build_dataset(LabelMeConfig(tmp_path), "val")
    assert (val.classes, val[0]["labels"].tolist()) == (["c", "b"], [0])


def test_a_share_is_held_out_where_there_is_no_val(tmp_path):
    for i in range(20):
        write_labelme(tmp_path, [GOOD], f"{i}")
    with pytest.warns(UserWarning, match="has no val split, so 2 of its 20 pictures"):
        train = build_dataset(LabelMeConfig(tmp_path), "train")
    val = build_dataset(LabelMeConfig(tmp_path), "val")
    assert (len(train), len(val), set(train.paths) & set(val.paths)) == (18, 2, set())


PATHS = {
    "backslashes": {"imagePath": "..\\pictures\\a.png"},
    "of another machine": {"imagePath": "C:\\me\\a.png"},
    "missing": {"imagePath": None},
    "embedded": {"imageData": in_base64(noise(0)), "picture": False},
    "another suffix": {"imagePath": "a.bmp"},
    "no size": {"imageHeight": None, "imageWidth": None},
}


@pytest.mark.parametrize("case", PATHS)
def test_pictures_are_found(case, tmp_path, recwarn):
    write_labelme(tmp_path, [shape("a", [[1, 1], [4, 4]], "rectangle")], **PATHS[case])
    sample = opened(tmp_path)[0]
    assert np.array_equal(sample["image"], noise(0))
    assert len(sample["labels"]) == 1
    assert not recwarn


GOOD = shape("a", [[3, 4], [12, 9]], "rectangle")
FAULTS = {
    "no points": (
        shape("b", []),
        r"shape 2 \('b'\): a polygon must have 3 points or more, got \[\]",
    ),
    "null points": (shape("b", None), r"shape 2 \('b'\): a polygon must have .*, got None"),
    "two points": (shape("b", [[1, 2], [3, 4]]), r"shape 2 \('b'\): a polygon must have 3 points"),
    "one corner": (
        shape("b", [[1, 2]], "rectangle"),
        r"shape 2 \('b'\): a rectangle must have 2 p",
    ),
    "odd point": (shape("b", [[1], [2, 3], [3, 4]]), r"shape 2 \('b'\): points must be pairs"),
    "text": (shape("b", [["x", 1]] * 3), r"shape 2 \('b'\): points must be pairs of num"),
    "another kind": (
        shape("b", [[1, 2]], "spline"),
        r"shape 2 \('b'\): shape_type must be one of",
    ),
    "no label": (shape(None, [[1, 2]], "point"), r"shape 2 \(None\): must have a label"),
    "no mask": (
        shape("b", [[1, 2], [3, 4]], "mask"),
        r"shape 2 \('b'\): a mask must have its pic",
    ),
    "damaged mask": (
        shape("b", [[1, 2], [3, 4]], "mask", mask="AAAA"),
        "the mask of 'b' is not a picture in base64",
    ),
    "outside": (shape("b", [[99, 99], [120, 120]], "rectangle"), "1 segments without a pixel"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_shapes(case, tmp_path):
    bad, message = FAULTS[case]
    write_labelme(tmp_path, [GOOD, bad])
    with pytest.warns(UserWarning, match=rf"{tmp_path}/a\.(json|png): {message}"):
        sample = opened(tmp_path)[0]
    assert np.array_equal(np.asarray(sample["masks"]), rectangle(3, 4, 10, 6)[None])


FILES = {
    "no JSON": (lambda path: path.write_text("{"), "not a readable JSON file"),
    "empty": (lambda path: path.write_text(""), "not a readable JSON file"),
    "another": (lambda path: path.write_text('{"images": []}'), "must have a list of shapes"),
    "no picture": (
        lambda path: path.with_suffix(".png").unlink(),
        "its picture 'b.png' is not th",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_faults_of_files(case, tmp_path):
    spoil, message = FILES[case]
    write_labelme(tmp_path, [GOOD])
    spoil(write_labelme(tmp_path, [GOOD], "b"))
    (tmp_path / "._a.json").write_bytes(b"\0\5\26\7")  # as some systems leave beside each file
    with pytest.warns(UserWarning, match=f"{tmp_path}/b.json: {message}"):
        data = opened(tmp_path)
    assert len(data) == 1
    (tmp_path / "a.json").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/b.json: {message}"):
        opened(tmp_path)


def test_no_shape_is_left(tmp_path):
    path = write_labelme(tmp_path, [shape("b", [])])
    with pytest.raises(
        ValueError, match=rf"{path}: shape 1 \('b'\): a polygon must have 3 points"
    ):
        opened(tmp_path)
    write_labelme(tmp_path, [])
    with pytest.raises(ValueError, match="no file has a shape with a label"):
        opened(tmp_path)


def test_pictures_without_a_file_are_counted(tmp_path):
    for name in "abcd":
        write_labelme(tmp_path, [shape("b", [[1, 1], [9, 1], [9, 9]])], name)
    (tmp_path / "b.json").unlink()
    (tmp_path / "d.json").unlink()
    with pytest.warns(
        UserWarning, match=r"b.png: has no JSON beside it \(2 pictures have none\); left out"
    ):
        data = opened(tmp_path)
    assert len(data) == 2
    assert not build_dataset(LabelMeConfig(tmp_path), "val").faults  # said once


def test_folders_without_a_file(tmp_path):
    with pytest.raises(ValueError, match="holds no JSON of LabelMe"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="none: no such folder"):
        opened(tmp_path / "none")
