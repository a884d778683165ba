"""ADE20K: the challenge's folders and the full set, written as they are laid out."""

import json
import shutil

import numpy as np
import pytest

from segkern.data import Ade20kConfig, build_dataset, find_format
from segkern.structures.labels import ADE20K, DATASETS
from support.pictures import SIZE, noise, write

BED, CHAIR, SKY, WALL = (ADE20K.index(name) for name in ("bed", "chair", "sky", "wall"))


def classes_of():
    """Values of a picture: nothing, wall, sky, a bed and chairs, one of which is no object."""
    values = np.full(SIZE, WALL + 1, np.uint8)
    values[:2], values[2:8], values[10:16, 4:20], values[20:26] = 0, SKY + 1, BED + 1, CHAIR + 1
    return values


def objects_of():
    """Red 1 is bed, 8 is chair; the bed covers some wall, too."""
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[10:17, 4:20] = 1, 3, 0
    pixels[20:26, :10] = 8, 1, 0
    pixels[20:26, 15:25] = 8, 2, 0
    return pixels


def challenge(root, splits=("training", "validation"), kinds=("", "_instance")):
    for split in splits:
        write(root / f"images/{split}/ADE_1.jpg", noise(0))
        maps = {"": classes_of(), "_instance": objects_of()}
        for kind in kinds:
            write(root / f"annotations{kind}/{split}/ADE_1.png", maps[kind])
    return root


def masks_of(sample):
    return np.asarray(sample["masks"]).astype(bool)


def test_semantic(tmp_path):
    data = build_dataset(Ade20kConfig(challenge(tmp_path), "semantic"), "val")
    sample, values = data[0], classes_of()
    assert data.classes == ADE20K
    assert data.stuff == tuple(range(150))
    assert np.array_equal(sample["semantic"], np.where(values == 0, 255, values - np.uint8(1)))
    assert sample["labels"].tolist() == [WALL, SKY, BED, CHAIR]
    assert np.array_equal(masks_of(sample), [values == k + 1 for k in (WALL, SKY, BED, CHAIR)])


def test_instance(tmp_path):
    data = build_dataset(Ade20kConfig(challenge(tmp_path), "instance"), "train")
    sample, pixels = data[0], objects_of()
    assert len(data.classes) == 100
    assert (data.stuff, "semantic" in sample) == ((), False)
    assert [data.classes[k] for k in sample["labels"]] == ["chair", "chair", "bed"]
    assert np.array_equal(masks_of(sample), [pixels[..., 1] == i for i in (1, 2, 3)])
    assert not sample["crowd"].any()


def test_panoptic_is_that_of_the_converter(tmp_path):
    """Stuff is pasted first, then objects over it; a chair that is no object is nothing."""
    data = build_dataset(Ade20kConfig(challenge(tmp_path)), "train")
    sample, values, pixels = data[0], classes_of(), objects_of()
    assert len(data.things) == 100
    assert {BED, CHAIR} <= {*data.things}
    assert {SKY, WALL} <= {*data.stuff}
    want = [(int(k), pixels[..., 1] == i) for i, k in ((1, CHAIR), (2, CHAIR), (3, BED))]
    want += [(k, (values == k + 1) & (pixels[..., 1] == 0)) for k in (WALL, SKY)]
    assert sample["labels"].tolist() == [k for k, _ in want]
    assert np.array_equal(masks_of(sample), [mask for _, mask in want])
    # what is measured as semantic are the regions, as they are annotated
    assert (sample["semantic"][20:26] == CHAIR).all()
    assert (sample["semantic"][16, 4:20] == WALL).all()
    assert (sample["semantic"][:2] == 255).all()


def test_the_table_of_things_is_that_of_both_challenges():
    facts = DATASETS["ade20k"]
    assert sorted((*facts.things, *facts.stuff)) == list(range(150))
    assert [ADE20K[k] for k in facts.things[:6]] == [
        "bed",
        "windowpane",
        "cabinet",
        "person",
        "door",
        "table",
    ]
    assert [ADE20K[k] for k in facts.things[-3:]] == ["glass", "clock", "flag"]


def test_names_are_those_of_the_list(tmp_path):
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    rows += [f"{k} \t0.1\t5\t1\t0\tthing {k}, other" for k in range(1, 151)]
    (challenge(tmp_path) / "objectInfo150.txt").write_text("\n".join(rows))
    assert build_dataset(Ade20kConfig(tmp_path), "val").classes[:2] == ["thing 1", "thing 2"]


FOUND = {
    "both": (("", "_instance"), "panoptic"),
    "classes": (("",), "semantic"),
    "objects": (("_instance",), "instance"),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_task_is_what_the_folder_has(case, tmp_path):
    kinds, task = FOUND[case]
    config, line = find_format(challenge(tmp_path, kinds=kinds))
    assert f"kind ade20k ({task})" in line
    side = 512 if task == "semantic" else 640  # as the paper's recipes
    assert (config.views.size, config.views.long_side) == ((side, side), 4 * side)
    assert config.views.short_sides == tuple(side * tenths // 10 for tenths in range(5, 21))
    assert len(build_dataset(config, "train")[0]["labels"]) > 0


def convert(root):
    """What Mask2Former's converter makes of the challenge's maps: one JSON a split, PNGs of ids.

    Categories count from 0; stuff is pasted first, things that are no object are left out, the
    red of an object's class is its place among the 100; ids are drawn by colour, in any order.
    """
    facts = DATASETS["ade20k"]
    for name in ("train", "val"):
        pixels, segments, ids = np.zeros((*SIZE, 3), np.uint8), [], iter((7907, 3, 70000, 256, 9))
        values, objects = classes_of().astype(int) - 1, objects_of().astype(int)
        parts = [(int(k), values == k) for k in np.unique(values) if k in facts.stuff]
        for i in np.unique(objects[..., 1])[1:]:
            mask = objects[..., 1] == i
            parts.append((facts.things[int(objects[mask][0, 0]) - 1], mask))
        for k, mask in parts:
            i = next(ids)
            pixels[mask] = i % 256, i // 256 % 256, i // 65536
            rows, columns = np.nonzero(mask)
            x, y = int(columns.min()), int(rows.min())
            corner = [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1]
            area = int(mask.sum())
            row = {"id": i, "category_id": k, "area": area, "bbox": corner, "iscrowd": 0}
            segments.append(row)
        write(root / f"ade20k_panoptic_{name}/ADE_1.png", pixels)
        image = {"id": "ADE_1", "file_name": "ADE_1.jpg", "width": SIZE[1], "height": SIZE[0]}
        row = {"image_id": "ADE_1", "file_name": "ADE_1.png", "segments_info": segments}
        kinds = [
            {"id": k, "name": ADE20K[k], "isthing": int(k in facts.things), "color": [k, 0, 0]}
            for k in range(150)
        ]
        content = {"images": [image], "annotations": [row], "categories": kinds}
        (root / f"ade20k_panoptic_{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("kinds", [(), ("",), ("_instance",), ("", "_instance")], ids=str)
def test_the_converters_files_give_the_same_truth(kinds, tmp_path):
    """With the labels of checkpoints: things and stuff in the order of the challenge."""
    root = challenge(tmp_path, kinds=("", "_instance"))
    whole = build_dataset(Ade20kConfig(root), "val")[0]
    convert(root)
    for kind in {"", "_instance"} - {*kinds}:
        shutil.rmtree(root / f"annotations{kind}")
    config, line = find_format(root)
    data = build_dataset(config, "train")
    assert (data.classes, data.stuff) == (ADE20K, DATASETS["ade20k"].stuff)
    assert (config.task, config.views.size) == ("panoptic", (640, 640))
    assert config.kind == ("ade20k" if len(kinds) == 2 else "coco")
    assert line.endswith("annotations_instance/training" if len(kinds) == 2 else "_train.json")
    found = build_dataset(config, "val")[0]
    assert sorted(found["labels"].tolist()) == sorted(whole["labels"].tolist())
    for label, mask in zip(found["labels"], masks_of(found)):
        same = masks_of(whole)[whole["labels"] == label]
        assert (same == mask).all((1, 2)).sum() == 1


def test_faults(tmp_path):
    root = challenge(tmp_path)
    write(root / "images/training/ADE_2.jpg", noise(1))
    pixels = objects_of()
    pixels[0, 0] = 101, 9, 0
    write(root / "annotations_instance/training/ADE_1.png", pixels)
    with pytest.warns(
        UserWarning, match=r"ADE_2.jpg: has no map .*annotations/training/ADE_2.png"
    ):
        data = build_dataset(Ade20kConfig(root), "train")
    with pytest.warns(UserWarning, match=r"ADE_1.png: object 9 is of class 101.*left out"):
        assert len(data[0]["labels"]) == 5
    values = classes_of()
    values[0, 0] = 151
    write(root / "annotations/validation/ADE_1.png", values)
    data = build_dataset(Ade20kConfig(root, "semantic"), "val")
    with (
        pytest.warns(UserWarning, match="next picture"),
        pytest.raises(ValueError, match=r"ADE_1.png: values must be 0 to 150 or 255, got 151"),
    ):
        data[0]
    with pytest.raises(ValueError, match=r"annotations_instance/training: no such folder, which"):
        build_dataset(Ade20kConfig(challenge(tmp_path / "b", kinds=("",))), "train")
    with pytest.raises(ValueError, match="task must be panoptic, instance or semantic, got 'pan'"):
        Ade20kConfig(root, "pan")


def full(root, foreign=False, rows=None):
    """Two pictures of the full set; classes 2978 and 687, and part 12 of an object."""
    names = {2978: "wall", 687: "chair", 300: "lid"}
    for split in ("training", "validation"):
        folder = root / f"images/ADE/{split}/home/bed_room"
        write(folder / "ADE_1.jpg", noise(0))
        classes, objects = np.full(SIZE, 2978), np.ones(SIZE)
        classes[10:20], objects[10:20, :20], objects[10:20, 20:] = 687, 2, 3
        classes[:2] = 0
        if foreign:
            classes[2:4] = 5
        pixels = np.stack([classes // 256 * 10, classes % 256, objects], -1).astype(np.uint8)
        write(folder / "ADE_1_seg.png", pixels)
        write(folder / "ADE_1_parts_1.png", pixels)
        write(folder / "ADE_1/instance_000_ADE_1.png", np.full(SIZE, 255, np.uint8))
        found = [
            {"id": i, "name_ndx": k, "name": names[k], "parts": {"part_level": level}}
            for i, (k, level) in enumerate([(2978, 0), (687, 0), (687, 0), (300, 1)])
        ]
        content = {
            "annotation": {"filename": "ADE_1.jpg", "object": found if rows is None else rows}
        }
        (folder / "ADE_1.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_full(task, tmp_path):
    _, line = find_format(full(tmp_path))
    assert "kind ade20k (semantic): it has pictures of the full set" in line
    data = build_dataset(Ade20kConfig(tmp_path, task), "train")
    assert data.classes == ["chair", "wall"]
    assert len(data) == 1
    sample = data[0]
    objects = np.zeros(SIZE, int)
    objects[2:], objects[10:20, :20], objects[10:20, 20:] = 1, 2, 3
    if task == "instance":
        assert sample["labels"].tolist() == [0, 0, 1]
        assert np.array_equal(masks_of(sample), [objects == i for i in (2, 3, 1)])
    else:
        assert np.array_equal(sample["semantic"], np.array([255, 1, 0, 0])[objects])


def test_faults_of_the_full_set(tmp_path):
    with pytest.raises(
        ValueError, match="the full set does not say which classes have no objects"
    ):
        build_dataset(Ade20kConfig(full(tmp_path)), "train")
    data = build_dataset(Ade20kConfig(full(tmp_path, foreign=True), "semantic"), "train")
    with pytest.warns(UserWarning, match="class 5 occurs in no JSON of the training split"):
        assert (data[0]["semantic"][2:4] == 255).all()
    with pytest.raises(ValueError, match="no JSON of the training split names a class"):
        build_dataset(Ade20kConfig(full(tmp_path, rows=[]), "semantic"), "train")
