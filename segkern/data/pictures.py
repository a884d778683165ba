"""Pictures with segments, of whatever format: finding files, reading, what is left out and why."""

import hashlib
import os
import unicodedata
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from ..io.images import open_image, picture_suffixes, read_head, read_pixels
from ..structures.labels import void_in, void_of
from ..structures.targets import fresh
from .sample import IdMaps, Sample, distinct, generator_of, label_table
from .views import InstanceViews, ViewConfig

FAR = (
    100_000  # pixels: corners that lie further out are faults, and drawing to them would never end
)
_MOST_TOLD = 20  # warnings while a data set is read
# names of the splits' folders and files
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testdev"),
}


@dataclass
class ReadConfig:
    """How files are read.

    Attributes:
        exif: whether annotations are drawn on the upright picture ("upright") or on its pixels as
            they lie in the file ("raw"), where its EXIF tag turns it. "auto" takes the one whose
            size is the stated one, else the upright picture with a warning.
        max_pixels: width times height that a picture may have; None takes Pillow's limit.
        val_share: of the pictures that are held out where the data has no val split, in [0, 1).
        channels: of the pictures, as the model's `input.channels`. Others than 3 are TIFFs, whose
            bands are taken as they lie in the file.
    """

    exif: Literal["auto", "upright", "raw"] = "auto"
    max_pixels: int | None = None
    val_share: float = 0.1
    channels: int = 3

    def __post_init__(self):
        if self.exif not in ("auto", "upright", "raw"):
            raise ValueError(f"exif must be auto, upright or raw, got {self.exif!r}")
        if not 0 <= self.val_share < 1:
            raise ValueError(f"val_share must be in [0, 1), got {self.val_share}")
        if self.channels < 1:
            raise ValueError(f"channels must be >= 1, got {self.channels}")


class FlatPaths(Sequence):
    """Paths in one array: as objects, each process that loads pictures would copy them all."""

    def __init__(self, paths: Sequence[Path]):
        self.names = np.array([os.fsencode(path) for path in paths], np.bytes_)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return Path(os.fsdecode(self.names[index].item()))


class Truth(NamedTuple):
    """The segments of a picture, what was left out of them and why, and its map of labels where
    that is another than the segments tell."""

    masks: IdMaps
    labels: np.ndarray  # [n] int64
    crowd: np.ndarray  # [n] bool
    faults: list[str]
    semantic: np.ndarray | None = None  # [H, W] uint8 or uint16, as of a `Sample`

    @classmethod
    def of_map(cls, semantic: np.ndarray, faults: Sequence[str] = ()) -> "Truth":
        """The classes of a map of labels, a segment each."""
        present = distinct(semantic)
        labels = present[present != void_in(semantic)].astype(np.int64)
        masks = IdMaps.of_map(semantic, labels)
        return cls(masks, labels, np.zeros(len(labels), bool), list(faults), semantic)


class Pictures:
    """Picture i of a split as a `Sample`; files are read when it is asked for.

    Whole: image, masks, labels, crowd, id, path and, with `semantic`, a map of labels. With views,
    which differ from pass to pass (`data[i, pass]`; `data[i]` is that of pass 0): pixel_values in
    place of image. A view depends on seed, i and the pass alone. A picture that cannot be read
    gives a warning that names it, and the next one in its place.

    Attributes:
        paths: of the pictures.
        classes: name of each label.
        things, stuff: labels with and without instances.
        passes: whether samples differ from pass to pass.
        faults: what was left out when the annotations were read, with the file and the reason.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        truth: Callable[[int, tuple[int, int]], Truth],
        classes: Sequence[str],
        stuff: Sequence[int] = (),
        read: ReadConfig | None = None,
        views: InstanceViews | None = None,
        seed: int = 0,
        sizes: np.ndarray | Callable[[int], tuple[int, int] | None] | None = None,
        semantic: bool = False,
        faults: Sequence[str] = (),
        opened: Callable = open_image,
    ):
        """
        Args:
            paths: of the pictures, in the order of the samples.
            truth: called with an index and the picture's size, gives its segments.
            classes, stuff: as above.
            read: how files are read.
            views: for training; None leaves pictures whole.
            seed: other seeds give other views.
            sizes: [N, 2] integers, H and W that the annotations state, 0 where they do not; or
                what gives them, or None, of an index.
            semantic: samples have a map of labels, too; masks lie apart then.
            faults: as above; a warning tells the first and counts them.
            opened: reads a picture, as `open_image` does.

        Raises:
            ValueError: nothing is left.
        """
        if not len(paths):
            raise ValueError(faults[0] if faults else "the data set holds no picture")
        self.paths, self.truth = FlatPaths(paths), truth
        self.classes, self.stuff = list(classes), tuple(stuff)
        self.things = tuple(k for k in range(len(classes)) if k not in self.stuff)
        self.read, self.views, self.seed = read or ReadConfig(), views, seed
        self.sizes, self.semantic, self.opened = sizes, semantic, opened
        self.passes, self.faults, self.told = views is not None, list(faults), set()
        if faults:
            more = f" ({len(faults)} such findings)" if len(faults) > 1 else ""
            warnings.warn(f"{faults[0]}{more}", stacklevel=3)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int | tuple[int, int]) -> Sample:
        return viewed(self, place)

    def __getitems__(self, places: Sequence[int | tuple[int, int]]) -> list[Sample]:
        """Samples of a batch, as loaders ask for them: views lie in one array, as `collate` wants
        them."""
        if self.views is None:
            return [self[place] for place in places]
        pixels = fresh(len(places), self.read.channels, *self.views.config.size, sent=True)
        return [viewed(self, place, out) for place, out in zip(places, pixels)]

    def examined(self, index: int) -> tuple[Sample, list[str]]:
        """A whole sample, and what was left out of it and why.

        Raises:
            ValueError: it cannot be read; names the file.
        """
        path, stated = self.paths[index], self._stated(index)
        image = self.pixels(index)
        size = image.shape[:2]
        if stated not in (None, size) and not callable(self.sizes):  # maps are checked when read
            raise ValueError(
                f"{path}: the picture must have the size that its annotations state, "
                f"{list(stated)}, got {list(size)}"
            )
        masks, labels, crowd, faults, semantic = self.truth(index, size)
        if not (seen := masks.areas() > 0).all():
            masks, labels, crowd = masks.chosen(seen), labels[seen], crowd[seen]
            faults = [*faults, f"{path}: {(~seen).sum()} segments without a pixel are left out"]
        sample = {"image": image, "masks": masks, "labels": labels, "crowd": crowd}
        if self.semantic and semantic is None:
            semantic = label_table([void_of(len(self.classes)), *labels])[masks.maps[0]]
        if self.semantic:
            sample["semantic"] = semantic
        return sample | {"id": index, "path": str(path)}, faults

    def pixels(self, index: int) -> np.ndarray:
        """A picture alone, [H, W, C] uint8, as its annotations are drawn on it.

        Raises:
            ValueError: it cannot be read; names the file.
        """
        return read_drawn(self.paths[index], self._stated(index), self.read, self.opened)

    def _stated(self, index: int) -> tuple[int, int] | None:
        """(H, W) that the annotations of a picture state."""
        if self.sizes is None or callable(self.sizes):
            return self.sizes and self.sizes(index)
        return tuple(self.sizes[index].tolist()) if self.sizes[index].all() else None


def viewed(data, place: int | tuple[int, int], out: Tensor | None = None) -> Sample:
    """Sample (index, pass) of a data set with `examined`, `told`, `views` and `seed`; of an index
    alone that of pass 0. `out` as of `InstanceViews`."""
    index, epoch = place if isinstance(place, tuple) else (place, 0)
    if not 0 <= index < len(data):
        name = type(data).__name__
        raise IndexError(f"{name}: index must be in [0, {len(data)}), got {index}")
    sample = readable(data.examined, index, len(data), data.told)
    if data.views is None:
        return sample
    return data.views(sample, generator_of(data.seed, epoch, index), out)


def read_drawn(
    path: Path,
    stated: tuple[int, int] | None,
    read: ReadConfig,
    opened: Callable = open_image,
) -> np.ndarray:
    """A picture as its annotations are drawn on it, upright or as its pixels lie in the file.

    Args:
        path: of the picture.
        stated: (H, W) of the annotations; None where they do not say.
        read: how.
        opened: `open_image` or its like.

    Returns:
        [H, W, C] uint8.

    Raises:
        ValueError: it cannot be read; names it.
    """
    if read.channels != 3:
        return read_pixels(path, str(path), read.max_pixels, read.channels)
    upright = read.exif != "raw"
    if read.exif == "auto" and path.suffix.lower() != ".json":  # no picture in its annotations
        raw, turned, orientation = read_head(path, read.max_pixels)
        if stated == raw != turned:
            upright = False
        elif orientation != 1 and (stated is None or raw == turned):
            warnings.warn(
                f"{path}: its EXIF tag (orientation {orientation}) turns it, and sizes do not "
                "tell whether its annotations are drawn on the turned picture: they are taken "
                "so; exif='raw' takes them as drawn on the pixels as they lie in the file",
                stacklevel=2,
            )
    return read_pixels(opened(path, read.max_pixels, upright), str(path))


def readable(examined: Callable, index: int, count: int, told: set[str]) -> Sample:
    """The sample of an index, or the next that can be read; warnings tell what was left out.

    Args:
        examined: gives a sample and what was left out of it, or raises ValueError.
        index: of the sample.
        count: of all.
        told: what warnings have told of the data set, each once and not more than a few.

    Raises:
        ValueError: none can be read.
    """
    unread = None
    for step in range(count):
        try:
            sample, faults = examined((index + step) % count)
        except ValueError as error:
            reason = str(error)
            unread = unread or reason
            tell(f"{reason}; the next picture stands for it", told)
            continue
        for fault in faults:
            tell(fault, told)
        return sample if unread is None else sample | {"unread": unread}
    raise ValueError(f"{reason}; no picture is left that can be read")


def tell(text: str, told: set[str]) -> None:
    """Warns of a finding, each once and not more than a few of all in `told`."""
    if text not in told and len(told) < _MOST_TOLD:
        told.add(text)
        end = "; further findings are not told" if len(told) == _MOST_TOLD else ""
        warnings.warn(text + end, stacklevel=4)


def files_below(folder: Path) -> list[Path]:
    """Files in a folder and those in it, sorted; no hidden ones; links followed, but no loops."""
    return sorted(_walk(folder, ()), key=lambda path: path.parts)


def pictures_below(folder: Path) -> list[Path]:
    """Pictures in a folder and those in it, as `files_below`."""
    known = picture_suffixes()
    return [path for path in files_below(folder) if path.suffix.lower() in known]


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), (*above, real))
            elif entry.is_file():
                yield Path(entry.path)


class Names:
    """Files of a folder by the names that annotations give them.

    Names are relative to the folder, with slashes of either kind; where there is no such file, one
    alone of that last part is taken. Accents may be one letter or two.
    """

    def __init__(self, folder: Path, files: Sequence[Path]):
        self.folder, self.known, self.last = folder, {}, {}
        for path in files:
            self.known[plain_name(path.relative_to(folder).as_posix())] = path
            last = plain_name(path.name)
            self.last[last] = None if last in self.last else path

    def there(self, name: str) -> Path | None:
        """The file of that name, and no other."""
        return self.known.get(plain_name(name.replace("\\", "/")).removeprefix("./"))

    def get(self, name: str) -> Path | None:
        """The file of that name, or the one that ends so."""
        last = plain_name(name.replace("\\", "/")).rpartition("/")[2]
        return self.there(name) or self.last.get(last)


def plain_name(name: str) -> str:
    """A name with each accent in one letter: systems write them in one or two."""
    return unicodedata.normalize("NFC", name)


def held_out(names: Sequence[str], split: str, share: float, where: Path) -> list[int]:
    """Places of the names that are in a split, where the data `where` has no val split: a share is
    val, by a hash of the name, at least one and never all. Says so."""
    ranks = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    count = min(max(1, round(share * len(names))), len(names) - 1) if share else 0
    if count > 0 and split == "train":
        warnings.warn(
            f"{where}: has no val split, so {count} of its {len(names)} pictures are held out for "
            "it, by a hash of their names (val_share)",
            stacklevel=4,
        )
    return sorted(ranks[:count] if split == "val" else ranks[max(count, 0) :])


def expect_split(name: str, split: str) -> None:
    """Raises ValueError unless it is train or val."""
    if split not in ("train", "val"):
        raise ValueError(f"{name}: split must be train or val, got {split!r}")


def expect_task(config, *known: str) -> None:
    """Raises ValueError unless the task of a config is one of those known."""
    if config.task not in known:
        names = f"{', '.join(known[:-1])} or {known[-1]}"
        raise ValueError(f"{type(config).__name__}: task must be {names}, got {config.task!r}")


def settle(config) -> None:
    """Brings the settings that all formats have, `root`, `read` and `views`, into their types; a
    stored run has them plain, and is also gone on with from other folders."""
    config.root = Path(config.root).absolute()
    for name, kind in (("read", ReadConfig), ("views", ViewConfig)):
        value = getattr(config, name)
        setattr(config, name, kind(**value) if isinstance(value, dict) else value)


def number(value) -> Hashable:
    """An id as it is compared: 1, 1.0 and "1" are the same."""
    try:
        return int(value) if int(value) == float(value) else value
    except (TypeError, ValueError, OverflowError):
        return str(value)
