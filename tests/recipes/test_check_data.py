"""`segkern data`: what a folder holds and what is broken in it, counted and drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from segkern.cli import main
from segkern.data import FolderConfig
from segkern.evaluation.data_report import examine
from segkern.recipes.check_data import check_data
from support.pictures import annotation, noise, write, write_coco, write_panoptic


def shades(path):
    """How many colours a drawing has."""
    return len(np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0))


def test_what_is_there_and_what_is_broken(tmp_path, capsys):
    root, out = tmp_path / "set", tmp_path / "out"
    for split in ("train", "val"):
        write_coco(root, name=split)
    file = root / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"].append(annotation(77, 7, 3, [[1, 1, 2, 2]]))
    file.write_text(json.dumps(content))
    (root / "train2017/b.png").write_bytes(b"no picture")
    assert main(["data", "check", str(root), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "found data of kind coco (instance)" in printed
    assert "b.png: not an image" in printed
    report = json.loads((out / "report.json").read_text())
    assert (report["kind"], report["task"], report["usable"]) == ("coco", "instance", True)
    train, val = report["splits"]["train"], report["splits"]["val"]
    assert (train["pictures"], train["readable"], val["readable"]) == (3, 2, 3)
    assert [row["name"] for row in train["classes"]] == ["box", "ring", "ground"]
    assert sum(row["objects"] for row in val["classes"]) == val["objects"] > train["objects"] > 0
    assert val["height"] == [30, 30, 30]
    assert val["sizes"] == [[30, 40, 3]]
    assert sum(val["object_sides"]) == val["objects"]
    assert train["findings_in_all"] == len(train["findings"]) == 2
    assert any("annotation 77" in finding for finding in train["findings"])
    assert val["findings"] == []
    for name in ("train.png", "val.png", "samples.png"):
        assert shades(out / name) > 50


def test_areas_are_those_of_the_masks(tmp_path):
    """A map of classes counts its classes, a set of objects its objects."""
    for split in ("train", "val"):
        write(tmp_path / f"images/{split}/a.png", noise(1))
        labels = np.full((30, 40), 255, np.uint8)
        labels[:10], labels[10:12] = 1, 0
        write(tmp_path / f"labels/{split}/a.png", labels)
    (tmp_path / "classes.txt").write_text("road\nriver\nsky\n")
    out = tmp_path / "out"
    assert check_data(FolderConfig(tmp_path), out)
    train = json.loads((out / "report.json").read_text())["splits"]["train"]
    assert [row["objects"] for row in train["classes"]] == [1, 1, 0]
    assert train["object_side"][2] == pytest.approx((1 / 3) ** 0.5, abs=1e-3)
    assert shades(out / "samples.png") > 50


def test_many_pictures_are_read_by_processes(tmp_path):
    """The same report as of one process, in the order of the pictures."""

    class Made:
        classes, stuff, faults = ["a", "b"], (), ["first"]

        def __len__(self):
            return 70

        def examined(self, i):
            if i % 10 == 3:
                raise ValueError(f"picture {i} is broken")
            masks = np.zeros((i % 3, 8, 8 + i), np.uint8)
            masks[:, :2, :2] = 1
            image = np.zeros((8, 8 + i, 3), np.uint8)
            sample = {"image": image, "masks": masks, "labels": np.arange(i % 3) % 2}
            return sample, [f"{i}: half"] * (i == 5)

    alone, together = (examine(Made(), workers=n, progress=False) for n in (0, 2))
    assert together == alone
    assert alone["readable"] == 63
    assert alone["findings"][:3] == ["first", "picture 3 is broken", "5: half"]
    assert alone["objects"] == sum(i % 3 for i in range(70) if i % 10 != 3)


def test_what_cannot_be_used(tmp_path, capsys):
    root, out = tmp_path / "set", tmp_path / "out"
    write_panoptic(root, name="train")
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    assert main(["data", "check", str(root), "--out", str(out)]) == 2
    assert "not usable" in capsys.readouterr().out
    assert not json.loads((out / "report.json").read_text())["usable"]
    assert main(["data", "check", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_samples_as_training_sees_them(tmp_path, capsys):
    root, out = tmp_path / "set", tmp_path / "out"
    write_coco(root, name="train")
    command = ["data", "show", str(root), "--out", str(out), "--size", "48", "64", "--count", "2"]
    with pytest.warns(UserWarning, match="val split"):
        assert main(command) == 0
    assert "2 samples" in capsys.readouterr().out
    assert shades(out / "views.png") > 50
