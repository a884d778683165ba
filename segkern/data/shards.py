"""A set of shards as a data set: samples by place, in an order that reads few shards at a time.

    position in a pass -> block of permuted shards -> place in the permuted block -> sample

A block has `buffer` samples of shards that follow each other in the pass, so that a few shards are
read at a time, and what comes at a position depends on seed, pass and position alone: a run that
goes on skips nothing and reads nothing again, and ranks and loaders take parts of one order.
`write_shards` makes such sets; shard_files.py says what they consist of.
"""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from ..io.images import open_image, read_pixels
from ..io.sources import NamedBytes, is_url
from ..structures.labels import void_of
from ..structures.targets import fresh
from .pictures import ReadConfig, Truth, expect_split, expect_task, settle, tell
from .sample import IdMaps, Sample, generator_of
from .shard_files import (
    INDEX,
    SEG,
    TASKS,
    LostShard,
    json_of,
    picture_of,
    read_index,
    read_sample,
)
from .views import InstanceViews, ViewConfig

LOST = 0.5  # share of the pictures that may be unreadable
_LEFT_ALONE = 600.0  # seconds before a shard that was lost is asked for again
_TRIES = 100  # pictures after one that cannot be read, of which one is to stand for it


@dataclass
class ShardsConfig:
    """Pictures with segments in shards that `segkern data shard` wrote.

    Attributes:
        root: folder of the shards, or an address (http://, https://) below which they lie.
        task: that of the set; of a panoptic one also "instance" or "semantic".
        buffer: samples that are shuffled together in training: of as few shards as have so many.
        seed: other seeds give other views.
        read: how pictures are read; `exif` and `val_share` were settled when they were written.
        views: of the training pictures.
    """

    kind: ClassVar[str] = "shards"

    root: str = "."
    task: Literal["panoptic", "instance", "semantic"] = "panoptic"
    buffer: int = 10_000
    seed: int = 0
    read: ReadConfig = field(default_factory=ReadConfig)
    views: ViewConfig = field(default_factory=ViewConfig)

    def __post_init__(self):
        root = str(self.root).rstrip("/") or "/"
        settle(self)
        self.root = root if is_url(root) else str(Path(root).absolute())
        expect_task(self, "panoptic", "instance", "semantic")
        if self.buffer < 1:
            raise ValueError(f"ShardsConfig: buffer must be at least 1, got {self.buffer}")
        if self.read.exif != "auto":
            raise ValueError(
                "ShardsConfig: read.exif must be auto, as shards say how each picture is turned, "
                f"got {self.read.exif!r}"
            )

    @property
    def targets(self) -> tuple[str, ...]:
        """What samples have."""
        return ("masks",) if self.task == "instance" else ("masks", "semantic")


def found_shards(root: str | Path) -> ShardsConfig:
    """The config of a set of shards, with the views of the set that they were made from.

    Raises:
        OSError: its index cannot be fetched.
        ValueError: there is no index, or it is not as it must be.
    """
    index = read_index(str(root).rstrip("/"))
    try:
        views = ViewConfig(**index.views)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{root}/{INDEX}: views are not as they must be: {error}") from error
    return ShardsConfig(
        str(root), index.task, read=ReadConfig(channels=index.channels), views=views
    )


class Shards:
    """Picture i of a split as a `Sample`, read from its shard when it is asked for.

    Samples are as those of `Pictures`. A picture that cannot be read gives a warning that names
    shard and sample, and one after it in its place, with the reason in `unread`.

    Attributes:
        classes: name of each label.
        things, stuff: labels with and without instances.
        semantic: whether samples have a map of labels.
        passes: whether samples differ from pass to pass.
        faults: shards that are missing or cut short, of those in a folder.
        shards: rows of the index, in whose order the samples are.
        first: [shards + 1] int64: samples first[s] to first[s + 1] are those of shard s.
        most_unread: share of the pictures of a pass that may be unreadable before training stops.
    """

    most_unread = LOST

    def __init__(
        self, config: ShardsConfig, split: str = "train", views: InstanceViews | None = None
    ):
        """
        Args:
            config: where they are.
            split: "train" or "val".
            views: for training; None leaves pictures whole.

        Raises:
            OSError: the index cannot be fetched.
            ValueError: there is no index, or it has no such split, task or channels; or more than
                half of the samples are in shards that are missing or cut short.
        """
        expect_split("shards", split)
        index = read_index(config.root)
        self.shards = index.splits.get(split, [])
        if not self.shards:
            raise ValueError(f"{config.root}/{INDEX}: has no {split} split")
        if config.task not in TASKS[index.task]:
            raise ValueError(
                f"{config.root}: task must be {' or '.join(TASKS[index.task])}, as shards of the "
                f"{index.task} task were written, got {config.task!r}"
            )
        if config.read.channels != index.channels:
            raise ValueError(
                f"{config.root}: read.channels must be {index.channels}, those of the pictures, "
                f"got {config.read.channels}"
            )
        self.config, self.read, self.views, self.seed = config, config.read, views, config.seed
        self._known = range(len(index.classes))  # labels that the files have
        self.things = tuple(k for k in self._known if k not in index.stuff)
        self.stuff = index.stuff
        self._apart = index.task == "semantic" or config.task == "semantic"  # each class a segment
        self._of_things = index.task == "panoptic" and config.task == "instance"
        names = index.classes
        self._labels = {k: k for k in self._known}  # of a label in files ours
        if self._apart:
            self.things, self.stuff = (), tuple(self._known)
        elif self._of_things:
            names = [names[k] for k in self.things]
            self._labels = {label: k for k, label in enumerate(self.things)}
            self.things, self.stuff = tuple(self._labels.values()), ()
        self.classes = names
        self.semantic, self.passes = config.task != "instance", views is not None
        self.first = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self.told: set[str] = set()
        self._lost: dict[
            int, tuple[int, str, float]
        ] = {}  # of a shard from where, why, until when
        self._passes: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._block: tuple = None, None
        self.faults = [] if is_url(config.root) else self._absent()
        if self.faults:
            more = f" ({len(self.faults)} such findings)" if len(self.faults) > 1 else ""
            warnings.warn(f"{self.faults[0]}{more}", stacklevel=3)

    def _absent(self) -> list[str]:
        """What is missing of the shards in a folder."""
        faults, lost = [], 0
        for shard in self.shards:
            path = Path(self.config.root, shard.file)
            size = path.stat().st_size if path.is_file() else -1
            if size < 0:
                faults.append(f"{path}: no such file: {shard.samples} samples are lost")
                lost += shard.samples
            elif size != shard.bytes:
                faults.append(f"{path}: must have {shard.bytes} bytes, got {size}")
                lost += round(shard.samples * max(0, 1 - size / max(shard.bytes, 1)))
        if lost > LOST * len(self):
            raise ValueError(
                f"{faults[0]} ({len(faults)} of {len(self.shards)} shards are missing or cut "
                f"short, with more than {LOST:.0%} of {len(self)} samples)"
            )
        return faults

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, place: int | tuple[int, int]) -> Sample:
        return self._viewed(place)

    def __getitems__(self, places: Sequence[int | tuple[int, int]]) -> list[Sample]:
        """Samples of a batch, whose views lie in one array, as `collate` wants them."""
        if self.views is None:
            return [self[place] for place in places]
        pixels = fresh(len(places), self.read.channels, *self.views.config.size, sent=True)
        return [self._viewed(place, out) for place, out in zip(places, pixels)]

    def _viewed(self, place: int | tuple[int, int], out: torch.Tensor | None = None) -> Sample:
        index, epoch = place if isinstance(place, tuple) else (place, 0)
        if not 0 <= index < len(self):
            raise IndexError(f"Shards: index must be in [0, {len(self)}), got {index}")
        sample = self._readable(index)
        if self.views is None:
            return sample
        return self.views(sample, generator_of(self.seed, epoch, index), out)

    def _readable(self, index: int) -> Sample:
        """The sample of an index, or one after it; where the rest of a shard is lost, of the next
        shard, and the lost one is not asked for again for some minutes.

        Raises:
            ValueError: none of so many can be read.
        """
        at, unread = index, None
        for _ in range(_TRIES):
            shard, k = self._place(at)
            since, reason, until = self._lost.get(shard, (k + 1, "", 0.0))
            try:
                if k >= since and time.monotonic() < until:
                    raise LostShard(reason)
                sample, faults = self.examined(at)
            except ValueError as error:
                unread = unread or str(error)
                tell(f"{error}; a picture after it stands for it", self.told)
                at = (at + 1) % len(self)
                if isinstance(error, LostShard):
                    if k < since or time.monotonic() >= until:  # it was asked for
                        self._lost[shard] = k, str(error), time.monotonic() + _LEFT_ALONE
                    at = self._instead(shard, k)
                continue
            for fault in faults:
                tell(fault, self.told)
            return sample if unread is None else sample | {"unread": unread}
        raise ValueError(f"{unread}; nor can the {_TRIES - 1} that were tried after it")

    def _instead(self, shard: int, k: int) -> int:
        """A sample in place of sample k of a shard that is lost from there on: of the next shard,
        another for each k; of the only one an earlier one."""
        other = (shard + 1) % len(self.shards)
        place = k if other != shard else k // 2
        return int(self.first[other]) + place % self.shards[other].samples

    def examined(self, index: int) -> tuple[Sample, list[str]]:
        """A whole sample, and what was left out of it and why.

        Raises:
            ValueError: it cannot be read; names shard and sample.
        """
        shard, k = self._place(index)
        members = read_sample(self.config.root, self.shards[shard], k)
        name = f"{self.config.root}/{self.shards[shard].file}: sample {members[''].decode()}"
        content = json_of(members, name)
        data, most = picture_of(members, name), self.read.max_pixels
        if self.read.channels == 3:
            picture = open_image(NamedBytes(data, name), most, bool(content.get("upright", True)))
        else:
            picture = NamedBytes(data, name)
        image = read_pixels(picture, name, most, self.read.channels)
        size = image.shape[:2]
        if (content.get("height"), content.get("width")) != size:
            raise ValueError(
                f"{name}: height and width must be {list(size)}, those of its picture, got "
                f"{[content.get('height'), content.get('width')]!r:.60}"
            )
        semantic = self._map(members, name, size) if self.semantic else None
        if self._apart:
            masks, labels, crowd, faults, _ = Truth.of_map(semantic)
        else:
            masks, labels, crowd, faults, _ = self._segments(content["annotations"], name, size)
        if not (seen := masks.areas() > 0).all():
            masks, labels, crowd = masks.chosen(seen), labels[seen], crowd[seen]
            faults = [*faults, f"{name}: {(~seen).sum()} segments without a pixel are left out"]
        sample = {"image": image, "masks": masks, "labels": labels, "crowd": crowd}
        if semantic is not None:
            sample["semantic"] = semantic
        path = f"{self.shards[shard].file}/{content.get('file_name', '')}"
        return sample | {"id": index, "path": path}, faults

    def _segments(self, rows: list, name: str, size: tuple[int, int]) -> Truth:
        """The segments of annotations; of things alone, where those are asked for."""
        codes, labels, crowd = [], [], []
        for at, row in enumerate(rows):
            try:
                label = row["category_id"]
                if type(label) is not int or label not in self._known:
                    raise ValueError(
                        f"category_id must be in [0, {len(self._known)}), got {label!r:.20}"
                    )
                if label in self._labels:
                    codes.append(row["segmentation"])
                    labels.append(self._labels[label])
                    crowd.append(bool(row.get("iscrowd")))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{name}: annotation {at}: {error}") from error
        try:
            masks = IdMaps.of_codes(codes, size)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
        return Truth(masks, np.array(labels, np.int64), np.array(crowd, bool), [])

    def _map(self, members: dict[str, bytes], name: str, size: tuple[int, int]) -> np.ndarray:
        """[H, W] uint8 or uint16: the label of each pixel.

        Raises:
            ValueError: there is no map, or not one of labels of that size.
        """
        if SEG not in members:
            raise ValueError(f"{name}: has no map of labels, {SEG}")
        void = void_of(len(self._known))
        file, most = NamedBytes(members[SEG], f"{name}: {SEG}"), math.prod(size)
        image = open_image(file, most, upright=False)
        wide = np.asarray(image)
        if wide.shape != size or wide.dtype.kind not in "iu":
            raise ValueError(
                f"{name}: {SEG} must be {list(size)} integers, got {list(wide.shape)} {wide.dtype}"
            )
        if (bad := (wide < 0) | ((wide >= len(self._known)) & (wide != void))).any():
            raise ValueError(
                f"{name}: {SEG} must hold labels below {len(self._known)} or {void}, "
                f"got {wide[bad].flat[0]}"
            )
        return wide.astype(np.uint8 if void < 256 else np.uint16)

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its place there."""
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        return shard, index - int(self.first[shard])

    def shuffled(self, seed: int, epoch: int, place: int) -> int:
        """The sample at a place of a pass, as `Order` asks for it."""
        shards, ends = self._order(seed, epoch)
        block, rest = divmod(place, self.config.buffer)
        if self._block[0] != (key := (seed, epoch, block)):
            length = min(self.config.buffer, len(self) - block * self.config.buffer)
            generator = generator_of(seed, epoch, block + 1)
            self._block = key, torch.randperm(length, generator=generator).numpy()
        at = block * self.config.buffer + int(self._block[1][rest])
        k = int(np.searchsorted(ends, at, side="right"))
        return int(self.first[shards[k] + 1]) - (int(ends[k]) - at)

    def _order(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of a pass in their order, and the place after the last of each."""
        if (seed, epoch) not in self._passes:
            generator = generator_of(seed, epoch, 0)
            shards = torch.randperm(len(self.shards), generator=generator).numpy()
            self._passes = {(seed, epoch): (shards, np.cumsum(np.diff(self.first)[shards]))}
        return self._passes[seed, epoch]
