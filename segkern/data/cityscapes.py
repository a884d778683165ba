"""Cityscapes: maps of ids and of instances, and the polygons that they are drawn from.

    leftImg8bit/train/CITY/NAME_leftImg8bit.png
    gtFine/train/CITY/NAME_gtFine_labelTrainIds.png   train ids 0 to 18; 255 does not count
                      NAME_gtFine_labelIds.png        ids 0 to 33, of which 19 count
                      NAME_gtFine_instanceIds.png     1000 times the id plus the object's number;
                                                      an id alone is a region, of things a crowd
                      NAME_gtFine_polygons.json       objects in the order in which they are drawn

The same of val. Labels are the 19 train ids, of the instance task the 8 things among them. The
semantic task takes the first of these files that is there; the others take the instances, and
draw them from the polygons where there are none.
Source: Cordts et al., CVPR 2016; drawn and named as cityscapesscripts does.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import Image, ImageDraw

from ..io.atomic_files import atomic, write_json
from ..structures.labels import CITYSCAPES, CITYSCAPES_VOID, DATASETS, VOID
from ..structures.segmentation import Segmentation
from .maps import MAPS, MapSizes, maps_below, name_below, paired, read_map
from .pictures import (
    FAR,
    FlatPaths,
    Pictures,
    ReadConfig,
    Truth,
    expect_split,
    expect_task,
    pictures_below,
    settle,
)
from .sample import IdMaps, distinct
from .views import InstanceViews, ViewConfig, scaled_sides

_STEP = 1000
_IDS = CITYSCAPES | CITYSCAPES_VOID
_STUFF, _THINGS = (getattr(DATASETS["cityscapes"], name) for name in ("stuff", "things"))
# those whose objects are numbered; of those that do not count caravans and trailers, too
_NUMBERED = {*list(CITYSCAPES)[len(_STUFF) :], "caravan", "trailer"}
_LABELS = np.full(max(_IDS.values()) + 1, VOID, np.uint8)  # of an id its train id
_LABELS[list(CITYSCAPES.values())] = range(len(CITYSCAPES))


@dataclass
class CityscapesConfig:
    """Cityscapes.

    Attributes:
        root: folder that holds leftImg8bit and gtFine.
        task: "panoptic", "instance" or "semantic".
        seed: other seeds give other views.
        read: how files are read.
        views: of the training pictures.
    """

    kind: ClassVar[str] = "cityscapes"

    root: Path = Path(".")
    task: Literal["panoptic", "instance", "semantic"] = "panoptic"
    seed: int = 0
    read: ReadConfig = field(default_factory=ReadConfig)
    views: ViewConfig = field(
        default_factory=lambda: ViewConfig(
            (512, 1024), short_sides=scaled_sides(1024), colours=True
        )
    )

    def __post_init__(self):
        settle(self)
        expect_task(self, "panoptic", "instance", "semantic")

    @property
    def targets(self) -> tuple[str, ...]:
        """What samples have."""
        return ("masks",) if self.task == "instance" else ("masks", "semantic")


def read_cityscapes(
    config: CityscapesConfig, split: str = "train", views: InstanceViews | None = None
) -> Pictures:
    """The pictures of a split.

    Args:
        config: where they are.
        split: "train" or "val".
        views: for training; None leaves them whole.

    Raises:
        ValueError: a folder is missing, or no picture with its map is left; names it.
    """
    expect_split("cityscapes", split)
    images, maps = (config.root / name / split for name in ("leftImg8bit", "gtFine"))
    for folder in (images, maps):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder, where the {split} split is")
    pictures = {p: name_below(p, images, "_leftImg8bit") for p in pictures_below(images)}
    wanted = f"{maps}/{{}}_gtFine_{_ends(config.task)[-2]}"
    paths, (files,) = paired(pictures, {wanted: truth_files(maps, config.task)}, faults := [])
    names = list(CITYSCAPES)
    stuff = {"panoptic": _STUFF, "instance": (), "semantic": tuple(range(len(names)))}
    if config.task == "instance":
        names = [names[k] for k in _THINGS]
    truth = Maps(files, config.task)
    return Pictures(
        paths,
        truth,
        names,
        stuff[config.task],
        config.read,
        views,
        config.seed,
        MapSizes(truth.files),
        semantic=config.task != "instance",
        faults=faults,
    )


def truth_files(folder: Path, task: str) -> dict[str, Path]:
    """The file of each picture's truth below a folder, by the picture's name."""
    found: dict[str, Path] = {}
    for end in reversed(_ends(task)):
        kinds = MAPS if end.endswith(".png") else (".json",)
        found |= maps_below(folder, f"_gtFine_{end.partition('.')[0]}", kinds)
    return found


def _ends(task: str) -> list[str]:
    """How the names of files end that tell a task's truth, the best first."""
    ids = ["labelTrainIds.png", "labelIds.png"] if task == "semantic" else []
    return [*ids, "instanceIds.png", "polygons.json"]


class Maps:
    """Maps and polygons, called with an index and the picture's size."""

    def __init__(self, files: list[Path], task: str):
        self.files, self.task = FlatPaths(files), task

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        path, faults = self.files[index], []
        if path.suffix.lower() == ".json":
            values = drawn(path, size, faults)
        else:
            values = read_map(path, size, channels=1).astype(np.int32)
        ids = distinct(values)
        of_class = np.where(ids >= _STEP, ids // _STEP, ids)
        if path.stem.endswith("labelTrainIds"):
            labels = np.where((ids >= 0) & (ids < len(CITYSCAPES)), ids, VOID)
            foreign = ids[(labels == VOID) & (ids != VOID)]
        else:
            known = (of_class >= 0) & (of_class < len(_LABELS))
            labels = np.where(known, _LABELS[np.where(known, of_class, 0)], VOID)
            foreign = ids[~known & (ids != VOID)]
        faults += [f"{path}: value {i} is that of no class; left out" for i in foreign]
        if self.task == "semantic":
            return Truth.of_map(_replaced(values, ids, labels).astype(np.uint8), faults)
        chosen = labels != VOID
        if self.task == "instance":
            chosen &= labels >= _THINGS[0]
            labels = labels - _THINGS[0] * chosen
        crowd = (ids < _STEP) & (labels >= (0 if self.task == "instance" else _THINGS[0]))
        masks = IdMaps.of_map(values, ids[chosen])
        return Truth(masks, labels[chosen].astype(np.int64), crowd[chosen], faults)


def drawn(path: Path, size: tuple[int, int], faults: list[str]) -> np.ndarray:
    """A map of instances [H, W] int32 from polygons; one that has another size than the picture,
    or is no such file, is an error.

    Raises:
        ValueError: as said; names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        stated = [content["imgHeight"], content["imgWidth"]]
        objects = [
            (row["label"], row["polygon"], row.get("deleted")) for row in content["objects"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON file of Cityscapes' polygons ({error!r})") from error
    if stated != list(size):
        raise ValueError(f"{path}: must be of its picture's size, {list(size)}, got {stated}")
    canvas, seen = Image.new("I", size[::-1]), Counter()
    draw = ImageDraw.Draw(canvas)
    for at, (label, polygon, deleted) in enumerate(objects, 1):
        name = str(label)
        group = name not in _IDS and name.endswith("group")
        name = name.removesuffix("group") if group else name
        try:
            corners = [(float(x), float(y)) for x, y in polygon]
            good = len(corners) >= 2 and all(abs(n) <= FAR for corner in corners for n in corner)
        except (TypeError, ValueError):
            good = False
        if name not in _IDS or not good:
            rule = "the polygon must be pairs of numbers" if name in _IDS else "no such class"
            faults.append(f"{path}: object {at} ({label!r}): {rule}; left out")
        elif not deleted and _IDS[name] >= 0:
            value = _IDS[name]
            if name in _NUMBERED and not group:
                value = _STEP * value + seen[name]
                seen[name] += 1
            draw.polygon(corners, fill=value)
    return np.asarray(canvas, np.int32)


def _replaced(values: np.ndarray, ids: np.ndarray, by: np.ndarray) -> np.ndarray:
    """A map with each of its ids, which ascend, replaced."""
    return np.asarray(by)[np.searchsorted(ids, values)]


def export_cityscapes(results: Iterable[tuple[str, Segmentation]], folder: str | Path) -> None:
    """Writes results in ids, as Cityscapes' evaluation takes them.

        semantic  NAME_labelIds.png: ids
        instance  NAME.txt: a row a mask: its PNG, below masks, id and score
        panoptic  panoptic.json, as COCO's, and its PNGs in panoptic

    Args:
        results: names of pictures, with or without _leftImg8bit and what follows, and what was
            found in them. They are taken one by one.
        folder: to write to.

    Raises:
        ValueError: a class that Cityscapes does not have; names it.
    """
    folder, rows = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for picture, result in results:
        name = Path(picture).name.partition("_leftImg8bit")[0]
        ids = [_id_of(result.names, segment.label_id) for segment in result.segments]
        values = result.segmentation.cpu().numpy()
        if result.task == "semantic":
            table = np.zeros(256, np.uint8)
            table[[segment.id for segment in result.segments]] = ids
            _write(folder / f"{name}_labelIds.png", table[values])
        elif result.task == "instance":
            lines = []
            for k, (segment, i) in enumerate(zip(result.segments, ids)):
                place = f"masks/{name}_{k}.png"
                mask = result.masks[k].cpu().numpy()
                _write(folder / place, mask.astype(np.uint8) * 255)
                lines.append(f"{place} {i} {segment.score:.6f}\n")
            with atomic(folder / f"{name}.txt") as temporary:
                temporary.write_text("".join(lines))
        else:
            pixels = np.stack([values % 256, values // 256 % 256, values // 65536], -1)
            _write(folder / "panoptic" / f"{name}.png", pixels.astype(np.uint8))
            found = [{"id": s.id, "category_id": i} for s, i in zip(result.segments, ids)]
            about = {"image_id": name, "file_name": f"{name}.png", "segments_info": found}
            rows.append(about)
    if rows:
        write_json(folder / "panoptic.json", {"annotations": rows})


def _id_of(names: dict[int, str] | None, label: int) -> int:
    name = (names or {}).get(label)
    if name not in CITYSCAPES:
        raise ValueError(
            f"export_cityscapes: names must be those of Cityscapes' classes, got {name!r} "
            f"for label {label}"
        )
    return CITYSCAPES[name]


def _write(path: Path, pixels: np.ndarray) -> None:
    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")
