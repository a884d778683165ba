"""COCO: a JSON file of pictures, categories and segments; of the panoptic kind with PNGs of ids.

Such files are found by their names: train or val (valid, validation) in the name of the file or of
its folder, and "panoptic" in those of the panoptic kind. Where there is one file alone, a share of
its pictures is the val split. Pictures are looked for beside the file and in the root's folders
images/SPLIT, SPLIT, SPLIT2017, images and data.
Labels count categories in the order of their ids, things before stuff, and both splits have the
table of the training file. Only the panoptic tables of ADE20K and Cityscapes, known by which of
their ids are stuff, keep the order of their ids: checkpoints have it.
Source: COCO's data format (Lin et al., ECCV 2014; Kirillov et al., CVPR 2019).
"""

import json
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from ..io.images import read_head
from ..structures.labels import DATASETS
from .coco_segments import instances, panoptic
from .pictures import (
    SPLITS,
    Names,
    Pictures,
    ReadConfig,
    expect_split,
    expect_task,
    files_below,
    held_out,
    number,
    pictures_below,
    settle,
)
from .views import InstanceViews, ViewConfig

OTHERS = ("captions", "keypoints", "image_info", "stuff_")  # COCO's files of other kinds


@dataclass
class CocoConfig:
    """Pictures with segments in COCO's format.

    Attributes:
        root: folder of all.
        task: "instance" or "panoptic".
        train, val: annotation files below the root; "" looks for them.
        images: folder of the pictures below the root; "" looks for it.
        masks: folder of the panoptic PNGs below the root; "" looks for it.
        seed: other seeds give other views.
        read: how files are read.
        views: of the training pictures.
    """

    kind: ClassVar[str] = "coco"

    root: Path = Path(".")
    task: Literal["instance", "panoptic"] = "instance"
    train: str = ""
    val: str = ""
    images: str = ""
    masks: str = ""
    seed: int = 0
    read: ReadConfig = field(default_factory=ReadConfig)
    views: ViewConfig = field(default_factory=ViewConfig)

    def __post_init__(self):
        settle(self)
        expect_task(self, "instance", "panoptic")

    @property
    def targets(self) -> tuple[str, ...]:
        """What samples have."""
        return ("masks", "semantic") if self.task == "panoptic" else ("masks",)


class Table(NamedTuple):
    """Categories: the label of each id, names by label, and labels without instances."""

    labels: dict[Hashable, int]
    names: list[str]
    stuff: tuple[int, ...]


def read_coco(
    config: CocoConfig, split: str = "train", views: InstanceViews | None = None
) -> Pictures:
    """The pictures of a split.

    Args:
        config: where they are.
        split: "train" or "val".
        views: for training; None leaves them whole.

    Raises:
        ValueError: a file is missing or of another kind, or no picture is left; names it.
    """
    expect_split("coco", split)
    of_split, of_train = annotation_files(config, split), annotation_files(config, "train")
    file, faults = _one(config, split, of_split), []
    train_file = _one(config, "train", of_train) if of_train else file  # val alone is enough
    alone = file in of_train and file in annotation_files(config, "val")
    content = _content(file)
    if content["images"] and not content["annotations"] and split == "train":
        raise ValueError(f"{file}: has no annotation: there is nothing to train on")
    kind = "panoptic" if any("segments_info" in a for a in content["annotations"]) else "instance"
    kind = kind if content["annotations"] else config.task
    if kind != config.task:
        raise ValueError(
            f"{file}: holds annotations of the {kind} kind: task must be {kind!r}, "
            f"got {config.task!r}"
        )
    table = _table(file, content, faults)
    if file != train_file:
        train = _table(train_file, _content(train_file), [])
        table = _matched(file, table, train_file, train, faults)
    pictures = _pictures(config, file, split, content["images"])
    images = _images(file, content["images"], pictures, config.read, faults)
    masks = {}
    if kind == "panoptic":
        masks = _masks(content["annotations"], _mask_folder(config, file))
        images = _with_masks(file, images, masks, faults)
    if alone:
        names = [str(path.relative_to(pictures.folder)) for _, path, _ in images]
        images = [images[i] for i in held_out(names, split, config.read.val_share, file)]
    listed = {number(image.get("id")) for image in content["images"]}
    place = {key: i for i, (key, _, _) in enumerate(images)}
    sizes = np.array([size for _, _, size in images], np.int64).reshape(-1, 2)
    rows = file, content["annotations"], place, listed, table.labels
    if kind == "panoptic":
        truth = panoptic(*rows, [masks[key] for key in place], faults)
    else:
        truth = instances(*rows, sizes, faults)
    return Pictures(
        [path for _, path, _ in images],
        truth,
        table.names,
        table.stuff,
        config.read,
        views,
        config.seed,
        sizes,
        semantic=kind == "panoptic",
        faults=faults,
    )


def annotation_files(config: CocoConfig, split: str) -> list[Path]:
    """The JSON files that may be those of a split; those of train where there is none of val.

    Raises:
        ValueError: no such folder.
    """
    if given := getattr(config, split):
        return [config.root / given]
    if not config.root.is_dir():
        raise ValueError(f"{config.root}: no such folder")
    candidates = [
        path
        for path in files_below(config.root)
        if path.suffix.lower() == ".json"
        and len(path.relative_to(config.root).parts) <= 3
        and not any(word in path.name for word in OTHERS)
    ]
    named = [p for p in candidates if ("panoptic" in p.name) == (config.task == "panoptic")]
    found = [p for p in named or candidates if split in _parts(p, config.root)]
    if not found and split == "val":
        return annotation_files(config, "train")
    return found or [p for p in named or candidates if not _parts(p, config.root)]


def _one(config: CocoConfig, split: str, files: list[Path]) -> Path:
    """The file of a split.

    Raises:
        ValueError: there is none, or several.
    """
    if len(files) != 1:
        shown = ", ".join(str(path.relative_to(config.root)) for path in files) or "none"
        raise ValueError(
            f"{config.root}: must have one annotation file of the {split} split, found {shown}; "
            f"leave one there, or name it with {split} (train --data.{split} FILE)"
        )
    return files[0]


def _parts(path: Path, root: Path) -> set[str]:
    """The splits that the name of a file, or of its folder, speaks of."""
    words = re.findall("[a-z]+", f"{path.relative_to(root).parent.name} {path.stem}".lower())
    return {split for split, names in SPLITS.items() if any(word in names for word in words)}


def _content(path: Path) -> dict:
    """What a COCO file holds.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    for name in ("images", "categories", "annotations"):
        rows = content.get(name) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: must have a list of {name}, as COCO files do")
    return content


def _table(path: Path, content: dict, faults: list[str]) -> Table:
    """The categories of a file."""
    rows = {}
    for row in content["categories"]:
        key = number(row.get("id"))
        if "id" not in row:
            faults.append(f"{path}: category {row.get('name')!r} has no id; left out")
        elif key in rows:
            faults.append(f"{path}: category {key} is there twice; the first counts")
        else:
            rows[key] = row
    if not rows:
        raise ValueError(f"{path}: must have a category at least")
    isthing = {key: bool(number(row.get("isthing", 1))) for key, row in rows.items()}
    by_segments = any("segments_info" in a for a in content["annotations"])
    if by_segments and (lacking := [key for key, row in rows.items() if "isthing" not in row]):
        faults.append(
            f"{path}: category {lacking[0]} does not say whether it is a thing (isthing; "
            f"{len(lacking)} of {len(rows)} do not); taken as one"
        )
    order = sorted(rows, key=lambda k: (isinstance(k, str), k))
    stuff = tuple(label for label, key in enumerate(order) if not isthing[key])
    kinds = [(facts.labels.get("panoptic"), facts.stuff) for facts in DATASETS.values()]
    if (len(order), stuff) not in kinds:
        order.sort(key=lambda k: not isthing[k])
    return Table(
        {key: label for label, key in enumerate(order)},
        [str(rows[key].get("name", f"category {key}")) for key in order],
        tuple(label for label, key in enumerate(order) if not isthing[key]),
    )


def _matched(path: Path, own: Table, of_train: Path, train: Table, faults: list[str]) -> Table:
    """The training table with the ids of another file, whose categories are found by name."""
    labels = {}
    for key, label in own.labels.items():
        name = own.names[label]
        if key in train.labels and train.names[train.labels[key]] == name:
            labels[key] = train.labels[key]
        elif train.names.count(name) == 1:
            labels[key] = train.names.index(name)
            faults.append(f"{path}: category {key} is matched with that of {of_train} by its name")
        else:
            faults.append(f"{path}: category {key}, {name!r}, is not in {of_train}; left out")
    return Table(labels, train.names, train.stuff)


def _pictures(config: CocoConfig, file: Path, split: str, images: list[dict]) -> Names:
    """Pictures by name, of the folder that has most of the first ones."""
    parts = [f"{a}{b}{c}" for a in ("images/", "") for b in SPLITS[split] for c in ("2017", "")]
    folders = [config.root / part for part in (*parts, "images", "data")]
    folders += [file.parent, config.root]
    if config.images:
        folders = [config.root / config.images]
    found = [Names(path, pictures_below(path)) for path in folders if path.is_dir()]
    if not found:
        raise ValueError(f"{folders[0]}: no such folder; it holds the pictures of {file}")
    some = [str(row.get("file_name", "")) for row in images[:50]]

    def has(names: Names) -> tuple[int, int]:
        return tuple(
            sum(get(name) is not None for name in some) for get in (names.there, names.get)
        )

    return max(found, key=has)


def _mask_folder(config: CocoConfig, file: Path) -> Path:
    """The folder of the PNGs of a panoptic file.

    Raises:
        ValueError: there is none.
    """
    if config.masks:
        folders = [config.root / config.masks]
    else:
        folders = [file.with_suffix(""), config.root / file.stem, config.root / "masks"]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise ValueError(
            f"{file}: must have its PNGs in a folder {folders[0]}, which is not there; name it "
            "with masks"
        )
    return found


def _images(
    path: Path, rows: list[dict], names: Names, read: ReadConfig, faults: list[str]
) -> list[tuple[Hashable, Path, tuple[int, int]]]:
    """Id, file and size (H, W) of the pictures that are there."""
    found, seen = [], set()
    for row in rows:
        key, name = number(row.get("id")), str(row.get("file_name", ""))
        file = names.get(name)
        if "id" not in row or key in seen:
            what = "is there twice; the first counts" if "id" in row else "has no id; left out"
            faults.append(f"{path}: picture {key if 'id' in row else name} {what}")
            continue
        seen.add(key)
        if file is None:
            faults.append(f"{names.folder / name}: no such picture, which {path} lists; left out")
            continue
        size = tuple(number(row.get(side)) for side in ("height", "width"))
        if not all(isinstance(side, int) and 0 < side < 2**31 for side in size):
            try:
                size = read_head(file, read.max_pixels)[1]
            except ValueError as error:
                faults.append(f"{error}; left out")
                continue
        found.append((key, file, size))
    return found


def _masks(annotations: list[dict], folder: Path) -> dict[Hashable, Path]:
    """Of a picture's id the PNG of its segments, whether it is there or not."""
    names = Names(folder, pictures_below(folder))
    listed = {number(row.get("image_id")): str(row.get("file_name", "")) for row in annotations}
    return {key: names.get(name) or folder / name for key, name in listed.items()}


def _with_masks(path: Path, images: list, masks: dict[Hashable, Path], faults: list[str]) -> list:
    """The pictures that have a PNG of segments."""
    found = []
    for row in images:
        key, file, _ = row
        if key not in masks:
            faults.append(f"{path}: picture {key} has no annotation; {file} is left out")
        elif not masks[key].is_file():
            faults.append(f"{masks[key]}: no such file, the segments of {file}; left out")
        else:
            found.append(row)
    return found
