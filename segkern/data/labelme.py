"""LabelMe: a JSON file of shapes for each picture.

Files are those in the folders train and val (training; valid, validation) of the root; without
val, a share of all is held out. Classes are the lines of labels.txt in the root, else the names
that occur in any file, sorted; shapes called __ignore__ or _background_ are none. Shapes of one
name and group_id are one instance. They are drawn as LabelMe draws them: a line 10 pixels wide, a
point as a disc with a radius of 5.
Source: labelme (Wada, 2016), utils/shape.py.
"""

import base64
import io
import json
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw

from ..io.images import open_image, picture_suffixes
from .pictures import (
    FAR,
    SPLITS,
    FlatPaths,
    Pictures,
    ReadConfig,
    Truth,
    expect_split,
    files_below,
    held_out,
    number,
    pictures_below,
    settle,
)
from .sample import IdMaps
from .views import InstanceViews, ViewConfig

# how many points a shape has, at least and at most
_POINTS = {
    "polygon": (3, math.inf),
    "rectangle": (2, 2),
    "oriented_rectangle": (4, 4),
    "circle": (2, 2),
    "line": (2, 2),
    "linestrip": (2, math.inf),
    "point": (1, 1),
    "points": (1, math.inf),
    "mask": (2, 2),
}
_LINE, _POINT = 10, 5  # pixels: width, radius
_NOTHING = ("__ignore__", "_background_")


@dataclass
class LabelMeConfig:
    """Pictures with shapes in LabelMe's format.

    Attributes:
        root: folder of all.
        seed: other seeds give other views.
        read: how files are read.
        views: of the training pictures.
    """

    kind: ClassVar[str] = "labelme"
    task: ClassVar[str] = "instance"
    targets: ClassVar[tuple[str, ...]] = ("masks",)

    root: Path = Path(".")
    seed: int = 0
    read: ReadConfig = field(default_factory=ReadConfig)
    views: ViewConfig = field(default_factory=ViewConfig)

    def __post_init__(self):
        settle(self)


def read_labelme(
    config: LabelMeConfig, split: str = "train", views: InstanceViews | None = None
) -> Pictures:
    """The pictures of a split.

    Args:
        config: where they are.
        split: "train" or "val".
        views: for training; None leaves them whole.

    Raises:
        ValueError: there is no file, or none is left; names the first.
    """
    expect_split("labelme", split)
    if not config.root.is_dir():
        raise ValueError(f"{config.root}: no such folder")
    files = [path for path in files_below(config.root) if path.suffix.lower() == ".json"]
    if not files:
        raise ValueError(f"{config.root}: holds no JSON of LabelMe")
    rows, names, faults, alone = [], set(), [], True
    shown = {path.with_suffix("") for path in files}
    for path in files:
        part = _split(path.relative_to(config.root))
        if part == "test":
            continue
        alone = alone and part != "val"
        try:
            content = _content(path)
            picture = _picture(path, content)
        except ValueError as error:
            faults += [f"{error}; left out"] * (part in (None, split))
            continue
        shown.add(picture.with_suffix(""))
        names |= {str(s["label"]) for s in content["shapes"] if _fault(s) is None}
        size = [number(content.get(key)) for key in ("imageHeight", "imageWidth")]
        size = size if all(isinstance(n, int) and 0 < n < 2**31 for n in size) else [0, 0]
        rows.append((part, path, picture, size, _faults(path, content)))
    bare = [p for p in pictures_below(config.root) if p.with_suffix("") not in shown]
    bare = [p for p in bare if (_split(p.relative_to(config.root)) or "train") == split]
    if bare:
        more = f" ({len(bare)} pictures have none)" if len(bare) > 1 else ""
        faults.append(f"{bare[0]}: has no JSON beside it{more}; left out")
    if alone:
        chosen = [str(path.relative_to(config.root)) for _, path, *_ in rows]
        rows = [rows[i] for i in held_out(chosen, split, config.read.val_share, config.root)]
    else:
        rows = [row for row in rows if (row[0] or "train") == split]
    listed = config.root / "labels.txt"
    if listed.is_file():
        lines = listed.read_text(encoding="utf-8-sig").splitlines()
        classes = list(dict.fromkeys(filter(None, map(str.strip, lines))))
        classes = [name for name in classes if name not in _NOTHING]
        if lost := sorted(names - {*classes, *_NOTHING}):
            faults.append(f"{listed}: does not name {lost[0]!r}, which occurs; left out")
    else:
        classes = sorted(names - {*_NOTHING})
    if not classes:
        found = [*faults, *(fault for *_, part in rows for fault in part)]
        raise ValueError(found[0] if found else f"{config.root}: no file has a shape with a label")
    return Pictures(
        [picture for _, _, picture, _, _ in rows],
        Shapes([path for _, path, *_ in rows], {name: k for k, name in enumerate(classes)}),
        classes,
        (),
        config.read,
        views,
        config.seed,
        np.array([size for *_, size, _ in rows], np.int64).reshape(-1, 2),
        faults=faults + [fault for *_, found in rows for fault in found],
        opened=_opened,
    )


class Shapes:
    """The shapes of LabelMe's files, which are read when they are asked for.

    Called with an index and the picture's size it gives its `Truth`.
    """

    def __init__(self, files: list[Path], labels: dict[str, int]):
        self.files, self.labels = FlatPaths(files), labels

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        groups: dict[Hashable, list[dict]] = {}
        for at, shape in enumerate(_content(self.files[index])["shapes"]):
            if _fault(shape) is None and str(shape["label"]) in self.labels:
                group = shape.get("group_id")
                key = (None, at) if group is None else (str(shape["label"]), number(group))
                groups.setdefault(key, []).append(shape)
        faults, masks, labels = [], [], []
        for shapes in groups.values():
            try:
                masks.append(drawn(shapes, size))
                labels.append(self.labels[str(shapes[0]["label"])])
            except ValueError as error:
                faults.append(f"{self.files[index]}: {error}; left out")
        labels = np.array(labels, np.int64)
        return Truth(IdMaps.of_arrays(masks, size), labels, np.zeros(len(labels), bool), faults)


def drawn(shapes: list[dict], size: tuple[int, int]) -> np.ndarray:
    """The mask [H, W] uint8 of shapes that are one instance.

    Raises:
        ValueError: a mask's picture cannot be read.
    """
    canvas = Image.new("L", size[::-1])
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        kind, points = _kind(shape), [tuple(map(float, point[:2])) for point in shape["points"]]
        (x, y), (u, v) = points[0], points[-1]
        if kind == "circle":
            _disc(draw, x, y, math.hypot(x - u, y - v))
        elif kind == "rectangle":
            draw.rectangle([min(x, u), min(y, v), max(x, u), max(y, v)], outline=1, fill=1)
        elif kind in ("line", "linestrip"):
            draw.line(points, fill=1, width=_LINE)
        elif kind in ("point", "points"):
            for x, y in points:
                _disc(draw, x, y, _POINT)
        elif kind == "mask":
            part = _embedded(shape["mask"], f"the mask of {shape['label']!r}").convert("L")
            part = part.point(lambda value: 255 * (value > 0))
            canvas.paste(1, (round(min(x, u)), round(min(y, v))), part)
        else:
            draw.polygon(points, outline=1, fill=1)
    return np.asarray(canvas)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=1, fill=1)


def _kind(shape: dict) -> str:
    return str(shape.get("shape_type") or "polygon")


def _fault(shape) -> str | None:
    """What is wrong with a shape."""
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), (str, int)):
        return "must have a label"
    kind, points = _kind(shape), shape.get("points")
    if kind not in _POINTS:
        return f"shape_type must be one of {', '.join(_POINTS)}, got {kind!r}"
    least, most = _POINTS[kind]
    if not isinstance(points, list) or not least <= len(points) <= most:
        rule = f"{least} points" + ("" if least == most else " or more")
        return f"a {kind} must have {rule}, got {points!r:.40}"
    try:
        finite = all(abs(float(x)) <= FAR for point in points for x in point)  # NaN is not
        finite = finite and all(len(point) >= 2 for point in points)
    except (TypeError, ValueError, OverflowError):
        finite = False
    if not finite:
        return f"points must be pairs of numbers up to {FAR}"
    if kind == "mask" and not isinstance(shape.get("mask"), str):
        return "a mask must have its picture in mask"
    return None


def _faults(path: Path, content: dict) -> list[str]:
    found = ((at + 1, shape, _fault(shape)) for at, shape in enumerate(content["shapes"]))
    return [
        f"{path}: shape {at} ({shape.get('label') if isinstance(shape, dict) else shape!r}): "
        f"{fault}; left out"
        for at, shape, fault in found
        if fault is not None
    ]


def _content(path: Path) -> dict:
    """What a file of LabelMe holds.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError(f"{path}: must have a list of shapes, as LabelMe's files do")
    return content


def _picture(path: Path, content: dict) -> Path:
    """The picture of a file; the file itself where it holds the picture.

    Raises:
        ValueError: there is none.
    """
    name = str(content.get("imagePath") or "").replace("\\", "/")
    for place in (path.parent / name, path.parent / name.rpartition("/")[2]):
        if name and place.is_file():
            return place
    for suffix in sorted(picture_suffixes()):
        for place in (path.with_suffix(suffix), path.with_suffix(suffix.upper())):
            if place.is_file():
                return place
    if content.get("imageData"):
        return path
    raise ValueError(f"{path}: its picture {name!r} is not there, and it holds none (imageData)")


def _split(path: Path) -> str | None:
    """The split whose folder a file is in."""
    parts = {part.lower() for part in path.parts[:-1]}
    return next((split for split, names in SPLITS.items() if parts & {*names}), None)


def _opened(path: Path, max_pixels: int | None, upright: bool) -> Image.Image:
    """A picture, or the one that a file of LabelMe holds, which is upright."""
    if path.suffix.lower() != ".json":
        return open_image(path, max_pixels, upright)
    return _embedded(_content(path)["imageData"], f"{path}: imageData", max_pixels)


def embedded(path: Path) -> bytes:
    """The file of the picture that a file of LabelMe holds.

    Raises:
        ValueError: there is none.
    """
    try:
        return base64.b64decode(_content(path)["imageData"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: holds no picture in base64 (imageData)") from error


def _embedded(text: str, what: str, max_pixels: int | None = None) -> Image.Image:
    try:
        return open_image(io.BytesIO(base64.b64decode(text)), max_pixels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is not a picture in base64 that PIL can read") from error
