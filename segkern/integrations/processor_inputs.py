"""Pictures and maps of labels as transformers' image processors take them, to tensors.

Letters: C channels, H W size of a picture, h w where it is resized, n segment.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..io.images import read_image, resize
from ..structures.settings import InputConfig


def each(given, dims: int) -> list:
    """One or several as a list; an array or tensor of more than `dims` dimensions is several."""
    if isinstance(given, (np.ndarray, Tensor)) and given.ndim > dims:
        return list(given)
    return list(given) if isinstance(given, (list, tuple)) else [given]


def read_picture(image, name: str, channels: int = 3) -> Tensor:
    """A picture with its values as they are.

    Args:
        image: path, PIL image, array or tensor [H, W], [H, W, C] or [C, H, W]; white of
            PIL images deeper than 8 bits becomes 255.
        name: begins the message of an error.
        channels: C that is wanted.

    Returns:
        [channels, H, W]: uint8 where 8 bits came, else float32, or float64 where that came.

    Raises:
        TypeError, ValueError: as `read_image`, or values that are not finite.
    """
    if not isinstance(image, (np.ndarray, Tensor)):
        x = read_image(image, name, channels=channels)
        return 255 * x if x.is_floating_point() else x
    x = _tensor(image)
    known = (1, 3, 4) if channels == 3 else (channels,)
    if x.ndim == 3 and x.shape[0] not in known:
        x = x.movedim(2, 0)
    if x.dtype == torch.uint8:
        return read_image(x, name, channels=channels)
    x = x[None] if x.ndim == 2 else x
    if x.ndim != 3 or 0 in x.shape or x.shape[0] not in {1, channels}:
        raise ValueError(
            f"{name}: must be [H, W], [H, W, C] or [C, H, W] with {channels} channels or 1, and "
            f"not empty, got {list(image.shape)}"
        )
    x = x if x.dtype == torch.float64 else x.float()
    if not x.isfinite().all():
        raise ValueError(f"{name}: pixels must be finite, got NaN or infinity")
    return x.expand(channels, -1, -1)


def _tensor(values: np.ndarray | Tensor) -> Tensor:
    """Also of an array that runs backwards, such as an image of OpenCV with its colours turned."""
    if isinstance(values, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(values))
    return values.detach()


def pixels_of(picture: Tensor, settings: InputConfig, raw: bool) -> Tensor:
    """A picture resized and normalised, not padded.

    Args:
        picture: [C, H, W] uint8 or floating, white is 255 as a rule.
        settings: mean and std of pixels in [0, 1].
        raw: leaves the values.

    Returns:
        [C, h, w] float32, or of the picture's dtype where it is raw.
    """
    x = resize(picture, settings.resized(tuple(picture.shape[1:])), settings.resample)
    if raw:
        return x
    x = x.float() / 255
    mean, std = (x.new_tensor(v)[:, None, None] for v in (settings.mean, settings.std))
    return (x - mean) / std


def read_labels(found, name: str) -> Tensor:
    """A map of labels or ids.

    Args:
        found: PIL image, array or tensor [H, W] or [1, H, W] of whole numbers.
        name: begins the message of an error.

    Returns:
        [H, W] int64.

    Raises:
        TypeError, ValueError: of another dtype or shape.
    """
    if not isinstance(found, (Image.Image, np.ndarray, Tensor)):
        raise TypeError(
            f"{name}: must be a PIL image, array or tensor, got {type(found).__name__}"
        )
    values = np.array(found) if isinstance(found, Image.Image) else found
    if isinstance(values, np.ndarray) and values.dtype == np.uint16:
        values = values.astype(np.int64)
    x = _tensor(values)
    x = x[0] if x.ndim == 3 and len(x) == 1 else x
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"{name}: must be [H, W] and not empty, got {list(x.shape)}")
    if x.is_complex() or (x.is_floating_point() and not (x == x.round()).all()):
        raise TypeError(f"{name}: must hold whole numbers, got {x.dtype}")
    return x.long()


def resized_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """[H, W] int64 to [h, w], each pixel the nearest one's."""
    return resize(labels[None].double(), size, "nearest-exact")[0].long()  # exact up to 2^53


def reduced(labels: Tensor, ignore: int) -> Tensor:
    """Labels that began with 1; 0 becomes `ignore`."""
    return torch.where(labels == 0, ignore, labels - 1)


def masks_of(
    labels: Tensor, classes: dict[int, int] | None, reduce: bool, ignore: int | None, name: str
) -> tuple[Tensor, Tensor]:
    """The segments of a map.

    Args:
        labels: [h, w] int64, labels or ids of instances.
        classes: label of each id; None where they are labels.
        reduce: labels, and the ids, begin with 1.
        ignore: label of what is no segment.
        name: begins the message of an error.

    Returns:
        masks [n, h, w] float32, in the order of their ids, and their labels [n] int64.

    Raises:
        ValueError: an id that has no label.
    """
    labels = reduced(labels, ignore) if reduce else labels
    ids = [i for i in labels.unique().tolist() if i != ignore]
    masks = torch.stack([labels == i for i in ids]) if ids else labels.new_zeros(0, *labels.shape)
    found = ids
    if classes is not None:
        places = [i + reduce for i in ids]
        if lacking := [i for i in places if i not in classes]:
            raise ValueError(
                f"{name}: instance_id_to_semantic_id must have every id of the map, "
                f"{lacking[0]} too"
            )
        found = [classes[i] - reduce for i in places]
    return masks.float(), torch.tensor(found, dtype=torch.int64)
