"""Maps of classes as segments: the same labels as `Folder` reads, a mask of each class."""

import numpy as np
import pytest
from PIL import Image

from segkern.data import ClassMapsConfig, Folder, FolderConfig, build_dataset
from segkern.recipes import mask2former
from support.pictures import SIZE, noise, write


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / f"images/{split}/a.jpg", noise(0))
        labels = np.full(SIZE, 2, np.uint8)
        labels[:5], labels[:, :3] = 0, 255
        write(tmp_path / f"labels/{split}/a.png", labels)
    (tmp_path / "classes.txt").write_text("ground\nnever\nroad\n")
    return tmp_path


def test_a_class_is_a_segment(root):
    sample = build_dataset(ClassMapsConfig(root), "train")[0]
    wanted = Folder(FolderConfig(root))[0]
    assert np.array_equal(sample["semantic"], wanted["semantic"])
    assert np.array_equal(sample["image"], wanted["image"])
    assert sample["labels"].tolist() == [0, 2]
    masks = np.stack([wanted["semantic"] == k for k in (0, 2)])
    assert np.array_equal(np.asarray(sample["masks"]), masks)
    assert not sample["crowd"].any()


def test_mask2former_trains_on_it(root):
    run = mask2former(root, preset="tiny")
    assert (run.data.kind, run.data.task) == ("class_maps", "semantic")
    assert run.model.id2label == {0: "ground", 1: "never", 2: "road"}
    assert run.model.stuff == (0, 1, 2)
    assert run.data.views.short_sides == ()  # views of a small model's size show small pictures
    with pytest.raises(ValueError, match="must hold objects for task instance"):
        mask2former(root, task="instance", preset="tiny")


def test_a_map_of_another_size_is_named(root):
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(root / "labels/train/a.png")
    data = build_dataset(ClassMapsConfig(root), "train")
    with (
        pytest.warns(UserWarning, match=r"a.png"),
        pytest.raises(ValueError, match="no picture is left"),
    ):
        data[0]


def test_a_layout_that_is_none(root):
    with pytest.raises(ValueError, match="layout must be one of"):
        ClassMapsConfig(root, layout="voc")
