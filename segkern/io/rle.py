"""COCO run-length encoding of label maps, as annotation files and pycocotools write it.

A segment is `{"size": [H, W], "counts": str}`. The work is done by `segkern._host` (C++, every
segment in one pass); where it was not built, by NumPy. csrc/host/rle.cpp describes the format.
"""

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
        ValueError: labels is not [H, W], or an id comes twice.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iub":
        raise ValueError(
            f"rle.encode: labels must be [H, W] integers, got {labels.shape} {labels.dtype}"
        )
    if len(set(ids)) != len(ids):
        raise ValueError(f"rle.encode: ids must be distinct, got {list(ids)}")
    size = list(labels.shape)
    if _host is not None:
        counts = _host.encode(labels.astype(np.int32, copy=False), list(ids))
    else:
        counts = [_compress(_runs(labels == i)) for i in ids]
    return [{"size": size, "counts": c.decode("ascii")} for c in counts]


def decode(segments: list[dict], ids: list[int], size: tuple[int, int]) -> np.ndarray:
    """The label map of run-length encoded segments; later ones lie over earlier ones, 0 elsewhere.

    Args:
        segments: as `encode` returns them.
        ids: the value of each segment.
        size: (H, W); every segment must have it.

    Returns:
        [H, W] int32.

    Raises:
        ValueError: another size, or counts that are damaged or do not fill it.
    """
    H, W = size
    for segment in segments:
        if list(segment["size"]) != [H, W]:
            raise ValueError(f"rle.decode: size must be [{H}, {W}], got {segment['size']}")
    if len(ids) != len(segments):
        raise ValueError(
            f"rle.decode: as many ids as segments needed, got {len(ids)} for {len(segments)}"
        )
    if _host is not None:
        return _host.decode([s["counts"] for s in segments], list(ids), H, W)
    labels = np.zeros((H, W), np.int32)
    for segment, i in zip(segments, ids):
        counts = _expand(segment["counts"])
        if min(counts, default=0) < 0 or sum(counts) > H * W:
            raise ValueError("rle: counts exceed the size")
        if sum(counts) < H * W:
            raise ValueError("rle: counts do not fill the size")
        inside = np.arange(len(counts)) % 2 == 1
        labels[np.repeat(inside, np.array(counts, np.int64)).reshape(W, H).T] = i
    return labels


def _runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs down the columns of mask [H, W] bool, that of False first."""
    flat = mask.ravel("F")
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
    for c in text.encode():
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
