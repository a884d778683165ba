"""Reads every map of a folder before training: what is bad is found now and not after hours.

What was read is remembered by path, sizes, times and number of classes, so that the next start
reads only what has changed.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..io.atomic_files import atomic
from ..io.images import read_head
from ..structures.labels import void_in


def check_maps(
    pairs: Sequence[tuple[Path, Path]],
    labels_of: Callable[[Path], np.ndarray],
    rule: str,
    progress: bool = True,
    exif: str = "auto",
    max_pixels: int | None = None,
) -> set[int]:
    """Reads maps in parallel and compares their sizes with those of their images.

    Args:
        pairs: images and their maps.
        labels_of: a map's labels [H, W]; a ValueError says what is wrong with it.
        rule: what `labels_of` depends on besides the file.
        progress: show a bar while maps are read.
        exif, max_pixels: as in `ReadConfig`.

    Returns:
        the labels that occur.

    Raises:
        ValueError: a map is bad; names the first, and how many there are.
    """
    memory = _memory(pairs)
    known = _remembered(memory)
    stamps = {str(pair[1]): [rule, *map(_stamp, pair)] for pair in pairs}
    found = {
        path: known[path] for path, stamp in stamps.items() if known.get(path, [0])[0] == stamp
    }
    todo = [pair for pair in pairs if str(pair[1]) not in found]
    bad = []

    def read(pair):
        try:
            return _labels(*pair, labels_of, exif, max_pixels), None
        except ValueError as error:
            return None, str(error)

    bar = Progress(
        TextColumn("check maps"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not (progress and todo),
    )
    with bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for pair, (labels, fault) in bar.track(zip(todo, pool.map(read, todo)), len(todo)):
            if fault is None:
                found[str(pair[1])] = [stamps[str(pair[1])], labels]
            else:
                bad.append(fault)
    if todo:
        with suppress(OSError), atomic(memory) as temporary:  # nowhere to write: read again then
            temporary.write_text(json.dumps(known | found), encoding="utf-8")
    if bad:
        more = f" ({len(bad)} of {len(pairs)} maps are bad)" if len(bad) > 1 else ""
        raise ValueError(bad[0] + more)
    return {label for _, labels in found.values() for label in labels}


def match_sizes(image: Path, size: tuple[int, int], of_map: Path, labels: np.ndarray) -> None:
    """Raises ValueError unless a map has the size of its image."""
    if labels.shape != size:
        raise ValueError(
            f"{of_map}: the map must have the size of {image}, {list(size)}, "
            f"got {list(labels.shape)}"
        )


def _labels(
    image: Path,
    of_map: Path,
    labels_of: Callable[[Path], np.ndarray],
    exif: str,
    max_pixels: int | None,
) -> list[int]:
    """The labels that occur in a map."""
    labels = labels_of(of_map)
    raw, turned, _ = read_head(image, max_pixels)
    size = raw if exif == "raw" or (exif == "auto" and labels.shape == raw) else turned
    match_sizes(image, size, of_map, labels)
    counts = np.bincount(labels.ravel(), minlength=1)
    return counts[: void_in(labels)].nonzero()[0].tolist()


def _stamp(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _memory(pairs: Sequence[tuple[Path, Path]]) -> Path:
    """Where what was read of such a split is remembered."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    name = hashlib.sha256(str(pairs[0][1].resolve().parent).encode()).hexdigest()[:16]
    return cache / "segkern" / "maps" / f"{name}.json"


def _remembered(path: Path) -> dict[str, list]:
    """By path of a map its stamp and labels; nothing where the file is not what was written."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {k: [stamp, list(map(int, labels))] for k, (stamp, labels) in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
