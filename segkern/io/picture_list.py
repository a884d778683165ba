"""Where the pictures of a job are: files, folders, lists, tar archives; never all in memory."""

import heapq
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from torch import Tensor

from .atomic_files import atomic
from .images import picture_suffixes, read_image
from .sources import NamedBytes, is_url, open_source

_AT_ONCE = 2**17  # names that are sorted in memory


class Place(NamedTuple):
    """Where a picture is.

    Attributes:
        path: a file, an address on the network, or the archive that it is in.
        member: its name in the archive; None where it is in none.
        offset, size: of its bytes in the archive.
        error: why there is no picture, where that is known.
    """

    path: str
    member: str | None = None
    offset: int = 0
    size: int = 0
    error: str | None = None

    @property
    def image(self) -> str:
        """The picture's own name: path, address, or name in the archive."""
        return self.path if self.member is None else self.member

    @property
    def archive(self) -> str | None:
        """The archive that it is in, if any."""
        return None if self.member is None else self.path

    @property
    def name(self) -> str:
        """Of the file, without folders."""
        return Path(unquote(urlsplit(self.path).path) if is_url(self.path) else self.image).name

    def __str__(self) -> str:
        return self.path if self.member is None else f"{self.path}: {self.member}"


def read_place(place: Place, max_pixels: int | None = None, channels: int = 3) -> Tensor:
    """The picture as `io.images.read_image` gives it, which has these limits.

    Raises:
        ValueError, OSError: it cannot be read; the message names it.
    """
    if place.error is not None:
        raise ValueError(place.error)
    if place.member is not None:
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            data = file.read(place.size)
        if len(data) < place.size:
            raise ValueError(f"{place}: cut off after {len(data)} of {place.size} bytes")
        source = NamedBytes(data, str(place))
    else:
        source = open_source(place.path) if is_url(place.path) else place.path
    return read_image(source, str(place), max_pixels, channels)


def listed(
    inputs: Iterable[str | Path], lists: Iterable[str | Path] = (), recursive: bool = False
) -> Iterator[Place]:
    """The pictures of inputs, and then of lists, one after another.

    Args:
        inputs: files, folders, of which the files with a suffix that PIL knows are taken, sorted
            by their path, hidden ones left out; and tar archives (.tar), whose members KEY.jpg,
            KEY.png and so on are taken in their order. KEY.seg.png is another member of KEY, as in
            WebDataset, and no picture.
        lists: text files with a path, an address (http://, https://) or an archive a line; a
            relative path begins where the process runs.
        recursive: whether folders in folders count.

    Raises:
        ValueError: an input that is a folder without pictures.
        OSError: a folder or list cannot be read.
    """
    known = picture_suffixes()
    for path in map(os.fspath, inputs):
        if not os.path.isdir(path):
            yield from _of_file(path, known)
            continue
        found = _sorted(_in_folder(path, known, recursive))
        first = next(found, None)
        if first is None:
            raise ValueError(f"folder {path} holds no image")
        yield Place(first)
        yield from map(Place, found)
    for path in lists:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for line in lines:
                if line := line.rstrip("\r\n"):
                    yield from _of_file(line, known)


def _of_file(path: str, known: set[str]) -> Iterator[Place]:
    if path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        yield Place(path, error=f"{path}: a tar archive must be uncompressed (.tar)")
    elif path.lower().endswith(".tar") and not is_url(path):
        yield from _in_archive(path, known)
    else:
        yield Place(path)


def _in_folder(folder: str, known: set[str], recursive: bool) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if recursive and not entry.is_symlink():  # which may lead round in a circle
                    yield from _in_folder(entry.path, known, recursive)
            elif os.path.splitext(entry.name)[1].lower() in known and entry.is_file():
                yield entry.path


def _in_archive(path: str, known: set[str]) -> Iterator[Place]:
    pictures, other = 0, None
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # it would keep all
                key, dot, suffix = os.path.basename(member.name).partition(".")
                if not member.isreg() or member.issparse() or not key:
                    continue
                if f"{dot}{suffix}".lower() in known:
                    pictures += 1
                    yield Place(path, member.name, member.offset_data, member.size)
                elif os.path.splitext(suffix)[1].lower() in known:
                    other = member.name
    except FileNotFoundError:
        yield Place(path, error=f"{path}: no such file")
    except (tarfile.TarError, OSError) as error:
        after = f" after {pictures} pictures" if pictures else ""
        yield Place(path, error=f"{path}: not a whole tar archive{after} ({error})")
    else:
        if not pictures:
            such = "" if other is None else f"; {other} is an annotation beside one"
            yield Place(path, error=f"{path}: holds no picture KEY.jpg, KEY.png, ...{such}")


def _sorted(names: Iterator[str]) -> Iterator[str]:
    """Any number of names, sorted; what is more than memory shall hold is sorted on disk."""
    some = sorted(itertools.islice(names, _AT_ONCE))
    if len(some) < _AT_ONCE:
        yield from some
        return
    with tempfile.TemporaryDirectory(prefix="segkern-") as folder:
        files = []
        for number in itertools.count():
            if not some:
                break
            path = Path(folder, str(number))
            with path.open("w") as file:
                file.writelines(f"{json.dumps(name)}\n" for name in some)
            files.append(path.open())
            some = sorted(itertools.islice(names, _AT_ONCE))
        try:
            yield from heapq.merge(*(map(json.loads, file) for file in files))
        finally:
            for file in files:
                file.close()


def write_list(path: Path, places: Iterable[Place]) -> None:
    """Writes places to a file, one a line, whole or not at all."""
    with atomic(path) as temporary, temporary.open("w") as file:
        file.writelines(f"{json.dumps(place)}\n" for place in places)


def read_list(path: Path, size: int) -> Iterator[tuple[int, Sequence[str]]]:
    """Blocks of `size` lines of such a file and their numbers; `parsed` reads one."""
    with path.open() as lines:
        for number in itertools.count():
            block = list(itertools.islice(lines, size))
            if not block:
                return
            yield number, block


def parsed(line: str) -> Place:
    """A place of a line that `write_list` wrote."""
    return Place(*json.loads(line))
