"""Pascal Context: maps of the converter and of the original, its lists, 59 and 60 classes."""

import numpy as np
import pytest
from scipy.io import savemat

from segkern.data import PascalContextConfig, build_dataset, find_format
from segkern.structures.labels import PASCAL_CONTEXT
from support.pictures import SIZE, noise, write

VALUES = np.full(SIZE, 1, np.uint8)  # aeroplane
VALUES[:3], VALUES[5:9], VALUES[12:20, 4:30], VALUES[25:] = 0, 255, 59, 37
# of the original: nothing, aeroplane, 459, wood, person, and a class that the 59 leave out
NUMBERS = {0: 0, 1: 2, 59: 458, 37: 284, 255: 459}


def write_set(root, kind="png", names=("a", "b"), lists="ImageSets/SegmentationContext"):
    for i, name in enumerate(names):
        write(root / f"JPEGImages/{name}.jpg", noise(i))
        if kind == "png":
            write(root / f"SegmentationClassContext/{name}.png", VALUES)
        else:
            table = np.zeros(256, np.uint16)
            table[list(NUMBERS)] = list(NUMBERS.values())
            (root / "trainval").mkdir(exist_ok=True)
            savemat(root / f"trainval/{name}.mat", {"LabelMap": table[VALUES]})
    (root / lists).mkdir(parents=True, exist_ok=True)
    (root / lists / "train.txt").write_text("a\n")
    (root / lists / "val.txt").write_text("b")
    return root


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("kind", ["png", "mat"])
def test_maps(kind, background, tmp_path):
    lists = "ImageSets/SegmentationContext" if kind == "png" else "ImageSets/Main"
    config, line = find_format(write_set(tmp_path, kind, lists=lists))
    sign = {"png": "ImageSets/SegmentationContext", "mat": "trainval"}[kind]
    assert f"kind pascal_context (semantic): it has {sign}" in line
    config.background = background
    data = build_dataset(config, "train")
    labels = VALUES.copy()
    if kind == "mat":
        labels[labels == 255] = 0  # the other 400 classes are background
    if not background:
        labels = np.where((labels == 0) | (labels == 255), 255, labels.astype(int) - 1)
    assert data.classes == PASCAL_CONTEXT[not background :]
    assert len(data) == 1
    assert np.array_equal(data[0]["semantic"], labels)
    assert data[0]["labels"].tolist() == sorted({*labels.ravel().tolist()} - {255})
    if background:
        assert [data.classes[k] for k in (1, 37, 59)] == ["aeroplane", "person", "wood"]


def test_splits_are_the_lists(tmp_path):
    root = write_set(tmp_path, names=("a", "b", "c"))
    assert build_dataset(PascalContextConfig(root), "val")[0]["path"].endswith("b.jpg")
    (root / "ImageSets/SegmentationContext/train.txt").write_text("a\nz\n")
    with pytest.warns(UserWarning, match=r"JPEGImages: has no image z, which .*train.txt lists"):
        assert len(build_dataset(PascalContextConfig(root), "train")) == 1


def damaged(root):
    (root / "trainval/a.mat").write_bytes(b"MATLAB 5.0")


FAULTS = {
    "no pictures": (lambda root: None, r"JPEGImages: no such folder"),
    "no list": (
        lambda root: write(root / "JPEGImages/a.jpg", noise(0)),
        r"SegmentationContext/train.txt: no such file; it has the names",
    ),
    "no map": (
        lambda root: (write_set(root) / "SegmentationClassContext/a.png").unlink(),
        r"a.jpg: has no map .*SegmentationClassContext/a.png",
    ),
    "value": (
        lambda root: write(
            write_set(root) / "SegmentationClassContext/a.png", np.full(SIZE, 60, np.uint8)
        ),
        r"a.png: values must be 0 to 59 or 255, got 60",
    ),
    "not a mat": (
        lambda root: damaged(write_set(root, "mat")),
        r"a.mat: not a MATLAB file with a LabelMap",
    ),
    "another mat": (
        lambda root: savemat(write_set(root, "mat") / "trainval/a.mat", {"x": VALUES}),
        r"a.mat: not a MATLAB file with a LabelMap",
    ),
    "size": (
        lambda root: savemat(write_set(root, "mat") / "trainval/a.mat", {"LabelMap": [[1, 2]]}),
        r"a.mat: LabelMap must be integers >= 0 of its picture's size, \[30, 40\], got \[1, 2\]",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.filterwarnings("ignore")
def test_faults(case, tmp_path):
    make, message = FAULTS[case]
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_dataset(PascalContextConfig(tmp_path), "train")[0]
