"""ADE20K: maps of classes and objects, as the scene parsing challenge and the full set have them.

    challenge  images/training/NAME.jpg                the same of validation
               annotations/training/NAME.png           classes 1 to 150; 0 does not count
               annotations_instance/training/NAME.png  red: class 1 to 100 of the instance
                                                       challenge; green: the object, 0 is none
    full       images/ADE/training/.../NAME.jpg, NAME_seg.png, NAME.json
               red // 10 * 256 + green: the class, 0 is none; blue: number of the object

The panoptic truth is that of Mask2Former's converter: objects over the regions of the 50 classes
without objects; a region of another class without an object does not count. The full set does not
say which classes have no objects, so it has no panoptic task. Its classes are those that occur in
the JSON files of the training split, in the order of their numbers.
Source: Zhou et al., CVPR 2017 and IJCV 2019.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from ..structures.labels import ADE20K, DATASETS, VOID, void_of
from .maps import MAPS, MapSizes, maps_below, name_below, paired, read_map
from .pictures import (
    FlatPaths,
    Pictures,
    ReadConfig,
    Truth,
    expect_split,
    expect_task,
    files_below,
    number,
    pictures_below,
    settle,
)
from .sample import IdMaps, distinct, label_table
from .views import InstanceViews, ViewConfig, scaled_sides

_MOST = 26 * 256  # numbers of classes are below it: red is 255 at most
_FOLDER = {"train": "training", "val": "validation"}


def ade20k_views(task: str) -> ViewConfig:
    """Views of the recipes of Mask2Former's paper: of 512 pixels for the semantic task, of 640 for
    the others."""
    side = 512 if task == "semantic" else 640
    sides = scaled_sides(side)
    return ViewConfig((side, side), short_sides=sides, long_side=4 * side, colours=True)


@dataclass
class Ade20kConfig:
    """ADE20K.

    Attributes:
        root: folder of all: ADEChallengeData2016, or that of the full set.
        task: "panoptic", "instance" or "semantic".
        seed: other seeds give other views.
        read: how files are read.
        views: of the training pictures; `ade20k_views` has those of each task.
    """

    kind: ClassVar[str] = "ade20k"

    root: Path = Path(".")
    task: Literal["panoptic", "instance", "semantic"] = "panoptic"
    seed: int = 0
    read: ReadConfig = field(default_factory=ReadConfig)
    views: ViewConfig = field(default_factory=lambda: ade20k_views("panoptic"))

    def __post_init__(self):
        settle(self)
        expect_task(self, "panoptic", "instance", "semantic")

    @property
    def targets(self) -> tuple[str, ...]:
        """What samples have."""
        return ("masks",) if self.task == "instance" else ("masks", "semantic")


def read_ade20k(
    config: Ade20kConfig, split: str = "train", views: InstanceViews | None = None
) -> Pictures:
    """The pictures of a split.

    Args:
        config: where they are.
        split: "train" or "val".
        views: for training; None leaves them whole.

    Raises:
        ValueError: a folder is missing, no picture with its maps is left, or the full set is asked
            for its panoptic task.
    """
    expect_split("ade20k", split)
    faults: list[str] = []
    read = _full if is_full(config.root) else _challenge
    paths, truth, classes, stuff = read(config, split, faults)
    settings = config.read, views, config.seed
    semantic = config.task != "instance"
    sizes = MapSizes(truth.files)
    return Pictures(
        paths, truth, classes, stuff, *settings, sizes=sizes, semantic=semantic, faults=faults
    )


def is_full(root: Path) -> bool:
    """Whether a folder is laid out as the full set."""
    return (root / "images/ADE").is_dir() or any(root.glob("index_ade20k.*"))


def _challenge(config: Ade20kConfig, split: str, faults: list[str]) -> tuple:
    folder, part = config.root, _FOLDER[split]
    kinds = {"panoptic": ("annotations", "annotations_instance")}
    kinds |= {"instance": ("annotations_instance",), "semantic": ("annotations",)}
    for name in ("images", *kinds[config.task]):
        if not (folder / name / part).is_dir():
            raise ValueError(
                f"{folder / name / part}: no such folder, which the {config.task} task needs"
            )
    images = folder / "images" / part
    pictures = {path: name_below(path, images) for path in pictures_below(images)}
    places = [folder / name / part for name in kinds[config.task]]
    paths, files = paired(pictures, {f"{p}/{{}}.png": maps_below(p) for p in places}, faults)
    facts, names = DATASETS["ade20k"], challenge_names(folder)
    if config.task == "instance":
        return paths, Objects(*files), [names[k] for k in facts.things], ()
    stuff = facts.stuff if config.task == "panoptic" else tuple(range(len(names)))
    truth = Scenes(*files) if config.task == "panoptic" else Classes(*files)
    return paths, truth, names, stuff


class Classes:
    """Maps of the challenge's classes, called with an index and the picture's size."""

    def __init__(self, files: list[Path]):
        self.files = FlatPaths(files)

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        return Truth.of_map(self.labels(index, size))

    def labels(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """[H, W] uint8.

        Raises:
            ValueError: a value that stands for no class.
        """
        path, K = self.files[index], len(ADE20K)
        values = read_map(path, size, channels=1)
        if (foreign := values[(values < 0) | ((values > K) & (values != VOID))]).size:
            raise ValueError(f"{path}: values must be 0 to {K} or {VOID}, got {foreign[0]}")
        return np.where((values == 0) | (values == VOID), VOID, values - 1).astype(np.uint8)


class Objects:
    """The challenge's maps of objects, called with an index and the picture's size."""

    def __init__(self, files: list[Path]):
        self.files = FlatPaths(files)

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        path, K = self.files[index], len(DATASETS["ade20k"].things)
        values = read_map(path, size, channels=3)
        pairs = values[..., 1].astype(np.int32) * 256 + values[..., 0]
        pairs[values[..., 1] == 0] = 0
        ids = distinct(pairs)
        ids = ids[ids > 0]
        labels = ids.astype(np.int64) % 256 - 1
        known = (labels >= 0) & (labels < K)
        faults = [
            f"{path}: object {i // 256} is of class {i % 256}, which must be in [1, {K}]; left out"
            for i in ids[~known]
        ]
        masks = IdMaps.of_map(pairs, ids[known])
        return Truth(masks, labels[known], np.zeros(known.sum(), bool), faults)


class Scenes:
    """Both, called with an index and the picture's size: objects lie over regions."""

    def __init__(self, classes: list[Path], objects: list[Path]):
        self.classes, self.objects = Classes(classes), Objects(objects)
        self.files = self.classes.files

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        facts = DATASETS["ade20k"]
        semantic = self.classes.labels(index, size)
        masks, labels, _, faults, _ = self.objects(index, size)
        present = distinct(semantic)
        regions = present[np.isin(present, facts.stuff)].astype(np.int64)
        ids = masks.maps[0].astype(np.int32)
        place = np.zeros(VOID + 1, np.int32)
        place[regions] = len(labels) + 1 + np.arange(len(regions))
        ids = np.where(ids > 0, ids, place[semantic])
        labels = np.concatenate([np.array(facts.things, np.int64)[labels], regions])
        joint = IdMaps.of_map(ids, np.arange(1, len(labels) + 1))
        return Truth(joint, labels, np.zeros(len(labels), bool), faults, semantic)


def challenge_names(root: Path) -> list[str]:
    """Names of the 150 classes: those of objectInfo150.txt in the root, else the known ones.

    Raises:
        ValueError: the file does not hold them.
    """
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return list(ADE20K)
    rows = [
        line.split("\t") for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    ]
    names = [row[-1].split(",")[0].strip() for row in rows[1:]]  # the first of the synonyms
    numbers = [row[0].strip() for row in rows[1:]]
    if numbers != [str(k) for k in range(1, len(ADE20K) + 1)] or not all(names):
        raise ValueError(f"{path}: must have a headline, then rows 1 to 150 that end in names")
    return names


def _full(config: Ade20kConfig, split: str, faults: list[str]) -> tuple:
    if config.task == "panoptic":
        raise ValueError(
            f"{config.root}: the full set does not say which classes have no objects: task must "
            "be instance or semantic, got 'panoptic'"
        )
    base = config.root / "images"
    files = [path for path in files_below(base) if path.suffix.lower() == ".json"]
    table = class_table(_of(files, base, "train"), faults if split == "train" else [])
    if not table:
        raise ValueError(f"{base}: no JSON of the training split names a class")
    shown = [path for path in pictures_below(base) if path.suffix.lower() not in MAPS]
    pictures = {path: name_below(path, base) for path in _of(shown, base, split)}
    paths, files = paired(pictures, {f"{base}/{{}}_seg.png": maps_below(base, "_seg")}, faults)
    stuff = tuple(range(len(table))) if config.task == "semantic" else ()
    truth = FullMaps(*files, sorted(table), config.task == "semantic")
    return paths, truth, [table[key] for key in sorted(table)], stuff


def _of(files: list[Path], base: Path, split: str) -> list[Path]:
    """Those of a split's folder, wherever it lies."""
    return [path for path in files if _FOLDER[split] in path.relative_to(base).parts]


def class_table(files: list[Path], faults: list[str]) -> dict[int, str]:
    """Of a class's number its name, from the objects of JSON files; parts of objects are none."""
    table: dict[int, str] = {}
    for path in files:
        try:
            rows = _objects(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            faults.append(f"{path}: not a JSON file of ADE20K's objects ({error!r:.80}); left out")
            continue
        for at, row in enumerate(rows, 1):
            row = row if isinstance(row, dict) else {}
            parts, i, name = (row.get(key) for key in ("parts", "name_ndx", "name"))
            if number(parts.get("part_level", 0) if isinstance(parts, dict) else 0):
                continue
            i = number(i)
            if isinstance(i, int) and 0 < i < _MOST and isinstance(name, str):
                table.setdefault(i, name)
            else:
                faults.append(f"{path}: object {at} must have a name and a name_ndx; left out")
    return table


def _objects(path: Path) -> list:
    """What a JSON file of the full set says of its objects."""
    text = path.read_bytes()
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:  # some of the set's own files are in Latin-1
        content = json.loads(text.decode("latin-1"))
    rows = content["annotation"]["object"]
    return rows if isinstance(rows, list) else [rows]


class FullMaps:
    """Maps of the full set, called with an index and the picture's size."""

    def __init__(self, files: list[Path], numbers: list[int], semantic: bool):
        self.files, self.semantic = FlatPaths(files), semantic
        self.numbers = np.array(numbers, np.int64)

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        path, void = self.files[index], void_of(len(self.numbers))
        values = read_map(path, size, channels=3).astype(np.int32)
        classes = values[..., 0] // 10 * 256 + values[..., 1]
        present = distinct(classes)
        labels = np.searchsorted(self.numbers, present).clip(max=len(self.numbers) - 1)
        known = self.numbers[labels] == present
        faults = [
            f"{path}: class {i} occurs in no JSON of the training split; left out"
            for i in present[~known & (present > 0)]
        ]
        table = np.full(int(present.max()) + 1, void)
        table[present[known]] = labels[known]
        if self.semantic:
            return Truth.of_map(label_table([*table, void])[classes], faults)
        objects = np.where(table[classes] == void, 0, 256 * classes + values[..., 2])
        ids = distinct(objects)
        ids = ids[ids > 0].astype(np.int64)
        crowd = np.zeros(len(ids), bool)
        return Truth(
            IdMaps.of_map(objects, ids), table[ids // 256].astype(np.int64), crowd, faults
        )
