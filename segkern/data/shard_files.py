"""What a set of shards consists of: tar files of samples, where each begins, and an index of all.

    index.json        format, version, task, channels, classes, views, and of each split its shards
    train-00000.tar   members of a sample one after the other: KEY.jpg (or .png ...: the file as it
                      was), KEY.json and, but for instances, KEY.seg.png
    train-00000.idx   n + 1 integers of 64 bits, least byte first: where the samples of the tar
                      begin, and where the last ends

KEY.json:
    file_name, height, width   of the picture in the set that it is from, and as it is drawn on
    upright                    whether segments are drawn on the picture as its EXIF tag turns it
    annotations                of each segment category_id (place in `classes`, from 0), iscrowd,
                               bbox [x, y, width, height], area and segmentation, a compressed
                               run-length code {"size": [height, width], "counts"}, as COCO has it
KEY.seg.png holds the label of each pixel, in 8 bits, or in 16 of more than 255 classes; 255 (of 16
bits 65535) does not count. Sets of the semantic task have no annotations: each class of a map is a
segment.

Members are read into memory, by their suffix, and none is unpickled; their names never become
paths. The tar files are WebDataset's.
"""

import json
import re
import tarfile
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..io.images import picture_suffixes
from ..io.sources import MAX_BYTES, fetch_patiently, is_url

INDEX, FORMAT, VERSION = "index.json", "segkern shards", 1
STATE = "unfinished.json"  # in place of the index, where writing was stopped
SEG = "seg.png"
TASKS = {  # of the task of a set, those that can be read from it
    "panoptic": ("panoptic", "instance", "semantic"),
    "instance": ("instance",),
    "semantic": ("semantic",),
}
_PLAIN = re.compile(r"[\w-]+\.tar")


class LostShard(ValueError):
    """A shard cannot be read from a sample on."""


class Shard(NamedTuple):
    """A row of the index.

    Attributes:
        file: name of the tar file.
        samples: in it.
        bytes: its size.
    """

    file: str
    samples: int
    bytes: int


class Index(NamedTuple):
    """What index.json says.

    Attributes:
        task: "panoptic", "instance" or "semantic".
        channels: of the pictures.
        classes: name of each label.
        stuff: labels without instances.
        views: settings of `ViewConfig` of the set that it was made from.
        splits: shards of each.
    """

    task: str
    channels: int
    classes: list[str]
    stuff: tuple[int, ...]
    views: dict
    splits: dict[str, list[Shard]]

    def text(self) -> dict:
        """What JSON holds of it."""
        rows = [{"name": n, "isthing": k not in self.stuff} for k, n in enumerate(self.classes)]
        splits = {name: [shard._asdict() for shard in part] for name, part in self.splits.items()}
        head = {"format": FORMAT, "version": VERSION, "task": self.task, "channels": self.channels}
        return head | {"classes": rows, "views": self.views, "splits": splits}


def has_index(root: Path) -> bool:
    """Whether a folder holds the index of shards."""
    try:
        content = json.loads((root / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_index(root: str) -> Index:
    """The index of a set of shards.

    Args:
        root: folder, or an address (http://, https://) below which the files lie.

    Raises:
        OSError: it cannot be fetched.
        ValueError: there is none, or it is not as it must be; names what.
    """
    place = f"{root}/{INDEX}"
    try:
        text = fetch_patiently(place, "shards") if is_url(root) else Path(place).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{place}: no such file: {_LACKING}") from error
    try:
        content = json.loads(text)
        if content.get("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT!r}, got {content.get('format')!r:.40}")
        if content.get("version") != VERSION:
            raise ValueError(
                f"version must be {VERSION}, as this version of segkern reads it, "
                f"got {content.get('version')!r:.40}"
            )
        names = [row["name"] for row in content["classes"]]
        stuff = tuple(k for k, row in enumerate(content["classes"]) if not row["isthing"])
        splits = {k: [_shard(row) for row in part] for k, part in content["splits"].items()}
        found = Index(content["task"], content["channels"], names, stuff, content["views"], splits)
        if found.task not in TASKS or type(found.channels) is not int or found.channels < 1:
            raise ValueError(f"task and channels: {found.task!r:.40}, {found.channels!r:.40}")
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("classes must have names")
        return found
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{place}: no index of shards: {what}") from error


_LACKING = (
    "shards are read by the index that `segkern data shard` writes beside them, with the names of "
    "the classes and the samples of each shard; make shards of others anew from the set that they "
    "are from"
)


def no_index(root: Path, shards: list[Path]) -> str:
    """What to say of tar files without an index."""
    if (root / STATE).is_file():
        return f"{root}: holds shards whose writing was stopped: go on with `segkern data shard`"
    return f"{root}: holds tar files ({shards[0].name}), but no {INDEX}: {_LACKING}"


def _shard(row: dict) -> Shard:
    shard = Shard(row["file"], row["samples"], row["bytes"])
    if not isinstance(shard.file, str) or not _PLAIN.fullmatch(shard.file):
        raise ValueError(f"file must be a plain name with .tar, got {shard.file!r:.60}")
    if type(shard.samples) is not int or shard.samples < 1 or type(shard.bytes) is not int:
        raise ValueError(f"{shard.file}: samples and bytes must be integers")
    return shard


def read_sample(root: str, shard: Shard, k: int) -> dict[str, bytes]:
    """The members of sample k of a shard, by suffix ("jpg", "json", "seg.png"), and its key as "".

    Of a shard on a server only the bytes of the sample are fetched.

    Raises:
        LostShard: the shard is not there, or ends before this sample.
        ValueError: there is no such sample; names the shard.
    """
    place = f"{root}/{shard.file}"
    places = place.removesuffix("tar") + "idx"
    try:
        if is_url(root):
            begin, end = _fetched_places(places, shard.samples)[k : k + 2].tolist()
        else:
            begin, end = _read_places(Path(place), Path(places), shard.samples, k)
        if not 0 <= begin < end <= shard.bytes:
            raise LostShard(f"{places}: must have rising places, got {begin} and {end}")
        if is_url(root):
            data = fetch_patiently(place, "shards", (begin, end), max_bytes=end - begin)
        else:
            with open(place, "rb") as file:
                file.seek(begin)
                data = file.read(end - begin)
    except FileNotFoundError as error:
        raise LostShard(f"{place}: no such file") from error
    except OSError as error:
        raise LostShard(f"{place}: sample {k} cannot be read ({error})") from error
    if len(data) < end - begin:
        raise LostShard(f"{place}: sample {k} cannot be read: the file ends before (cut short)")
    return _members(data, f"{place}: sample {k}")


def _members(data: bytes, name: str) -> dict[str, bytes]:
    """Members of the part of a tar file that holds one sample."""
    found = {"": b""}
    try:
        with tarfile.open(fileobj=BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition("/")[2].partition(".")
                if not member.isreg() or member.issparse() or member.size > len(data):
                    raise ValueError(f"member {member.name!r:.60} must be a plain file")
                if found[""] not in (b"", key.encode()):
                    raise ValueError(f"holds members of several ({key!r:.60})")
                found[""] = key.encode()
                if suffix.lower() in found:
                    raise ValueError(f"member {member.name!r:.60} is there twice")
                found[suffix.lower()] = tar.extractfile(member).read()
    except (tarfile.TarError, ValueError, UnicodeError) as error:
        raise ValueError(f"{name}: {error}") from error
    return found


def picture_of(members: dict[str, bytes], name: str) -> bytes:
    """The bytes of a sample's picture.

    Raises:
        ValueError: it has none, or several.
    """
    known = picture_suffixes()
    found = [suffix for suffix in members if suffix != SEG and f".{suffix}" in known]
    if len(found) != 1:
        there = ", ".join(sorted(filter(None, members))) or "none"
        raise ValueError(f"{name}: must have one picture, got members {there}")
    return members[found[0]]


def json_of(members: dict[str, bytes], name: str) -> dict:
    """A sample's annotations.

    Raises:
        ValueError: there is no JSON, or it is none.
    """
    try:
        content = json.loads(members["json"])
    except KeyError as error:
        raise ValueError(f"{name}: has no JSON of annotations") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: its JSON cannot be read ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise ValueError(f"{name}: its JSON must have a list of annotations")
    return content


def _read_places(tar: Path, places: Path, samples: int, k: int) -> list[int]:
    """Where sample k of a tar file begins and ends."""
    try:
        with places.open("rb") as file:
            if (size := places.stat().st_size) != 8 * (samples + 1):
                raise LostShard(f"{places}: must have {8 * (samples + 1)} bytes, got {size}")
            file.seek(8 * k)
            return np.frombuffer(file.read(16), "<i8").tolist()
    except FileNotFoundError:
        return _found_places(tar, tar.stat().st_mtime_ns, samples)[k : k + 2]


@lru_cache(maxsize=64)
def _fetched_places(url: str, samples: int) -> np.ndarray:
    """[n + 1] int64: where samples of a tar file on a server begin, and where the last ends."""
    size = 8 * (samples + 1)
    data = fetch_patiently(url, "shards", max_bytes=max(size, MAX_BYTES))
    if len(data) != size:
        raise LostShard(f"{url}: must have {size} bytes, got {len(data)}")
    return np.frombuffer(data, "<i8")


@lru_cache(maxsize=64)
def _found_places(tar: Path, changed: int, samples: int) -> list[int]:
    """The same, read from the heads of a tar file without a file of places, which `changed` last
    at that time; samples that it does not have, as it is cut short, begin where it ends."""
    starts, last = [], None
    try:
        with tarfile.open(tar, "r:") as heads:
            for member in heads:
                key = member.name.rpartition("/")[2].partition(".")[0]
                if key != last:
                    starts.append(member.offset)
                end, last = member.offset_data + -(-member.size // 512) * 512, key
    except tarfile.TarError as error:
        if not starts:
            raise LostShard(f"{tar}: no tar file ({error})") from error
    if len(starts) > samples or last is None:
        raise LostShard(f"{tar}: must have {samples} samples, got {len(starts)}")
    return starts + [end + i for i in range(samples + 1 - len(starts))]
