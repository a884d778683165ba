"""COCO run-length encoding of label maps, as annotation files and pycocotools write it.

A segment is `{"size": [H, W], "counts": str}`. The work is done by `segkern._host` (C++, every
segment in one pass); where it was not built, by pycocotools.
"""

import numpy as np

try:
    from segkern import _host
except ImportError:  # pure-Python install, or another Python than the one it was built for
    _host = None


def _coco():
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "segkern.rle needs its compiled part (reinstall without SEGKERN_NO_BUILD) "
            "or pycocotools (pip install pycocotools)"
        ) from error
    return mask


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
        counts = [_coco().encode(np.asfortranarray(labels == i))["counts"] for i in ids]
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
        ValueError: another size, or counts that do not fill it.
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
        labels[_coco().decode(segment).astype(bool)] = i
    return labels
