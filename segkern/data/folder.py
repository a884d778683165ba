"""Images and maps of their classes in folders: of ADE20K, Cityscapes, Pascal Context or one's own.

Letters: H W image size, K class.

    layout          images of the training split     maps                              values
    ade20k          images/training/NAME.jpg         annotations/training/NAME.png     1 to 150
    cityscapes      leftImg8bit/train/CITY/NAME      gtFine/train/CITY/NAME            ids, or
                      _leftImg8bit.png                 _gtFine_labelIds.png              train ids
    pascal_context  JPEGImages/NAME.jpg              SegmentationClassContext/NAME.png 0 to 59
    plain           images/train/NAME.jpg            labels/train/NAME.png             0 to K - 1

The val split is in validation, val and val; the splits of Pascal Context are lists of names,
ImageSets/SegmentationContext/train.txt and val.txt. An image may be of any kind that PIL reads, a
map is a PNG or TIFF of one channel or a palette; 255 is void everywhere (65535 where there are
more than 255 classes), and so are ADE20K's 0 and those ids of Cityscapes that are none of its 19
classes; Pascal Context's 0, the background, is a class.
Where Cityscapes has maps of train ids, too (_gtFine_labelTrainIds.png), they are taken.
Source: ADE20K's scene parsing benchmark (Zhou et al., CVPR 2017); Cityscapes (Cordts et al., CVPR
2016); Pascal Context (Mottaghi et al., CVPR 2014) as MMSegmentation's converter leaves it in
VOCdevkit/VOC2010.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from ..io.images import read_values
from ..structures.labels import CITYSCAPES, PASCAL_CONTEXT, VOID, WIDE_VOID, void_of
from .ade20k import challenge_names
from .check import check_maps, match_sizes
from .maps import maps_below
from .pictures import ReadConfig, pictures_below, plain_name, read_drawn, readable
from .sample import Sample, generator_of
from .transforms import SemanticViews

Layout = Literal["ade20k", "cityscapes", "pascal_context", "plain"]


class _Layout(NamedTuple):
    """Folders of images and maps, those of the splits in them, how names end that are the same
    before, and the folder of the lists where splits are lists of names."""

    images: str
    maps: str
    train: str = "train"
    val: str = "val"
    end: str = ""
    map_ends: tuple[str, ...] = ("",)
    lists: str | None = None


_LAYOUTS = {
    "ade20k": _Layout("images", "annotations", "training", "validation"),
    "cityscapes": _Layout(
        "leftImg8bit",
        "gtFine",
        end="_leftImg8bit",
        map_ends=("_gtFine_labelTrainIds", "_gtFine_labelIds"),
    ),
    "pascal_context": _Layout(
        "JPEGImages", "SegmentationClassContext", lists="ImageSets/SegmentationContext"
    ),
    "plain": _Layout("images", "labels"),
}


@dataclass
class FolderConfig:
    """Images and maps of their classes in folders.

    Attributes:
        root: the folder that holds those of images and maps.
        layout: "ade20k", "cityscapes", "pascal_context" (root is VOCdevkit/VOC2010) or "plain":
            images/{train,val} and labels/{train,val} with the same names, and classes.txt with a
            name a line.
        seed: other seeds give other views of the training images.
        exif, channels: as in `ReadConfig`.
        max_pixels: width times height that an image or map may have; None is Pillow's limit of
            178,956,970, which keeps a small file from filling the memory.
    """

    kind: ClassVar[str] = "folder"
    targets: ClassVar[tuple[str, ...]] = ("semantic",)
    task: ClassVar[str] = "semantic"

    root: Path = Path(".")
    layout: Layout = "plain"
    seed: int = 0
    exif: Literal["auto", "upright", "raw"] = "auto"
    max_pixels: int | None = None
    channels: int = 3

    def __post_init__(self):
        self.root = Path(self.root).absolute()  # a run is also gone on with from other folders
        _ = self.read  # checks its own
        if self.layout not in _LAYOUTS:
            raise ValueError(
                f"FolderConfig: layout must be one of {', '.join(_LAYOUTS)}, got {self.layout!r}"
            )
        if self.seed < 0:
            raise ValueError(f"FolderConfig: seed must be >= 0, got {self.seed}")

    @property
    def read(self) -> ReadConfig:
        """How files are read."""
        return ReadConfig(self.exif, self.max_pixels, channels=self.channels)


class Folder:
    """Image i of a split as a dict; files are read when it is asked for.

    Whole: image [H, W, 3] uint8, semantic [H, W], label of each pixel, as of a `Sample`; id, int.
    With views, which differ from pass to pass (`data[i, pass]`; `data[i]` is that of pass 0):
    pixel_values [3, H, W] float32 normalised, semantic, id, and no masks and labels. A view
    depends on the config's seed, i and the pass alone.

    Attributes:
        classes: name of each label.
        things, stuff: labels with and without instances: none and all.
        passes: whether samples differ from pass to pass.
    """

    def __init__(
        self, config: FolderConfig, split: str = "train", views: SemanticViews | None = None
    ):
        """
        Args:
            config: which folder.
            split: "train" or "val".
            views: what to make of each image; None leaves them whole.

        Raises:
            ValueError: no such split, a folder or the file of the classes is missing, there is no
                image, or one has no map; says which.
        """
        if split not in ("train", "val"):
            raise ValueError(f"Folder: split must be train or val, got {split!r}")
        self.config, self.views, self.passes = config, views, views is not None
        self.told: set[str] = set()
        self.pairs = _pairs(config, split)
        self.classes = class_names(config)
        self.things, self.stuff = (), tuple(range(len(self.classes)))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int | tuple[int, int]) -> Sample:
        index, epoch = place if isinstance(place, tuple) else (place, 0)
        if not 0 <= index < len(self):
            raise IndexError(f"Folder: index must be in [0, {len(self)}), got {index}")
        sample = readable(self.examined, index, len(self), self.told)
        if self.views is None:
            return sample
        image = sample.pop("image")
        generator = generator_of(self.config.seed, epoch, index)
        view = self.views(image, sample["semantic"], generator)
        none = np.zeros((0, *view["semantic"].shape), np.uint8)
        return sample | view | {"masks": none, "labels": np.zeros(0, np.int64)}

    def examined(self, index: int) -> tuple[Sample, list[str]]:
        """A whole sample, and what was left out of it, which is nothing.

        Raises:
            ValueError: it cannot be read; names the file.
        """
        of_image, of_map = self.pairs[index]
        labels = self.labels(of_map)
        image = read_drawn(of_image, labels.shape, self.config.read)
        match_sizes(of_image, image.shape[:2], of_map, labels)
        sample = {"image": image, "semantic": labels, "id": index, "path": str(of_image)}
        return sample, []

    def check(self, progress: bool = True) -> list[str]:
        """Reads every map, in parallel; those that were read before and are as they were are not
        read again.

        Args:
            progress: show a bar.

        Returns:
            names of the classes that occur in none.

        Raises:
            ValueError: a map is bad; names the first, and how many there are.
        """
        rule = f"{self.config.layout}, {len(self.classes)} classes, exif {self.config.exif}"
        settings = self.config.exif, self.config.max_pixels
        found = check_maps(self.pairs, self.labels, rule, progress, *settings)
        return [name for k, name in enumerate(self.classes) if k not in found]

    def labels(self, path: Path) -> np.ndarray:
        """Labels [H, W] of a map's values: uint8, or uint16 of more than 255 classes.

        Raises:
            ValueError: no map of one channel, or a value that stands for no class; names the file.
        """
        values, K = read_values(path, self.config.max_pixels), len(self.classes)
        void = void_of(K)
        if values.ndim != 2:
            raise ValueError(f"{path}: a map must have one channel, got {values.shape[2]}")
        table = np.full(void + 2, -1)  # of a value its label; -1: stands for none
        table[void] = void
        if self.config.layout == "ade20k":
            table[0], table[1 : K + 1] = void, range(K)
        elif path.stem.endswith("_labelIds"):
            table[:34] = void
            table[list(CITYSCAPES.values())] = range(K)
        else:
            table[:K] = range(K)
        wide = values.dtype != np.uint8
        if wide:
            wider = values.astype(np.int64)
            labels = table[np.where((wider < 0) | (wider > void), void + 1, wider)]
        else:
            labels = table[values]
        if (labels < 0).any():
            found = np.unique(values[labels < 0])
            hint = ""
            if self.config.layout == "plain" and found.tolist() == [K]:
                hint = ": labels count from 0"
            raise ValueError(
                f"{path}: values must be those of layout {self.config.layout} with {K} classes, "
                f"or {void}, got {', '.join(map(str, found[:4]))}{hint}"
            )
        return labels.astype(np.uint8 if void == VOID else np.uint16)


def class_names(config: FolderConfig) -> list[str]:
    """Names of the labels: Cityscapes' 19, Pascal Context's 60, ADE20K's 150, or the lines of
    classes.txt.

    Raises:
        ValueError: the file is missing or does not hold names; 1 to 65535 of classes.txt.
    """
    if config.layout == "cityscapes":
        return list(CITYSCAPES)
    if config.layout == "pascal_context":
        return list(PASCAL_CONTEXT)
    if config.layout == "ade20k":
        return challenge_names(config.root)
    path = config.root / "classes.txt"
    names = [line.strip() for line in _lines(path)]
    if not 1 <= len(names) <= WIDE_VOID or not all(names):
        raise ValueError(
            f"{path}: must have 1 to {WIDE_VOID} names, one a line and no empty line, "
            f"got {len(names)}"
        )
    return names


def _lines(path: Path, what: str = "the names of the classes") -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; it has {what}, one a line") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be text in UTF-8 ({error})") from error


def _pairs(config: FolderConfig, split: str) -> list[tuple[Path, Path]]:
    """Images and their maps, in the order of the images' names below the split's folder.

    Raises:
        ValueError: a folder or list is missing, there is no image, or one has no map.
    """
    layout = _LAYOUTS[config.layout]
    part, end = "" if layout.lists else getattr(layout, split), layout.end
    images, maps = config.root / layout.images / part, config.root / layout.maps / part
    for folder in (config.root, images, maps):
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: no such folder; layout {config.layout} has the {split} split in "
                f"{images} and {maps}"
            )
    names = [path.relative_to(images) for path in pictures_below(images)]
    names = [name for name in names if name.stem.endswith(end)]
    if layout.lists:
        lists = config.root / layout.lists / f"{split}.txt"
        listed = {line.strip() for line in _lines(lists, "the names of the images")}
        names = [name for name in names if name.stem in listed]
        if not listed:
            raise ValueError(f"{lists}: names no image")
        if lost := sorted(listed - {name.stem for name in names}):
            raise ValueError(f"{images}: has no image {lost[0]}, which the {split} split lists")
    if not names:
        raise ValueError(f"{images}: holds no image{f' *{end}.png' if end else ''}")
    there = maps_below(maps)
    found, lacking = [], []
    for name in names:
        stem = plain_name(name.with_suffix("").as_posix()).removesuffix(end)
        candidates = [stem + map_end for map_end in layout.map_ends]
        of_map = next((there[c] for c in candidates if c in there), None)
        if of_map is None:
            lacking.append((name, f"{candidates[-1]}.png"))
        else:
            found.append((images / name, of_map))
    if lacking:
        name, wanted = lacking[0]
        raise ValueError(
            f"{images / name}: has no map {maps / wanted} ({len(lacking)} of {len(names)} images "
            "have none)"
        )
    return found
