"""COCO run-length encoding of label maps, as annotation files and pycocotools write it.

A segment is `{"size": [H, W], "counts": str}`; read are counts as bytes and as a list of integers
(COCO's "uncompressed"), too. The work is done by `segkern._host` (C++, every
segment in one pass); where it was not built, by NumPy. csrc/host/rle.cpp describes the format.
"""

from collections.abc import Mapping

import numpy as np

try:
    from .. import _host
except ImportError:  # pure-Python install, or another Python than the one it was built for
    _host = None


def encode(labels: np.ndarray, ids: list[int]) -> list[dict]:
    """The run-length encoding of each segment of a label map.

    Args:
        labels: [H, W] integers.
        ids: the values to encode, each once; one that does not occur gives an empty mask.

    Raises:
        ValueError: labels is not [H, W] integers that fit int32, or an id comes twice.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iub":
        raise ValueError(
            f"rle.encode: labels must be [H, W] integers, got {labels.shape} {labels.dtype}"
        )
    low, high = labels.min(initial=0), labels.max(initial=0)
    if low < -(2**31) or high >= 2**31:
        raise ValueError(f"rle.encode: labels must fit int32, got values of {low} to {high}")
    ids = _integers("rle.encode: ids", ids)
    if len(set(ids)) != len(ids):
        raise ValueError(f"rle.encode: ids must be distinct, got {list(ids)}")
    size = list(labels.shape)
    if _host is not None:
        counts = _host.encode(labels.astype(np.int32, copy=False), list(ids))
    else:
        counts = [_compress(_runs(labels == i)) for i in ids]
    return [{"size": size, "counts": c.decode("ascii")} for c in counts]


def encode_bits(bits: np.ndarray, width: int) -> list[dict]:
    """The run-length encoding of packed masks, which may overlap.

    Args:
        bits: [n, H, ceil(width / 32)] int32, packed as `ops.pack_bits` packs; 0 beyond the width.
        width: W.

    Raises:
        ValueError: bits is not of that shape.
    """
    if bits.ndim != 3 or bits.dtype != np.int32 or bits.shape[2] != -(-width // 32):
        raise ValueError(
            f"rle.encode_bits: bits must be [n, H, {-(-width // 32)}] int32 for width {width}, "
            f"got {bits.shape} {bits.dtype}"
        )
    size = [bits.shape[1], width]
    if _host is not None:
        counts = _host.encode_bits(bits, width)
    else:
        octets = np.ascontiguousarray(bits).view(np.uint8)
        masks = (np.unpackbits(x, axis=1, count=width, bitorder="little") for x in octets)
        counts = [_compress(_runs(mask.astype(bool))) for mask in masks]
    return [{"size": size, "counts": c.decode("ascii")} for c in counts]


def decode(segments: list[dict], ids: list[int], size: tuple[int, int]) -> np.ndarray:
    """The label map of run-length encoded segments; later ones lie over earlier ones, 0 elsewhere.

    Args:
        segments: as `encode` returns them, as pycocotools does (counts are bytes), or uncompressed
            (counts are a list of integers).
        ids: the value of each segment.
        size: (H, W); every segment must have it.

    Returns:
        [H, W] int32.

    Raises:
        TypeError: a segment or its counts are of no such kind.
        ValueError: another size, or counts that are damaged or do not fill it.
    """
    H, W = size
    counts = _checked(segments, size)
    ids = _integers("rle.decode: ids", ids)
    if len(ids) != len(segments):
        raise ValueError(
            f"rle.decode: as many ids as segments needed, got {len(ids)} for {len(segments)}"
        )
    if _host is not None:
        return _host.decode(counts, ids, H, W)
    labels = np.zeros((H, W), np.int32)
    for runs, i in zip(counts, ids):
        runs = _expand(runs) if isinstance(runs, str) else runs
        if min(runs, default=0) < 0 or sum(runs) > H * W:
            raise ValueError("rle: counts exceed the size")
        if sum(runs) < H * W:
            raise ValueError("rle: counts do not fill the size")
        inside = np.arange(len(runs)) % 2 == 1
        labels[np.repeat(inside, np.array(runs, np.int64)).reshape(W, H).T] = i
    return labels


def layers(
    segments: list[dict], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps that hold every segment whole: those that overlap lie in different maps.

    Args:
        segments, size: as of `decode`.

    Returns:
        maps: [l, H, W], i + 1 where segment i is, 0 where none is; uint8, int32 from 256 segments.
        layer: [n] int64, the map of each segment.
        areas: [n] int64, pixels of each.

    Raises:
        TypeError, ValueError: as `decode`.
    """
    H, W = size
    counts, n = _checked(segments, size), len(segments)
    if _host is not None:
        return _host.layers(counts, H, W)
    runs = [_expand(c) if isinstance(c, str) else c for c in counts]
    areas = np.array([sum(lengths[1::2]) for lengths in runs], np.int64)
    rest, layer, maps = np.arange(n), np.zeros(n, np.int64), []
    while len(rest) or not maps:
        top = decode([segments[i] for i in rest], (rest + 1).tolist(), size)
        whole = np.bincount(top.ravel(), minlength=n + 1)[rest + 1] == areas[rest]
        layer[rest[whole]] = len(maps)
        maps.append(np.where(np.isin(top, rest[whole] + 1), top, 0))
        rest = rest[~whole]
    return np.stack(maps).astype(np.uint8 if n < 256 else np.int32), layer, areas


def _checked(segments: list[dict], size: tuple[int, int]) -> list[str | list[int]]:
    """The counts of segments, which must be of one size."""
    H, W = size
    for segment in segments:
        if not isinstance(segment, Mapping) or not {"size", "counts"} <= segment.keys():
            raise TypeError(
                f"rle.decode: segments must be dicts of size and counts, got {segment!r:.80}"
            )
        if np.shape(segment["size"]) != (2,) or list(segment["size"]) != [H, W]:
            raise ValueError(f"rle.decode: size must be [{H}, {W}], got {segment['size']}")
    return [_counts(segment["counts"]) for segment in segments]


def _counts(counts) -> str | list[int]:
    """Counts as text, or as a list where they are not compressed."""
    if isinstance(counts, str):
        return counts
    if isinstance(counts, (bytes, bytearray)):
        return counts.decode("latin-1")  # what is no count is found later
    if isinstance(counts, (list, tuple, np.ndarray)):
        return _integers("rle.decode: counts", counts, 63)
    raise TypeError(
        f"rle.decode: counts must be text, bytes or a list of integers, got {counts!r:.80}"
    )


def _integers(name: str, values, bits: int = 31) -> list[int]:
    """Integers as a list.

    Raises:
        TypeError: they are none.
        ValueError: they do not fit into so many bits and a sign.
    """
    try:
        found = np.asarray(values)
    except ValueError:  # lists of several lengths
        found = np.empty((0, 0))
    whole = found.dtype.kind in "iu" or all(isinstance(v, int) for v in found.ravel().tolist())
    if found.ndim != 1 or (found.size and not whole):
        raise TypeError(f"{name} must be a list of integers, got {values!r:.80}")
    found = [int(v) for v in found.tolist()]
    if found and not -(2**bits) <= min(found) <= max(found) < 2**bits:
        raise ValueError(
            f"{name} must fit int{bits + 1}, got values of {min(found)} to {max(found)}"
        )
    return found


def _runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs down the columns of mask [H, W] bool, that of False first."""
    flat = mask.ravel("F")
    if flat.size == 0:
        return []
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0, 0] if flat[:1].any() else [0]
    return np.diff(np.concatenate((first, edges, [flat.size]))).tolist()


def _compress(counts: list[int]) -> bytes:
    out = bytearray()
    for i, x in enumerate(counts):
        x -= counts[i - 2] if i > 2 else 0
        more = True
        while more:
            bits, x = x & 31, x >> 5
            more = x != (-1 if bits & 16 else 0)
            out.append((bits | 32 * more) + 48)
    return bytes(out)


def _expand(text: str) -> list[int]:
    counts, x, shift = [], 0, 0
    for c in map(ord, text):
        c -= 48
        if not 0 <= c <= 63:
            raise ValueError("rle: counts hold a foreign character")
        x |= (c & 31) << shift
        shift += 5
        if not c & 32:
            x -= 1 << shift if c & 16 else 0  # the sign
            counts.append(x + (counts[-2] if len(counts) > 2 else 0))
            x = shift = 0
    if shift:
        raise ValueError("rle: counts are cut off")
    return counts
