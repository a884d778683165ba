"""The segments of COCO files: polygons and run-length codes in flat arrays, and PNGs of ids.

Letters: N picture, A segment, R ring of a polygon.

A million segments are a dozen arrays: nothing in them is counted by Python, so that processes
which load pictures share their pages.
"""

import math
from array import array
from collections.abc import Hashable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..io import rle
from .maps import read_ids
from .pictures import FAR, FlatPaths, Truth, number
from .sample import IdMaps, coco_masks, distinct


class FlatSegments:
    """Segments of instances, called with a picture and its size for its `Truth`.

    Attributes:
        file: that they are from.
        first: [N + 1] int64: segments first[i] to first[i + 1] are those of picture i.
        ids: [A], as the file gives them.
        labels: [A] int64.
        crowd: [A] bool.
        rings: [A + 1] int64: the rings of a segment; it has none where it is a run-length code.
        ends: [R + 1] int64: the numbers of a ring.
        numbers: float64, x and y in pixels by turns.
        codes: [A + 1] int64: the bytes of a code.
        counts: uint8, compressed run-length codes.
    """

    def __init__(self, file: Path, N: int, rows: list[tuple]):
        """
        Args:
            file: as above.
            N: number of pictures.
            rows: of each segment the picture, id, label, whether it is a crowd, and its rings or
                its code, as `_shape` gives them.
        """
        rows.sort(key=lambda row: row[0])
        self.file = file
        of_picture = np.array([row[0] for row in rows], np.int64)
        self.first = np.searchsorted(of_picture, np.arange(N + 1))
        ids = [row[1] for row in rows]
        numbers_alone = all(type(i) is int and abs(i) < 2**63 for i in ids)
        self.ids = np.array(ids if numbers_alone else list(map(str, ids)))
        self.labels = np.array([row[2] for row in rows], np.int64)
        self.crowd = np.array([row[3] for row in rows], bool)
        numbers, counts, rings, ends, codes = array("d"), bytearray(), [0], [0], [0]
        for *_, shape in rows:
            if isinstance(shape, bytes):
                counts += shape
            else:
                for ring in shape:
                    numbers.extend(ring)
                    ends.append(len(numbers))
            rings.append(len(ends) - 1)
            codes.append(len(counts))
        self.numbers = np.array(numbers, np.float64)
        self.counts = np.frombuffer(bytes(counts), np.uint8)
        self.rings, self.ends, self.codes = (np.array(x, np.int64) for x in (rings, ends, codes))

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        chosen = np.arange(self.first[index], self.first[index + 1])
        codes = [self._code(a, size) for a in chosen]
        faults = []
        try:
            masks = IdMaps.of_codes(codes, size)
        except (TypeError, ValueError):
            whole = np.array([self._whole(a, c, size, faults) for a, c in zip(chosen, codes)])
            chosen = chosen[whole]
            masks = IdMaps.of_codes([c for c, good in zip(codes, whole) if good], size)
        return Truth(masks, self.labels[chosen], self.crowd[chosen], faults)

    def _code(self, a: int, size: tuple[int, int]) -> dict:
        if self.codes[a] < self.codes[a + 1]:
            counts = self.counts[self.codes[a] : self.codes[a + 1]].tobytes()
            return {"size": list(size), "counts": counts}
        ends = self.ends[self.rings[a] : self.rings[a + 1] + 1]
        rings = [self.numbers[i:j].tolist() for i, j in pairwise(ends)]
        return coco_masks().merge(coco_masks().frPyObjects(rings, *size))

    def _whole(self, a: int, code: dict, size: tuple[int, int], faults: list[str]) -> bool:
        """Whether a code can be read."""
        try:
            rle.decode([code], [1], size)
            return True
        except (TypeError, ValueError) as error:
            faults.append(f"{self.file}: annotation {self.ids[a]}: {error}; left out")
            return False


def instances(
    file: Path,
    annotations: list[dict],
    place: dict[Hashable, int],
    listed: set,
    labels: dict[Hashable, int],
    sizes: np.ndarray,
    faults: list[str],
) -> FlatSegments:
    """The segments of an instance file.

    Args:
        file: its path.
        annotations: its rows.
        place: of a picture's id its index; those left out are not there.
        listed: ids of all pictures in the file.
        labels: of a category's id its label.
        sizes: [N, 2], H and W of the pictures.
        faults: gets what is left out and why.

    Raises:
        ValueError: no annotation is left.
    """
    rows, seen, crowds = [], set(), 0
    for at, row in enumerate(annotations):
        name = number(row.get("id", f"number {at + 1}"))
        image, category = number(row.get("image_id")), number(row.get("category_id"))
        reason = None
        if image not in listed:
            reason = f"is of picture {image}, which is not in the file"
        elif category not in labels:
            reason = f"is of category {category}, which the table does not have"
        elif image not in place:
            continue  # said of the picture
        else:
            crowd = bool(number(row.get("iscrowd") or 0))
            try:
                size = tuple(sizes[place[image]].tolist())
                shape, notes = _shape(row.get("segmentation"), size)
                faults += [f"{file}: annotation {name}: {note}" for note in notes]
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            faults.append(f"{file}: annotation {name}: {reason}; left out")
            continue
        if name in seen:
            faults.append(f"{file}: annotation {name}: the id is there twice; both are read")
        seen.add(name)
        crowds += crowd
        rows.append((place[image], name, labels[category], crowd, shape))
    if not rows and faults and annotations:
        raise ValueError(f"{faults[0]}; none of {len(annotations)} annotations is left")
    if rows and crowds == len(rows):
        faults.append(
            f"{file}: every annotation is marked as a crowd (iscrowd), and nothing would be left "
            "to train on: all are read as single objects"
        )
        rows = [(*row[:3], False, row[4]) for row in rows]
    return FlatSegments(file, len(sizes), rows)


def _shape(segmentation, size: tuple[int, int]) -> tuple[list[list[float]] | bytes, list[str]]:
    """Rings of numbers, or a compressed run-length code; and of rings that are left out why.

    Args:
        segmentation: of an annotation.
        size: H and W of its picture.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(segmentation, dict):
        if segmentation.get("size") != list(size):
            raise ValueError(
                f"size of the run-length code must be {list(size)}, the picture's [H, W], "
                f"got {segmentation.get('size')}"
            )
        counts = segmentation.get("counts")
        if isinstance(counts, (str, bytes)) and counts:
            return (
                counts if isinstance(counts, bytes) else counts.encode("latin-1", "replace")
            ), []
        if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError(f"counts must be text or a list of integers >= 0, got {counts!r:.40}")
        if sum(counts) != math.prod(size):
            raise ValueError(
                f"counts must sum to {math.prod(size)}, the pixels, got {sum(counts)}"
            )
        return coco_masks().frPyObjects({"size": list(size), "counts": counts}, *size)[
            "counts"
        ], []
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"segmentation must be polygons or run lengths, got {segmentation!r:.40}")
    rings = segmentation if isinstance(segmentation[0], list) else [segmentation]
    good, notes = [], []
    for ring in rings:
        try:
            finite = math.isfinite(sum(ring)) and min(ring, default=0) >= -FAR
            finite = finite and max(ring, default=0) <= FAR
        except (TypeError, OverflowError):
            finite = False
        if finite and len(ring) >= 6 and len(ring) % 2 == 0:
            good.append(ring)
        else:
            rule = f"a polygon must have 6 numbers or more up to {FAR}, x and y by turns"
            fault = f"{rule}, got {len(ring) if finite else repr(ring)[:40]}"
            if len(rings) == 1:
                raise ValueError(fault)
            notes.append(f"{fault}; this part is left out")
    if not good:
        raise ValueError("no polygon of its parts is left")
    return good, notes


class PanopticSegments:
    """Segments in PNGs of ids, called with a picture and its size for its `Truth`.

    Attributes:
        files: the PNG of each picture.
        first: [N + 1] int64: segments first[i] to first[i + 1] are those of picture i.
        ids: [A] int64, red + 256 green + 65536 blue of its pixels.
        labels: [A] int64.
        crowd: [A] bool.
    """

    def __init__(self, files: Sequence[Path], rows: list[list[tuple[int, int, bool]]]):
        self.files = FlatPaths(files)
        self.first = np.cumsum([0, *map(len, rows)])
        flat = np.array([row for part in rows for row in part], np.int64).reshape(-1, 3)
        self.ids, self.labels, self.crowd = flat[:, 0], flat[:, 1], flat[:, 2].astype(bool)

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        path = self.files[index]
        values = read_ids(path, size)
        mine = slice(self.first[index], self.first[index + 1])
        ids, labels, crowd = self.ids[mine], self.labels[mine], self.crowd[mine]
        masks, faults = IdMaps.of_map(values, ids), []
        areas = masks.areas()
        if (lost := ids[areas == 0]).size:
            faults.append(f"{path}: segment {lost[0]} has no pixel ({lost.size} have none)")
            seen = areas > 0
            masks, labels, crowd = masks.chosen(seen), labels[seen], crowd[seen]
        if len(foreign := distinct(values[(masks.maps[0] == 0) & (values != 0)])):
            faults.append(
                f"{path}: id {foreign[0]} is that of no segment ({foreign.size} are); its pixels "
                "do not count"
            )
        return Truth(masks, labels, crowd, faults)


def panoptic(
    file: Path,
    annotations: list[dict],
    place: dict[Hashable, int],
    listed: set,
    labels: dict[Hashable, int],
    files: list[Path],
    faults: list[str],
) -> PanopticSegments:
    """The segments of a panoptic file; arguments as of `instances`, and each picture's PNG."""
    rows: list[list] = [[] for _ in place]
    for row in annotations:
        image, name = number(row.get("image_id")), str(row.get("file_name", ""))
        if image not in listed:
            faults.append(f"{file}: {name}: picture {image} is not in the file; left out")
        if image not in place:
            continue
        segments: dict[int, tuple] = {}
        found = row.get("segments_info")
        if not isinstance(found, list) or not all(isinstance(part, dict) for part in found):
            faults.append(f"{file}: {name}: segments_info must be a list of segments; left out")
            found = []
        for segment in found:
            i, category = number(segment.get("id")), number(segment.get("category_id"))
            what = f"{file}: {name}: segment {i}"
            if not isinstance(i, int) or not 0 < i < 2**24:
                faults.append(f"{what}: the id must be in [1, 16777215]; left out")
            elif category not in labels:
                faults.append(f"{what}: category {category} is not in the table; left out")
            elif i in segments:
                faults.append(f"{what}: the id is there twice; the first counts")
            else:
                crowd = bool(number(segment.get("iscrowd") or 0))
                segments[i] = i, labels[category], crowd
        rows[place[image]] = list(segments.values())
    return PanopticSegments(files, rows)
