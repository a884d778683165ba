"""YOLO-seg: a text file of polygons for each picture, and a YAML file of names and folders.

A row is a class and the x and y of a polygon's corners by turns, over width and height. The YAML
file (data.yaml, or the only one in the root) says where the pictures of train and val are, else
they are looked for in images/SPLIT, SPLIT/images and images. Labels lie in folders called `labels`
in place of `images`, or beside the pictures. A picture without a text file shows nothing. Polygons
are filled as COCO fills them.
Source: the format of Ultralytics' YOLO (2023).
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import yaml

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
from .sample import IdMaps, coco_masks
from .views import InstanceViews, ViewConfig


@dataclass
class YoloConfig:
    """Pictures with polygons in YOLO's format.

    Attributes:
        root: folder of all.
        file: YAML below the root; "" looks for it.
        seed: other seeds give other views.
        read: how files are read.
        views: of the training pictures.
    """

    kind: ClassVar[str] = "yolo"
    task: ClassVar[str] = "instance"
    targets: ClassVar[tuple[str, ...]] = ("masks",)

    root: Path = Path(".")
    file: str = ""
    seed: int = 0
    read: ReadConfig = field(default_factory=ReadConfig)
    views: ViewConfig = field(default_factory=ViewConfig)

    def __post_init__(self):
        settle(self)


def read_yolo(
    config: YoloConfig, split: str = "train", views: InstanceViews | None = None
) -> Pictures:
    """The pictures of a split.

    Args:
        config: where they are.
        split: "train" or "val".
        views: for training; None leaves them whole.

    Raises:
        ValueError: the YAML file or a folder is missing or wrong; names it.
    """
    expect_split("yolo", split)
    file = names_file(config)
    content = _content(file)
    names, faults = content["names"], []
    entries = {
        part: next((content[k] for k in SPLITS[part] if content.get(k)), None) for part in SPLITS
    }
    if not any(entries.values()):  # as some tools write it
        entries = {part: _usual(file.parent, part) for part in SPLITS}
    entry = entries[split] or entries["train"]
    if entry is None:
        raise ValueError(
            f"{file}: must say where the pictures are, with train and val, or have them beside it "
            "in images/train and images/val"
        )
    places = [
        _place(file, content.get("path"), str(part))
        for part in (entry if isinstance(entry, list) else [entry])
    ]
    paths = [path for place in places for path in _pictures(place, faults)]
    if paths and not any(label_file(path).is_file() for path in paths):
        raise ValueError(
            f"{label_file(paths[0])}: no such file, the rows of {paths[0]}, and no other picture "
            "has one"
        )
    if not entries["val"] or entries["val"] == entries["train"]:
        names_of = [os.path.relpath(path, config.root) for path in paths]
        chosen = held_out(names_of, split, config.read.val_share, file)
        paths = [paths[i] for i in chosen]
    if not paths:
        raise ValueError(f"{places[0]}: holds no picture of the {split} split of {file}")
    return Pictures(
        paths, Rows(paths, len(names)), names, (), config.read, views, config.seed, faults=faults
    )


class Rows:
    """The polygons of text files, which are read when they are asked for.

    Called with an index and the picture's size it gives its `Truth`.
    """

    def __init__(self, paths: list[Path], classes: int):
        self.paths, self.classes = FlatPaths(paths), classes

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        H, W = size
        codes, labels, faults = [], [], []
        path = label_file(self.paths[index])
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: must be text in UTF-8 ({error})") from error
        for at, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                label, corners = _row(line, self.classes)
            except ValueError as error:
                faults.append(f"{path}: row {at}: {error}; left out")
                continue
            scaled = (np.array(corners).reshape(-1, 2) * (W, H)).ravel().tolist()
            codes += coco_masks().frPyObjects([scaled], H, W)
            labels.append(label)
        labels = np.array(labels, np.int64)
        return Truth(IdMaps.of_codes(codes, size), labels, np.zeros(len(labels), bool), faults)


def _row(line: str, classes: int) -> tuple[int, list[float]]:
    """Label and corners of a row.

    Raises:
        ValueError: it is no polygon of a class.
    """
    try:
        label, *corners = map(float, line.split())
    except ValueError as error:
        raise ValueError(f"must be numbers, got {line[:40]!r}") from error
    if not label.is_integer() or not 0 <= label < classes:
        raise ValueError(f"the class must be in [0, {classes}), got {label:g}")
    if len(corners) == 4:
        raise ValueError("must be a polygon, got a box (4 numbers)")
    if len(corners) < 6 or len(corners) % 2:
        raise ValueError(
            f"a polygon must have 6 numbers or more, x and y by turns, got {len(corners)}"
        )
    low, high = min(corners), max(corners)
    if not (math.isfinite(sum(corners)) and low >= -0.01 and high <= 1.01):
        raise ValueError(
            f"x and y must be in [0, 1], over width and height, got {low:g} to {high:g}"
        )
    return int(label), corners


def label_file(picture: Path) -> Path:
    """Where the rows of a picture are: the last folder `images` is `labels`, if there is one."""
    parts = list(picture.parts)
    for at in range(len(parts) - 2, -1, -1):
        if parts[at] == "images":
            parts[at] = "labels"
            return Path(*parts).with_suffix(".txt")
    return picture.with_suffix(".txt")


def names_file(config: YoloConfig) -> Path:
    """The YAML file.

    Raises:
        ValueError: there is none, or several that may be it.
    """
    if config.file:
        return config.root / config.file
    found = sorted(p for end in ("*.yaml", "*.yml") for p in config.root.glob(end))
    found = [p for p in found if p.name in ("data.yaml", "dataset.yaml")] or found
    if len(found) != 1:
        shown = ", ".join(p.name for p in found) or "none"
        raise ValueError(
            f"{config.root}: must have one YAML file of names, data.yaml, found {shown}"
        )
    return found[0]


def _content(path: Path) -> dict:
    """What the YAML file holds, its names as a list.

    Raises:
        ValueError: it cannot be read, or has no names.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a readable YAML file ({error})") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: names must be a list, or name 0, 1, 2, ..., got {names!r:.80}")
    return content | {"names": [str(name) for name in names]}


def _usual(root: Path, split: str) -> str | None:
    """Where the pictures of a split are if the YAML file does not say it, below the root."""
    names = [part for name in SPLITS[split] for part in (f"images/{name}", f"{name}/images")]
    names += ["images"] * (split == "train")
    return next((name for name in names if (root / name).is_dir()), None)


def _place(file: Path, base, entry: str) -> Path:
    """The folder, or list, of an entry of the YAML file; exports often name one level too high."""
    root = file.parent
    roots = [root / str(base or ""), root]
    entries = [entry.replace("\\", "/")]
    entries.append(entries[0].removeprefix("../").removeprefix("./"))
    found = [folder / part for folder in roots for part in entries]
    return next((place for place in found if place.exists()), found[0])


def _pictures(place: Path, faults: list[str]) -> list[Path]:
    """Pictures of a folder, or of a list with a name a line.

    Raises:
        ValueError: it is not there.
    """
    if place.is_dir():
        return pictures_below(place)
    if not place.is_file():
        raise ValueError(f"{place}: no such folder of pictures")
    found = []
    for line in filter(None, map(str.strip, place.read_text(encoding="utf-8-sig").splitlines())):
        path = place.parent / line
        if path.is_file():
            found.append(path)
        else:
            faults.append(f"{path}: no such picture, which {place} lists; left out")
    return found
