"""Cityscapes: its four files of truth, drawn as its own tool draws them, and results in ids."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from segkern.data import CityscapesConfig, build_dataset, export_cityscapes, find_format
from segkern.ops import pack_bits
from segkern.structures.labels import CITYSCAPES
from segkern.structures.segmentation import Masks, Segment, Segmentation
from support.pictures import SIZE, noise, write

H, W = SIZE
NAMES = list(CITYSCAPES)
ULM = "ulm_000000_000019"


def box(x, y, w, h):
    return [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]


# name, value that the official tool draws, corners
OBJECTS = [
    ("road", 7, box(0, 10, W, H)),
    ("sky", 23, box(0, 0, W, 9)),
    ("car", 26000, box(2, 12, 8, 6)),
    ("car", 26001, box(12, 12, 8, 6)),
    ("cargroup", 26, box(24, 12, 10, 4)),
    ("person", 24000, box(15, 8, 3, 12)),
    ("license plate", None, box(3, 15, 2, 2)),
    ("caravan", 29000, box(30, 20, 5, 5)),
    ("ego vehicle", 1, box(0, 27, W, 5)),
    ("parking", 9, box(36, 18, 3, 3)),
]


def instance_ids():
    canvas = Image.new("I", (W, H), 0)
    for _, value, corners in OBJECTS:
        if value is not None:
            ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=value)
    return np.asarray(canvas)


def label_ids():
    values = instance_ids()
    return np.where(values >= 1000, values // 1000, values).astype(np.uint8)


def train_ids():
    table = np.full(256, 255, np.uint8)
    table[list(CITYSCAPES.values())] = range(19)
    return table[label_ids()]


def polygons(objects=OBJECTS, **more):
    rows = [{"label": name, "polygon": corners} for name, _, corners in objects]
    return json.dumps({"imgHeight": H, "imgWidth": W, "objects": rows} | more)


ENDS = ("labelTrainIds.png", "labelIds.png", "instanceIds.png", "polygons.json")


def write_set(root, ends=ENDS, text=None):
    makers = dict(zip(ENDS, (train_ids, label_ids, lambda: instance_ids().astype(np.uint16))))
    for split in ("train", "val"):
        write(root / f"leftImg8bit/{split}/ulm/{ULM}_leftImg8bit.png", noise(0))
        for end in ends:
            path = root / f"gtFine/{split}/ulm/{ULM}_gtFine_{end}"
            if end.endswith(".json"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(polygons() if text is None else text)
            else:
                write(path, makers[end]())
    return root


@pytest.mark.parametrize("end", ENDS)
def test_semantic(end, tmp_path):
    data = build_dataset(CityscapesConfig(write_set(tmp_path, [end]), "semantic"), "val")
    assert (data.classes, data.stuff) == (NAMES, tuple(range(19)))
    assert np.array_equal(data[0]["semantic"], train_ids())
    assert data[0]["labels"].tolist() == sorted({*train_ids().ravel()} - {255})
    assert data.faults == []


@pytest.mark.parametrize("end", ENDS[2:])
@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_objects(task, end, tmp_path):
    """Every region and object is a segment; a group of things is a crowd."""
    data = build_dataset(CityscapesConfig(write_set(tmp_path, [end]), task), "train")
    sample, values = data[0], instance_ids()
    names = ["road", "sky", "car", "person", "car", "car"]
    ids = [7, 23, 26, 24000, 26000, 26001]
    if task == "instance":
        names, ids = names[2:], ids[2:]
        assert data.classes == NAMES[11:]
        assert data.stuff == ()
    else:
        assert data.stuff == tuple(range(11))
        assert np.array_equal(sample["semantic"], train_ids())
    assert [data.classes[k] for k in sample["labels"]] == names
    assert np.array_equal(np.asarray(sample["masks"]), [values == i for i in ids])
    assert sample["crowd"].tolist() == [i == 26 for i in ids]


FOUND = {
    "all": (ENDS, "panoptic"),
    "polygons": (ENDS[3:], "panoptic"),
    "ids": (ENDS[1:2], "semantic"),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_task_is_what_the_folder_has(case, tmp_path):
    ends, task = FOUND[case]
    config, line = find_format(write_set(tmp_path, ends))
    assert f"kind cityscapes ({task}): it has leftImg8bit" in line
    assert config.views.size == (512, 1024)


CORNERS = {"a word": "x", "one": [[1, 1]], "far": [[1, 1], [2, 10**9], [3, 3]], "odd": [[1], [2]]}
FAULTS = {
    "unknown": ([("spaceship", 0, box(1, 1, 3, 3))], "object 1 .'spaceship'.: no such class"),
    "group": ([("spacegroup", 0, box(1, 1, 3, 3))], "object 1 .'spacegroup'.: no such class"),
    **{
        name: ([("car", 0, corners)], "object 1 .'car'.: the polygon must be pairs of numbers")
        for name, corners in CORNERS.items()
    },
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_polygons(case, tmp_path):
    objects, message = FAULTS[case]
    root = write_set(tmp_path, ENDS[3:], polygons(objects + OBJECTS))
    data = build_dataset(CityscapesConfig(root), "train")
    with pytest.warns(UserWarning, match=message):
        assert len(data[0]["labels"]) == 6


FILES = {
    "size": (polygons(imgHeight=5), r"polygons.json: must be of its picture's size, \[30, 40\]"),
    "no objects": ("{}", "polygons.json: not a JSON file of Cityscapes' polygons"),
    "a list": ("[]", "polygons.json: not a JSON file of Cityscapes' polygons"),
    "cut off": (polygons()[:50], "polygons.json: not a JSON file of Cityscapes' polygons"),
}


@pytest.mark.parametrize("case", FILES)
def test_faults_of_files(case, tmp_path):
    text, message = FILES[case]
    data = build_dataset(CityscapesConfig(write_set(tmp_path, ENDS[3:], text)), "train")
    with (
        pytest.warns(UserWarning, match="next picture"),
        pytest.raises(ValueError, match=message),
    ):
        data[0]


def test_faults_of_folders_and_values(tmp_path):
    with pytest.raises(ValueError, match="leftImg8bit/train: no such folder, where the train"):
        build_dataset(CityscapesConfig(tmp_path), "train")
    root = write_set(tmp_path)
    write(root / "leftImg8bit/train/ulm/x_leftImg8bit.png", noise(0))
    values = instance_ids().astype(np.uint16)
    values[0, 0] = 34_001
    write(root / f"gtFine/train/ulm/{ULM}_gtFine_instanceIds.png", values)
    with pytest.warns(UserWarning, match=r"x_leftImg8bit.png: has no map .*x_gtFine_instanceIds"):
        data = build_dataset(CityscapesConfig(root), "train")
    with pytest.warns(UserWarning, match="value 34001 is that of no class; left out"):
        assert len(data[0]["labels"]) == 6


def results():
    values = torch.tensor([[0, 0, 13], [11, 13, 13]], dtype=torch.int32)
    names = dict(enumerate(NAMES))
    segments = [Segment(k, k, None, 1, k > 10) for k in (0, 11, 13)]
    yield "semantic", Segmentation("semantic", values, segments, names)
    values = torch.tensor([[1, 1, 300], [2, 2, 2]], dtype=torch.int32)
    segments = [Segment(1, 0, 0.9, 2, False), Segment(300, 13, 0.8, 1, True)]
    segments.append(Segment(2, 13, 0.7, 3, True))
    yield "panoptic", Segmentation("panoptic", values, segments, names)
    masks = torch.tensor([[[1, 1, 0], [1, 1, 0]], [[0, 1, 1], [0, 1, 1]]]).bool()
    segments = [Segment(1, 0, 0.75, 4, True), Segment(2, 2, 0.5, 4, True)]
    names = dict(enumerate(NAMES[11:]))
    bits = Masks(pack_bits(masks[None])[0][0], [0, 1], 3)
    yield "instance", Segmentation("instance", values, segments, names, bits)


def test_results_are_written_in_ids(tmp_path):
    for task, result in results():
        export_cityscapes([(f"val/ulm/{ULM}_leftImg8bit.png", result)], tmp_path / task)
    values = np.asarray(Image.open(tmp_path / f"semantic/{ULM}_labelIds.png"))
    assert values.tolist() == [[7, 7, 26], [24, 26, 26]]
    rows = (tmp_path / f"instance/{ULM}.txt").read_text().splitlines()
    assert [row.split()[1:] for row in rows] == [["24", "0.750000"], ["26", "0.500000"]]
    masks = [np.asarray(Image.open(tmp_path / "instance" / row.split()[0])) > 0 for row in rows]
    assert np.array_equal(masks, results_masks())
    content = json.loads((tmp_path / "panoptic/panoptic.json").read_text())["annotations"]
    assert content[0]["image_id"] == ULM
    found = [(s["id"], s["category_id"]) for s in content[0]["segments_info"]]
    assert found == [(1, 7), (300, 26), (2, 26)]
    pixels = np.asarray(Image.open(tmp_path / "panoptic/panoptic" / content[0]["file_name"]))
    assert (pixels.astype(int) @ [1, 256, 65536]).tolist() == [[1, 1, 300], [2, 2, 2]]


def results_masks():
    return [[[True, True, False]] * 2, [[False, True, True]] * 2]


def test_results_of_other_classes_are_refused(tmp_path):
    _, result = next(results())
    result.names = {0: "road", 11: "person", 13: "spaceship"}
    with pytest.raises(ValueError, match=r"names must be those of Cityscapes' .* 'spaceship'"):
        export_cityscapes([(ULM, result)], tmp_path)
