"""Writes a data set as shards: pictures as their files are, segments as run-length codes and maps.

A shard has its name when it is whole; a stopped run goes on after the last. shard_files.py says
what the files hold.
"""

import hashlib
import io
import json
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..io import rle
from ..io.atomic_files import atomic, remove_left, writable_folder, write_json
from ..io.images import read_head
from .labelme import embedded
from .pictures import Pictures
from .sample import IdMaps, coco_masks
from .shard_files import INDEX, SEG, STATE, TASKS, Index, Shard
from .views import ViewConfig

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str) -> int:
    """A size such as "500MB" or "1.5 GiB"; without a unit it is in bytes.

    Raises:
        ValueError: it is none, or below a byte.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    size = int(float(found[1]) * _UNITS.get(found[2].upper(), 0)) if found else 0
    if size < 1:
        raise ValueError(f"shard: size must be a number of B, KB, MB, GB or GiB, got {text!r}")
    return size


def write_shards(
    splits: dict[str, Pictures],
    target: str | Path,
    task: str,
    views: ViewConfig,
    size: int = 500_000_000,
    shuffle: bool = False,
    workers: int = 0,
    tell: Callable[[str], object] = lambda text: None,
) -> Index:
    """Writes the splits of a data set as shards, and index.json when all are there.

    Args:
        splits: data sets of files, without views, by the name of the split.
        target: folder; of a stopped run it is the same, and what is there stays.
        task: of the samples: "panoptic", "instance" or "semantic".
        views: of the set in training, which the index keeps.
        size: bytes that a shard has at most, but a sample at least.
        shuffle: write the samples in an order that chance drew, for sets whose neighbours are
            alike and that are larger than what training shuffles together.
        workers: processes that read; 0 reads in this one.
        tell: called with what was left out and why, and with each shard that is written.

    Returns:
        what the index says.

    Raises:
        OSError: the folder cannot be written to.
        TypeError: a data set that is none of files.
        ValueError: no such task, a size below 1, the folder holds shards or those of another set,
            or no sample of a split can be read.
        ImportError: pycocotools is missing.
    """
    for name, data in splits.items():
        if not isinstance(data, Pictures):
            raise TypeError(
                f"write_shards: splits must be data sets of files (Pictures), got a "
                f"{type(data).__name__} for {name}"
            )
    if task not in TASKS:
        raise ValueError(f"write_shards: task must be one of {', '.join(TASKS)}, got {task!r}")
    if size < 1:
        raise ValueError(f"write_shards: size must be at least 1 byte, got {size}")
    coco_masks()  # missed now, and not after the first pictures
    folder = writable_folder(target)
    if (folder / INDEX).exists():
        raise ValueError(f"{folder}: must not hold a data set, and has {INDEX}")
    first = next(iter(splits.values()))
    written = _resumed(folder, _fingerprint(splits, task, size, shuffle))
    write_json(folder / STATE, written)  # before a shard, which nobody would know without
    for name, data in splits.items():
        order = range(len(data))
        if shuffle:
            generator = torch.Generator().manual_seed(0)
            order = torch.randperm(len(data), generator=generator).tolist()
        _write_split(folder, name, data, task, size, order, workers, written, tell)
        if not written["splits"].get(name):
            raise ValueError(f"{folder}: no picture of the {name} split could be read")
    rows = {name: [Shard(*row[:3]) for row in written["splits"][name]] for name in splits}
    look = json.loads(json.dumps(asdict(views)))
    channels = first.read.channels
    index = Index(task, channels, first.classes, tuple(first.stuff), look, rows)
    write_json(folder / INDEX, index.text())
    (folder / STATE).unlink(missing_ok=True)
    return index


def _fingerprint(splits: dict[str, Pictures], task: str, size: int, shuffle: bool) -> dict:
    """What a run that goes on must share with the one that was stopped."""
    paths = hashlib.sha256()
    for data in splits.values():
        paths.update(data.paths.names.tobytes())
    counts = {name: len(data) for name, data in splits.items()}
    classes = next(iter(splits.values())).classes
    settings = {"task": task, "size": size, "shuffle": shuffle, "pictures": counts}
    return settings | {"classes": classes, "paths": paths.hexdigest()}


def _resumed(folder: Path, fingerprint: dict) -> dict:
    """What is written already: of each split file, samples and bytes of each shard, and the place
    in the order after its last.

    Raises:
        ValueError: it is of another set or other settings.
    """
    state = folder / STATE
    if not state.is_file():
        if tars := sorted(folder.glob("*.tar")):
            raise ValueError(f"{folder}: must not hold shards of others, and has {tars[0].name}")
        return {"of": fingerprint, "splits": {}}
    try:
        written = json.loads(state.read_text(encoding="utf-8"))
        of = dict(written["of"])
        kept = {row[0]: row[2] for rows in written["splits"].values() for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{state}: not what writing shards leaves: {error}") from error
    if differing := sorted(k for k in fingerprint if of.get(k) != fingerprint[k]):
        raise ValueError(
            f"{folder}: holds the first shards of a set of other {', '.join(differing)}: write to "
            "another folder"
        )
    for name, size in kept.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise ValueError(f"{folder / name}: must be as it was written: start in a new folder")
    remove_left(folder)
    return written


def _write_split(folder, name, data, task, size, order, workers, written, tell) -> None:
    """Writes the shards of a split that are not there."""
    rows = written["splits"].setdefault(name, [])
    done, key = rows[-1][3] if rows else 0, sum(row[1] for row in rows)
    samples = _packed_samples(data, task, order, done, workers, tell)
    following = next(samples, None)
    while following is not None:
        path, starts = folder / f"{name}-{len(rows):05}.tar", [0]
        with (
            atomic(path) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            while following is not None:
                place, members = following
                if len(starts) > 1 and _end(tar.offset, members) > size:
                    break
                for suffix, content in members:
                    head = tarfile.TarInfo(f"{key:09}.{suffix}")
                    head.size = len(content)
                    tar.addfile(head, io.BytesIO(content))
                starts.append(tar.offset)
                done, key, following = place + 1, key + 1, next(samples, None)
        with atomic(path.with_suffix(".idx")) as temporary:
            temporary.write_bytes(np.array(starts, "<i8").tobytes())
        rows.append([path.name, len(starts) - 1, path.stat().st_size, done])
        write_json(folder / STATE, written)
        tell(f"written: {path}, {rows[-1][1]} samples, {rows[-1][2] / 1e6:.1f} MB")


def _end(offset: int, members: list[tuple[str, bytes]]) -> int:
    """Bytes of a tar file that ends with these members: a head of 512 bytes each, whole blocks of
    512, two that are empty, and records of 20 blocks."""
    length = offset + sum(512 + -(-len(part) // 512) * 512 for _, part in members) + 1024
    return -(-length // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _packed_samples(data, task, order, done, workers, tell) -> Iterator[tuple[int, list]]:
    """Places in the order from `done` on, and the members of the sample there; those that cannot
    be read are told and left out."""
    loader = DataLoader(
        _Packed(data, task),
        batch_size=None,
        sampler=order[done:],
        num_workers=workers,
        collate_fn=_same,
    )
    for place, (members, faults) in enumerate(loader, done):
        for fault in faults:
            tell(fault)
        if members:
            yield place, members


def _same(sample):
    return sample


class _Packed(Dataset):
    """Of sample i its members, suffix and bytes, none where it cannot be read; and what was left
    out and why."""

    def __init__(self, data: Pictures, task: str):
        self.data, self.task = data, task

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[list[tuple[str, bytes]], list[str]]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                sample, faults = self.data.examined(index)
                members = self._members(sample, self.data.paths[index])
            except ValueError as error:
                return [], [f"{error}; left out"]
        return members, [*faults, *(str(w.message) for w in told if w.category is UserWarning)]

    def _members(self, sample: dict, path: Path) -> list[tuple[str, bytes]]:
        height, width = sample["image"].shape[:2]
        content = {
            "file_name": path.name,
            "height": height,
            "width": width,
            "upright": True,
            "annotations": [] if self.task == "semantic" else _annotations(sample),
        }
        if path.suffix.lower() == ".json":  # LabelMe's, with the picture inside
            picture = embedded(path)
            suffix = Image.open(io.BytesIO(picture)).format.lower().replace("jpeg", "jpg")
        else:
            picture, suffix = path.read_bytes(), path.suffix[1:].lower()
            raw, turned, _ = read_head(path, 2**62)
            same = raw == turned
            drawn_raw = self.data.read.exif == "raw" if same else (height, width) == raw
            content["upright"] = not drawn_raw
        members = [(suffix, picture), ("json", json.dumps(content).encode())]
        if "semantic" in sample:
            file = io.BytesIO()
            Image.fromarray(sample["semantic"]).save(file, "PNG")
            members.append((SEG, file.getvalue()))
        return members


def _annotations(sample: dict) -> list[dict]:
    """The segments of a sample as COCO has them."""
    masks: IdMaps = sample["masks"]
    codes: list = [None] * len(masks)
    for layer, ids in enumerate(masks.maps):
        mine = np.flatnonzero(masks.layer == layer)
        for i, code in zip(mine.tolist(), rle.encode(ids, (mine + 1).tolist())):
            codes[i] = code
    plain = [code | {"counts": code["counts"].encode()} for code in codes]
    boxes = coco_masks().toBbox(plain).tolist() if plain else []
    return [
        {
            "category_id": int(label),
            "iscrowd": int(crowd),
            "bbox": box,
            "area": int(area),
            "segmentation": code,
        }
        for label, crowd, box, area, code in zip(
            sample["labels"], sample["crowd"], boxes, masks.areas(), codes
        )
    ]
