"""One form for the samples of every data set, and for masks that are many and large.

Letters: H W image size, n mask, l map.
"""

from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Generator, Tensor

from ..io import rle
from ..io.rle import _host
from ..structures.labels import VOID


class IdMaps:
    """n masks of one size, held as a few maps of ids: masks that overlap lie in different maps.

    It stands for an array [n, H, W] uint8, which `np.asarray` makes of it: a map takes a byte a
    pixel (four from 256 masks on), however many masks it holds.

    Attributes:
        maps: [l, H, W] uint8 or int32: i + 1 where mask i lies, 0 where none does.
        layer: [n] int64, the map of each mask.
    """

    def __init__(self, maps: np.ndarray, layer: np.ndarray, areas: np.ndarray | None = None):
        self.maps, self.layer, self._areas = maps, layer, areas

    @classmethod
    def of_map(cls, values: np.ndarray, ids: Sequence[int]) -> "IdMaps":
        """Masks that lie apart: mask i is where `values` [H, W] integers are ids[i], each once."""
        flat, n = values.ravel(), len(ids)
        heads = _heads(flat)
        never = np.iinfo(np.int64).min  # occurs in no map, so that there is always one to find
        wanted = np.append(np.asarray(ids, np.int64), never)
        order = np.argsort(wanted)
        found = flat[heads].astype(np.int64)
        places = order[np.searchsorted(wanted, found, sorter=order).clip(max=n)]
        places = np.where(wanted[places] == found, places + 1, 0)
        runs = np.diff(heads, append=flat.size)
        one = np.repeat(places.astype(_dtype(n)), runs).reshape(1, *values.shape)
        return cls(one, np.zeros(n, np.int64))

    @classmethod
    def of_codes(cls, codes: Sequence[dict], size: tuple[int, int]) -> "IdMaps":
        """Masks of run-length codes as pycocotools makes them.

        Raises:
            TypeError, ValueError: a code is damaged or not of `size` (H, W).
        """
        return cls(*rle.layers(codes, size))

    @classmethod
    def of_arrays(cls, masks: Iterable[np.ndarray], size: tuple[int, int]) -> "IdMaps":
        """Masks [H, W], true or not 0 inside, which are looked at one by one."""
        maps, layer = [], []
        for i, mask in enumerate(masks):
            inside = np.asarray(mask) != 0
            k = next((k for k, one in enumerate(maps) if not one[inside].any()), len(maps))
            if k == len(maps):
                maps.append(np.zeros(size, np.int32))
            maps[k][inside] = i + 1
            layer.append(k)
        maps = np.stack(maps or [np.zeros(size, np.int32)]).astype(_dtype(len(layer)))
        return cls(maps, np.array(layer, np.int64))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, H, W)."""
        return len(self.layer), *self.maps.shape[1:]

    def __len__(self) -> int:
        return len(self.layer)

    def __getitem__(self, index: int) -> np.ndarray:
        """[H, W] bool: one mask."""
        index = range(len(self))[index]
        return self.maps[self.layer[index]] == index + 1

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        dense = np.zeros(self.shape, np.uint8)
        self.write(dense)
        return dense if dtype is None else dense.astype(dtype, copy=False)

    def write(self, out: np.ndarray) -> None:
        """Writes the masks into the upper left of `out` [n, at least H, at least W] uint8, which
        is 0: only where they are, so that untouched pages of a large array stay so."""
        _, H, W = self.shape
        if _host is not None and out.flags.c_contiguous:
            _host.spread(np.ascontiguousarray(self.maps), self.layer, out)
            return
        for mask, (i, k) in zip(out, enumerate(self.layer)):
            np.equal(self.maps[k], i + 1, out=mask[:H, :W].view(bool))

    def areas(self) -> np.ndarray:
        """Pixels of each mask, [n] int64."""
        if self._areas is None:
            self._areas = _counts(self.maps, len(self))
        return self._areas

    def chosen(self, keep: np.ndarray) -> "IdMaps":
        """The masks where `keep` [n] is true."""
        if keep.all():
            return self
        count = int(keep.sum())
        table = np.zeros(len(keep) + 1, _dtype(count))
        table[1:][keep] = np.arange(1, count + 1)
        areas = None if self._areas is None else self._areas[keep]
        return IdMaps(_replaced(self.maps, table), self.layer[keep], areas)

    def merged(self, group: np.ndarray) -> "IdMaps":
        """Masks put together: mask g is where one lies whose `group` [n] is g. Groups count from
        0, and each has a mask."""
        count = int(group.max(initial=-1)) + 1
        if len(self.maps) > 1:  # masks of a group may lie in several maps
            whole = np.zeros((count, *self.maps.shape[1:]), bool)
            for i, g in enumerate(group):
                whole[g] |= self[i]
            return IdMaps.of_arrays(whole, self.maps.shape[1:])
        table = np.zeros(len(group) + 1, self.maps.dtype)
        table[1:] = group + 1
        return IdMaps(_replaced(self.maps, table).astype(_dtype(count)), np.zeros(count, np.int64))

    def taken(self, rows: np.ndarray, columns: np.ndarray) -> "IdMaps":
        """Masks of those rows and columns of the image, in their order; -1 stands for outside."""
        if _host is not None:
            maps = np.ascontiguousarray(self.maps)
            maps, areas = _host.take(maps, rows, columns, len(self))
            return IdMaps(maps, self.layer, areas)
        maps = self.maps.take(rows, axis=1).take(columns, axis=2)
        maps[:, rows < 0] = 0
        maps[:, :, columns < 0] = 0
        return IdMaps(maps, self.layer)


class Sample(TypedDict, total=False):
    """What a data set gives for an index, and what training and evaluation read of it.

    Before views a sample has the picture as `image`, after views as `pixel_values`; data sets of
    their own may leave out what a task does not need.

    Attributes:
        image: [H, W, C] uint8, C 3 or what the data set is read with.
        pixel_values: [C, H, W] float32, normalised.
        masks: of the n segments, [n, H, W] uint8 or bool, or `IdMaps`.
        labels: [n] int64 in [0, K).
        crowd: [n] bool, segments that hold an unknown number of objects: training leaves them out.
        semantic: [H, W] uint8, the label of each pixel, 255 where it does not count; of more than
            255 classes uint16, 65535 there.
        id: index in the data set; random points of the loss depend on it.
        path: of the picture.
        task: in training on several tasks together, what the segments are those of: its place in
            `structures.targets.TASKS`.
        dropped: segments of which a view shows nothing, and which it left out.
        unread: why the picture that belongs here could not be read, where this one stands for it.
        finite: pixel_values are known to be so, as they were made of bytes: nobody need look.
    """

    image: np.ndarray
    pixel_values: np.ndarray | Tensor
    masks: np.ndarray | Tensor | IdMaps
    labels: np.ndarray | Tensor
    crowd: np.ndarray
    semantic: np.ndarray | Tensor
    id: int
    path: str
    task: int
    dropped: int
    unread: str
    finite: bool


def generator_of(seed: int, epoch: int, index: int) -> Generator:
    """What the view of a sample in a pass is drawn from: of these three alone."""
    mixed = np.random.SeedSequence((seed, epoch, index)).generate_state(1, "u8")
    return torch.Generator().manual_seed(int(mixed[0]))


def coco_masks():
    """The module pycocotools.mask, which fills polygons as COCO does.

    Raises:
        ImportError: it is missing; says what to do.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "polygons and run-length codes of data sets need pycocotools: pip install pycocotools "
            "(or segkern's extra `train`: pip install '.[train]' in its folder)"
        ) from error
    return mask


def label_table(labels: Sequence[int]) -> np.ndarray:
    """A table of labels, as narrow as a map of them may be: uint8 or uint16."""
    table = np.asarray(labels)
    return table.astype(np.uint16 if table.max() > VOID else np.uint8)


def distinct(values: np.ndarray) -> np.ndarray:
    """The values of a map, ascending; quick where they come in runs."""
    flat = values.ravel()
    return np.unique(flat[_heads(flat)])


def _heads(flat: np.ndarray) -> np.ndarray:
    """Where runs of one value begin."""
    return np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))[: flat.size]


def _replaced(maps: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Maps with every id replaced by that of a table."""
    if _host is not None and maps.dtype == table.dtype:
        return _host.replace(np.ascontiguousarray(maps), table)
    return table[maps]


def _counts(ids: np.ndarray, n: int) -> np.ndarray:
    """How often 1 to n occur in maps, [n] int64."""
    if _host is not None:
        return _host.count(np.ascontiguousarray(ids), n)
    return np.bincount(ids.ravel(), minlength=n + 1)[1 : n + 1]


def _dtype(n: int) -> type:
    """Of maps of n ids and 0."""
    return np.uint8 if n < 256 else np.int32
