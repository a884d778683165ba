"""Maps of classes and objects beside pictures: which belong together, and their values."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..io.images import read_head, read_values
from .pictures import FlatPaths, files_below, plain_name

MAPS = (".png", ".tif", ".tiff")  # what maps of classes and objects are stored as


def name_below(path: Path, folder: Path, end: str = "") -> str:
    """A file's path in a folder, without its suffix and an end before that."""
    return plain_name(path.relative_to(folder).with_suffix("").as_posix()).removesuffix(end)


def maps_below(folder: Path, end: str = "", kinds: Sequence[str] = MAPS) -> dict[str, Path]:
    """Maps in a folder and those in it whose names end so, by `name_below`; none where there is no
    such folder."""
    return {
        name_below(path, folder, end): path
        for path in (files_below(folder) if folder.is_dir() else ())
        if path.suffix.lower() in kinds and path.stem.endswith(end)
    }


class MapSizes:
    """Of an index the size (H, W) of its map, by which a turned picture is told; None where that
    is no picture itself."""

    def __init__(self, files: FlatPaths):
        self.files = files

    def __call__(self, index: int) -> tuple[int, int] | None:
        path = self.files[index]
        return read_head(path, 2**62)[0] if path.suffix.lower() in MAPS else None


def paired(
    pictures: dict[Path, str], maps: dict[str, dict[str, Path]], faults: list[str]
) -> tuple[list[Path], list[list[Path]]]:
    """The pictures that have all their maps, and of each kind of map theirs.

    Args:
        pictures: and the names of their maps.
        maps: of each kind by name; its key has {} in place of the name, for messages.
        faults: gets the pictures that are left out.

    Raises:
        ValueError: none has them; names the first.
    """
    found, lost = {}, []
    for path, name in pictures.items():
        lacking = [key for key, known in maps.items() if name not in known]
        if lacking:
            lost.append(f"{path}: has no map {lacking[0].replace('{}', name)}; left out")
        else:
            found[path] = [known[name] for known in maps.values()]
    if not found:
        raise ValueError(lost[0] if lost else f"{next(iter(maps))}: there is no picture of it")
    faults += lost
    return list(found), [list(kind) for kind in zip(*found.values())]


def read_ids(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """[H, W] integers of a map: its values, or red + 256 green + 65536 blue.

    Args:
        path, size: as of `read_map`.

    Raises:
        ValueError: as `read_map`.
    """
    values = read_map(path, size).astype(np.int64, copy=False)
    if values.ndim == 2:
        return values
    if values.shape[2] < 3:  # grey and alpha
        return values[..., 0]
    return values[..., 0] + 256 * values[..., 1] + 65536 * values[..., 2]


def read_map(
    path: Path, size: tuple[int, int] | None = None, channels: int | None = None
) -> np.ndarray:
    """The values of a map, [H, W] integers or [H, W, C] uint8.

    Args:
        path: of the file.
        size: (H, W) of its picture, which it must have, and may have however large that is.
        channels: that it must have, 1 or 3; None takes any.

    Raises:
        ValueError: it cannot be read, or has another size or number of channels; names the file.
    """
    height, width = read_head(path, None if size is None else 2**62)[0]
    if size is not None and (height, width) != size:
        raise ValueError(
            f"{path}: must have the size of its picture, {list(size)}, got {[height, width]}"
        )
    values = read_values(path, None if size is None else height * width)
    found = 1 if values.ndim == 2 else values.shape[2]
    if channels not in (None, found):
        raise ValueError(f"{path}: must have channels: {channels}, got {found}")
    return values
