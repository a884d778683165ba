"""Folders of pictures and of PNGs whose values tell objects apart.

    images/train/NAME.jpg, instances/train/NAME.png; the same of val; classes.txt, a name a line

Values are, by `encoding`,
    class_instance  1000 times the class plus the object's number, classes from 1 in the order of
                    classes.txt; a class alone, below 1000, is a region of many objects (a crowd)
    ids             any number an object, or a colour an object; its class is that of most of its
                    pixels in labels/train/NAME.png, a map of labels, or the only one there is
0 is nothing. PNGs are of 8 or 16 bits, or of colours, an id in each.
Source: the instanceIds of Cityscapes (Cordts et al., CVPR 2016), without its ids of classes.
"""

import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from ..structures.labels import VOID
from .maps import MapSizes, maps_below, name_below, paired, read_ids
from .pictures import (
    SPLITS,
    FlatPaths,
    Pictures,
    ReadConfig,
    Truth,
    expect_split,
    held_out,
    pictures_below,
    settle,
)
from .sample import IdMaps, distinct
from .views import InstanceViews, ViewConfig

_STEP = 1000
_LOOKED_AT = 20  # maps from which the encoding is told
_FEW = 64  # classes, whose values are taken for codes and not for numbers or colours
Encoding = Literal["auto", "ids", "class_instance"]


@dataclass
class InstanceMapsConfig:
    """Pictures and maps of objects in folders.

    Attributes:
        root: folder of all.
        encoding: what the values are; "auto" looks at the first maps, and says what it took.
        seed: other seeds give other views.
        read: how files are read.
        views: of the training pictures.
    """

    kind: ClassVar[str] = "instance_maps"
    task: ClassVar[str] = "instance"
    targets: ClassVar[tuple[str, ...]] = ("masks",)

    root: Path = Path(".")
    encoding: Encoding = "auto"
    seed: int = 0
    read: ReadConfig = field(default_factory=ReadConfig)
    views: ViewConfig = field(default_factory=ViewConfig)

    def __post_init__(self):
        settle(self)
        if self.encoding not in ("auto", "ids", "class_instance"):
            raise ValueError(
                "InstanceMapsConfig: encoding must be auto, ids or class_instance, "
                f"got {self.encoding!r}"
            )


def read_instance_maps(
    config: InstanceMapsConfig, split: str = "train", views: InstanceViews | None = None
) -> Pictures:
    """The pictures of a split.

    Args:
        config: where they are.
        split: "train" or "val".
        views: for training; None leaves them whole.

    Raises:
        ValueError: a folder is missing, or no picture with a map is left; names it.
    """
    expect_split("instance_maps", split)
    for name in ("images", "instances"):
        if not (config.root / name).is_dir():
            raise ValueError(f"{config.root / name}: no such folder")
    images, maps, labels = (
        _part(config.root / name, split) for name in ("images", "instances", "labels")
    )
    classes, encoding = _classes(config.root), config.encoding
    labelled = labels.is_dir()
    if encoding == "auto":
        encoding = _told(config.root / "instances", len(classes), labelled)
        warnings.warn(f"{maps}: encoding of its values: {encoding}", stacklevel=3)
    if encoding == "ids" and not labelled and len(classes) > 1:
        raise ValueError(
            f"{config.root}: encoding must be class_instance for {len(classes)} classes where "
            f"there are no maps of labels in {labels}, got ids"
        )
    wanted = [maps] + [labels] * (encoding == "ids" and labelled)
    faults: list[str] = []
    nameless = config.encoding == "auto" and not (config.root / "classes.txt").is_file()
    if nameless and _told(config.root / "instances", _FEW, labelled) == "class_instance":
        faults.append(
            f"{config.root}: values look like {_STEP} * class + object, but there is no "
            "classes.txt with the names of the classes, one a line: all objects are taken as of "
            "one class (encoding='ids' if they are)"
        )
    pictures = {path: name_below(path, images) for path in pictures_below(images)}
    known = {f"{folder}/{{}}.png": maps_below(folder) for folder in wanted}
    paths, columns = paired(pictures, known, faults)
    if images == _part(config.root / "images", "val") == _part(config.root / "images", "train"):
        names = [str(path.relative_to(images)) for path in paths]
        chosen = held_out(names, split, config.read.val_share, images)
        paths, *columns = ([some[i] for i in chosen] for some in (paths, *columns))
    kind = Coded if encoding == "class_instance" else Numbered
    truth = kind(*columns, classes=len(classes))
    settings = config.read, views, config.seed, MapSizes(truth.files)
    return Pictures(paths, truth, classes, (), *settings, faults=faults)


class Coded:
    """Maps of 1000 times the class plus the object's number.

    Called with an index and the picture's size it gives its `Truth`.
    """

    def __init__(self, files: list[Path], classes: int):
        self.files, self.classes = FlatPaths(files), classes

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        path = self.files[index]
        values = read_ids(path, size)
        ids = distinct(values)
        ids = ids[ids > 0]
        crowd = ids < _STEP
        labels = np.where(crowd, ids, ids // _STEP) - 1
        faults = [
            f"{path}: value {value} is of class {label + 1} of {self.classes}; left out"
            for value, label in zip(ids, labels)
            if label >= self.classes
        ]
        known = labels < self.classes
        ids, labels, crowd = ids[known], labels[known].astype(np.int64), crowd[known]
        return Truth(IdMaps.of_map(values, ids), labels, crowd, faults)


class Numbered:
    """Maps with a value an object, whose class is told by maps of labels; without them it is 0.

    Called with an index and the picture's size it gives its `Truth`.
    """

    def __init__(self, files: list[Path], of_labels: list[Path] | None = None, classes: int = 1):
        self.files, self.classes = FlatPaths(files), classes
        self.of_labels = None if of_labels is None else FlatPaths(of_labels)

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        path, faults = self.files[index], []
        values = read_ids(path, size)
        ids = distinct(values)
        ids = ids[ids > 0]
        masks, labels = IdMaps.of_map(values, ids), np.zeros(len(ids), np.int64)
        if self.of_labels is not None:
            of_labels = read_ids(self.of_labels[index], size)
            wide = max(VOID, self.classes) + 1
            pairs = masks.maps[0].astype(np.int64) * wide + of_labels.clip(max=wide - 1)
            counts = np.bincount(pairs.ravel(), minlength=(len(ids) + 1) * wide)
            labels = counts.reshape(-1, wide)[1:].argmax(1)
            known = labels < self.classes
            faults = [
                f"{path}: object {value} has label {label} in {self.of_labels[index]}; left out"
                for value, label in zip(ids[~known], labels[~known])
            ]
            masks, labels = masks.chosen(known), labels[known]
        return Truth(masks, labels, np.zeros(len(labels), bool), faults)


def _part(folder: Path, split: str) -> Path:
    """The folder of a split; that of train where there is none of val, and all without either."""
    names = (*SPLITS[split], *SPLITS["train"])
    return next((folder / name for name in names if (folder / name).is_dir()), folder)


def _told(folder: Path, classes: int, labelled: bool) -> str:
    """The encoding that the first maps, of whatever split, speak for."""
    top = 0
    for path in list(maps_below(folder).values())[:_LOOKED_AT]:
        with suppress(ValueError):  # said when it is read
            top = max(top, int(read_ids(path).max(initial=0)))
    coded = not labelled and _STEP <= top < _STEP * (classes + 1)
    return "class_instance" if coded else "ids"


def _classes(root: Path) -> list[str]:
    """Lines of classes.txt; without it there is one class.

    Raises:
        ValueError: it names none.
    """
    path = root / "classes.txt"
    if not path.is_file():
        return ["object"]
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    if not names or not all(names):
        raise ValueError(f"{path}: must have a name a line and no empty line")
    return names
