"""What image processors return: tensors by name, arranged as each kind of model takes them.

Letters: B image, C channels, H W size of an image in the batch, n segment.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..structures.settings import InputConfig
from .processor_inputs import masks_of

SEGFORMER, EOMT, ONEFORMER = (f"{k}ImageProcessor" for k in ("Segformer", "Eomt", "OneFormer"))


class Batch(dict):
    """Tensors by name, also as attributes: what a processor returns."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Batch":
        """The same on another device and, of floating tensors, of another dtype, which may also
        stand first; what is no tensor, nor a list of tensors, stays."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device

        def moved(value):
            if isinstance(value, (list, tuple)):
                return [moved(x) for x in value]
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else None)

        return Batch({name: moved(value) for name, value in self.items()})


def arranged(
    kind: str,
    pixels: list[Tensor],
    maps: list[Tensor] | None,
    settings: dict,
    takes: InputConfig,
    classes: dict[int, int] | list[dict[int, int]] | None,
) -> Batch:
    """What a model takes, in lists of an entry an image: padded, or cut into windows.

    Args:
        kind: class of image processors.
        pixels: of each image [C, H, W], normalised.
        maps: of each image its labels, or ids of instances, [H, W] int64.
        settings: as `models.preprocessor.read_preprocessor` gives them.
        takes: what they mean.
        classes: label of each id, for all images or of each.

    Raises:
        ValueError: an id that has no label, an image larger than `pad_size`, or no size of
            windows.
    """
    more = settings["processing"]
    if kind == SEGFORMER:
        return Batch(pixel_values=pixels, **({} if maps is None else {"labels": maps}))
    out = Batch()
    if kind == EOMT:
        offsets = []
        if settings.get("do_split_image"):
            side = settings["shortest_edge"]
            if side is None:
                raise ValueError("Processor: size must have a shortest_edge with do_split_image")
            offsets = _windows([x.shape[1:] for x in pixels], side)
            pixels = [_window(pixels[i], start, side) for i, start, _ in offsets]
            maps = maps and [_window(maps[i], start, side) for i, start, _ in offsets]
            classes = [classes[i] for i, *_ in offsets] if isinstance(classes, list) else classes
        sizes = [tuple(x.shape[1:]) for x in pixels]
        ends = sizes
        if takes.pad_size:
            ends = [tuple(map(max, size, takes.pad_size)) for size in sizes]
        out["patch_offsets"] = [torch.tensor(place) for place in offsets]
    else:
        sizes = [tuple(x.shape[1:]) for x in pixels]
        padded = [takes.padded(size) for size in sizes]
        ends = [tuple(max(sides) for sides in zip(*padded))] * len(sizes)
        out["pixel_mask"] = [
            _padded(torch.ones(size, dtype=torch.int64), end) for size, end in zip(sizes, ends)
        ]
    raw = not more.do_rescale and not more.do_normalize
    colour = (0.0,) * takes.channels if raw else takes.padding
    out["pixel_values"] = [
        torch.stack([_padded(plane, end, value) for plane, value in zip(x, colour)])
        for x, end in zip(pixels, ends)
    ]
    if maps is None:
        return out
    reduce = more.ignore_index is not None if kind == EOMT else more.do_reduce_labels
    found = []
    for i, (labels, end) in enumerate(zip(maps, ends)):
        names = classes[i] if isinstance(classes, list) else classes
        name = f"Processor: segmentation_maps[{i}]"
        masks, their_labels = masks_of(labels, names, reduce, more.ignore_index, name)
        found.append((_padded(masks, end), their_labels))
    out["mask_labels"], out["class_labels"] = map(list, zip(*found))
    return out


def _padded(x: Tensor, size: tuple[int, int], value: float = 0) -> Tensor:
    """[..., H, W] to the right and below."""
    return F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]), value=value)


def _windows(sizes: Sequence[tuple[int, int]], side: int) -> list[tuple[int, int, int]]:
    """Image, begin and end of windows along the long sides, as transformers places them."""
    places = []
    for i, size in enumerate(sizes):
        n = math.ceil(max(size) / side)
        overlap = (n * side - max(size)) / (n - 1) if n > 1 else 0
        starts = [int(k * (side - overlap)) for k in range(n)]
        places += [(i, start, start + side) for start in starts]
    return places


def _window(x: Tensor, start: int, side: int) -> Tensor:
    h, w = x.shape[-2:]
    return x[..., start : start + side, :] if h > w else x[..., start : start + side]


def converted(out: Batch, kind: str | None) -> Batch:
    """Lists of tensors of one shape as one tensor or array.

    Raises:
        ValueError: images of several sizes.
    """
    for name in ("pixel_values", "pixel_mask", "labels"):
        if kind is None or name not in out:
            continue
        shapes = {tuple(x.shape) for x in out[name]}
        if len(shapes) > 1:
            raise ValueError(
                f"Processor: {name} must have one shape for a tensor, got "
                f"{' and '.join(map(str, sorted(shapes)))}; return_tensors=None gives a list"
            )
        out[name] = torch.stack(out[name])
    if kind == "np":
        for name, value in out.items():
            if isinstance(value, Tensor):
                out[name] = value.numpy()
            elif value and isinstance(value[0], Tensor):
                out[name] = [np.asarray(x) for x in value]
    return out
