"""Pictures of any kind to tensors, and tensors to what the model takes.

Letters: C channels, H W size of the picture, h w size in the model.
"""

import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from .tiff import MOST, read_bands

# what PIL's modes of more than 8 bits count as full brightness, if no pixel is brighter; "F" holds
# 8-bit values as floats, or floats up to 1
_FULL = {"I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I;16N": 65535, "I": 65535, "F": 255}
# files of several frames whose first is the picture and the others its parts: previews, depth and
# gain maps of a phone's photo, layers
_PARTS = ("MPO", "PSD")
_EXTRA_SAMPLES, _SUBFILE_TYPE = 338, 254  # tags of TIFF
_NARROW = (255, 1023, 4095)  # white of pictures of 8, 10 and 12 bits in 16
_limit = threading.Lock()


def open_image(
    path: str | Path | BinaryIO,
    max_pixels: int | None = None,
    upright: bool = True,
    formats: Sequence[str] | None = None,
    count_pages: bool = True,
) -> Image.Image:
    """Reads a picture whole, turned upright as its EXIF tag says.

    Of a file with several pages or frames the first is read, with a warning that names the file
    and counts the others; previews, masks and smaller copies of it do not count.

    Args:
        path: of the file, or the file, open in binary mode.
        max_pixels: width times height that a picture may have; None takes Pillow's limit
            (178,956,970, twice `PIL.Image.MAX_IMAGE_PIXELS`), which keeps a small file from
            filling the memory.
        upright: false leaves it as its pixels lie in the file.
        formats: those that it may have, as Pillow names them, such as "JPEG"; None for all.
        count_pages: false does not look for others, which takes long where a small file has very
            many, and says nothing of them.

    Raises:
        TypeError: max_pixels is no integer.
        ValueError: no such file, not an image that PIL can read, or too large; names the file.
    """
    if max_pixels is not None and (type(max_pixels) is not int or max_pixels < 1):
        raise TypeError(f"max_pixels must be a positive integer, got {max_pixels!r}")
    try:
        with _unlimited(max_pixels is not None):
            image = Image.open(path, formats=formats)
        with image:
            width, height = image.size
            if max_pixels is not None and width * height > max_pixels:
                raise Image.DecompressionBombError(
                    f"{width} x {height} pixels, more than max_pixels = {max_pixels}"
                )
            if count_pages and (others := _other_pages(image)):
                warnings.warn(
                    f"{path}: the first page alone is read; left out: {others}", stacklevel=2
                )
            image.load()
            mode = _mode(image)
            if white := getattr(image, "tag_v2", {}).get(MOST):
                image.info["white"] = white[0] if isinstance(white, tuple) else white
            if upright and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                image = ImageOps.exif_transpose(image)  # it copies any other, too
            return image if image.mode == mode else image.convert(mode)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not an image that PIL can read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path}: too large ({error}); if you trust it, raise max_pixels (--max-pixels; "
            "in training --data.max-pixels or --data.read.max-pixels)"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def read_head(
    path: str | Path, max_pixels: int | None = None
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """What a picture's head says of it: its size (H, W) as its pixels lie in the file, that of the
    upright picture, and its EXIF orientation, 1 to 8.

    Raises:
        ValueError: as `open_image`.
    """
    try:
        with _unlimited(max_pixels is not None):
            image = Image.open(path)
        with image:
            raw, turned = image.size[::-1], image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        try:
            image = open_image(path, max_pixels, upright=False)
            raw, turned = image.size[::-1], 1
        except ValueError:  # says what is wrong, if it is not a TIFF of many bands
            if Path(path).suffix.lower() not in (".tif", ".tiff"):
                raise
            raw, turned = read_bands(path, max_pixels)[0].shape[:2], 1
    turned = turned if turned in range(1, 9) else 1
    return raw, raw[::-1] if turned >= 5 else raw, turned


def size_in_head(
    path: str | Path | BinaryIO, formats: Sequence[str] | None = None
) -> tuple[int, int]:
    """The size (H, W) of a picture as its pixels lie in the file, by its head alone, also where it
    is beyond Pillow's limit.

    Args:
        path: of the file, or the file, open in binary mode.
        formats: as of `open_image`.

    Raises:
        ValueError: no image that PIL can read; names the file.
    """
    try:
        with _unlimited(True):
            return Image.open(path, formats=formats).size[::-1]
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not an image that PIL can read") from error


@contextmanager
def _unlimited(lift: bool) -> Iterator[None]:
    """Lifts Pillow's limit while a file's header is read; it is the whole process's."""
    if not lift:
        yield
        return
    with _limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _other_pages(image: Image.Image) -> int:
    """How many pages of a file hold another picture than the first; 0 where they are damaged."""
    if image.format in _PARTS:
        return 0
    try:
        frames = getattr(image, "n_frames", 1)
        if image.format != "TIFF":
            return frames - 1
        others = 0
        for page in range(1, frames):
            image.seek(page)
            others += not image.tag_v2.get(_SUBFILE_TYPE, 0) & 5  # 1: a smaller copy, 4: a mask
        return others
    except (OSError, EOFError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 0  # the first may be whole
    finally:
        image.seek(0)


def _mode(image: Image.Image) -> str:
    """PIL's mode; without the alpha that it reads in a TIFF which does not say it has one."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or image.mode not in ("RGBA", "LA"):
        return image.mode
    says_so = {1, 2} & set(image.tag_v2.get(_EXTRA_SAMPLES, ()))  # alpha, multiplied in or not
    return image.mode if says_so else image.mode.removesuffix("A")


def read_image(
    image, name: str = "image", max_pixels: int | None = None, channels: int = 3
) -> Tensor:
    """A picture as a tensor.

    Args:
        image: path, file open in binary mode, PIL image, array [H, W] or [H, W, C], tensor [H, W]
            or [C, H, W]; arrays and tensors bool, uint8, uint16 or floating in [0, 1]; C is 1
            (grey), 2 (grey, alpha), 3 or 4 (with alpha). What is transparent shows white, as most
            viewers do it. White is 65535 in a deep PIL image ("I") and 255 in a floating one ("F";
            1 if no pixel is above 1), or the brightest pixel if that is more.
        name: begins the message of an error.
        max_pixels: of a file, as in `open_image`.
        channels: C that is wanted. With another number than 3 the channels are taken as they are:
            those of an array or tensor, or the bands of a TIFF's pages (`io.tiff`).

    Returns:
        [channels, H, W]: uint8 where 8 bits came, else float32 in [0, 1].

    Raises:
        TypeError: of no such kind or dtype.
        ValueError: another shape, empty, NaN, out of range, or a file that is no image.
    """
    if isinstance(image, (str, Path)) or hasattr(image, "read"):
        if channels == 3:
            image = open_image(image, max_pixels)
        else:
            image = _bands(image, max_pixels, channels)
    if isinstance(image, Image.Image):
        if channels != 3:
            raise ValueError(
                f"{name}: must be a TIFF, array or tensor of {channels} channels, got a PIL image"
            )
        image = _from_pil(image, name)
    if isinstance(image, np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(image))
        x = x.movedim(-1, 0) if x.ndim == 3 else x
        layout = "[H, W] or [H, W, C]"
    elif isinstance(image, Tensor):
        x, layout = image.detach(), "[H, W] or [C, H, W]"
    else:
        raise TypeError(
            f"{name}: must be a path, PIL image, array or tensor, got {type(image).__name__}"
        )
    x = x[None] if x.ndim == 2 else x
    known = (1, 2, 3, 4) if channels == 3 else (channels,)
    if x.ndim != 3 or x.shape[0] not in known or 0 in x.shape:
        rule = "1 to 4" if channels == 3 else channels
        raise ValueError(
            f"{name}: must be {layout} with {rule} channels and not empty, got {list(image.shape)}"
        )
    if x.dtype == torch.bool:
        x = x.float()
    elif x.dtype == torch.uint16:
        x = x.float() / 65535
    elif x.is_floating_point():
        x = x.float()
        if not x.isfinite().all():
            raise ValueError(f"{name}: pixels must be finite, got NaN or infinity")
        low, high = x.min().item(), x.max().item()
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(
                f"{name}: floating pixels must be in [0, 1], got {low:.4g} to {high:.4g}"
            )
        x = x.clamp(0, 1)
    elif x.dtype != torch.uint8:
        kind = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: pixels must be bool, uint8, uint16 or floating, got {kind}")
    if channels != 3:
        return x
    if x.shape[0] in (2, 4):
        x = _on_white(x)
    return x.expand(3, -1, -1)


def read_values(path: str | Path, max_pixels: int | None = None) -> np.ndarray:
    """The values of a map as the file holds them, not turned.

    Pillow spreads grey values of 2 and 4 bits over 0 to 255; here they are 0 to 3 and 0 to 15.

    Args:
        path: of the file.
        max_pixels: as in `open_image`.

    Returns:
        [H, W] integers, of a palette the places in it; [H, W, C] uint8 of colours.

    Raises:
        ValueError: as `open_image`.
    """
    image = open_image(path, max_pixels, upright=False)
    values = np.asarray(image)
    if values.dtype.kind == "f":
        if not (values == np.rint(values)).all():
            raise ValueError(f"{path}: a map must hold integers, got {values.dtype} with others")
        return values.astype(np.int64)
    if image.mode == "L" and Path(path).suffix.lower() == ".png":
        with open(path, "rb") as file:
            depth = file.read(25)[24]  # of the head that every PNG begins with
        if depth in (2, 4):
            return values // (255 // (2**depth - 1))
    return values.astype(np.uint8) if values.dtype == bool else values


def read_pixels(
    image, name: str = "image", max_pixels: int | None = None, channels: int = 3
) -> np.ndarray:
    """A picture in 8 bits.

    Args:
        image, name, max_pixels, channels: as `read_image` takes them.

    Returns:
        [H, W, channels] uint8.

    Raises:
        TypeError, ValueError: as `read_image`.
    """
    pixels = read_image(image, name, max_pixels, channels)
    pixels = pixels if not pixels.is_floating_point() else (pixels * 255).round().byte()
    return np.ascontiguousarray(pixels.movedim(0, 2).cpu().numpy())


def picture_suffixes() -> set[str]:
    """Suffixes of the files that PIL can read, such as ".png"."""
    known = Image.registered_extensions()
    # some it only knows by name: their pixels are left to others
    named = {k for k, (make, _) in Image.OPEN.items() if _is_stub(make)} | {"MPEG"}
    return {s for s, kind in known.items() if kind in Image.OPEN and kind not in named}


def _is_stub(make) -> bool:
    return isinstance(make, type) and issubclass(make, ImageFile.StubImageFile)


def prepare(image: Tensor, settings) -> Tensor:
    """A picture as the model takes it: resized and normalised, not yet padded.

    Args:
        image: [C, H, W] uint8, or floating in [0, 1].
        settings: a model's `config.input`, of which `resized`, `resample`, `mean` and `std` count.

    Returns:
        [C, h, w] float32.
    """
    x = resize(image, settings.resized(tuple(image.shape[1:])), settings.resample).float()
    if image.dtype == torch.uint8:
        x /= 255  # 8 bits stay 8 bits when resized, as in training
    mean, std = (x.new_tensor(v)[:, None, None] for v in (settings.mean, settings.std))
    return (x - mean) / std


def resize(image: Tensor, size: tuple[int, int], resample: str = "bilinear") -> Tensor:
    """A picture of another size, with antialiasing, as torchvision does it, and so Hugging Face's
    processors by default: 8 bits stay 8 bits and are computed in whole numbers on most CPUs.

    Args:
        image: [C, H, W] of any dtype.
        size: (h, w).
        resample: a mode of torchvision's.

    Returns:
        [C, h, w] of its dtype.
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    import torchvision  # takes as long as torch
    from torchvision.transforms.v2 import functional as tv

    version = tuple(map(int, torchvision.__version__.split(".")[:2]))
    if resample == "lanczos" and (version < (0, 27) or image.device.type != "cpu"):
        warnings.warn(
            "Lanczos needs torchvision 0.27 and a picture on the CPU: bicubic stands for it, as "
            "in Hugging Face's processors",
            stacklevel=2,
        )
        resample = "bicubic"
    return tv.resize(image, list(size), tv.InterpolationMode(resample), antialias=True)


def target_size(
    size: tuple[int, int], shortest: int | None, longest: int | None
) -> tuple[int, int]:
    """Height and width whose short side is `shortest`, unless the long side passes `longest`."""
    scales = [shortest / min(size)] if shortest else []
    scales += (
        [longest / max(size)]
        if longest and (not scales or scales[0] * max(size) > longest)
        else []
    )
    if not scales or (not shortest and scales[-1] >= 1):
        return size
    return tuple(max(1, int(s * scales[-1] + 0.5)) for s in size)


def cut_size(size: tuple[int, int], shortest: int, longest: int | None) -> tuple[int, int]:
    """As `target_size`, with the short side rounded and the long side cut to whole pixels, each
    from the other and in the order in which Hugging Face's processors compute them."""
    short, long = min(size), max(size)
    exact = shortest
    if longest is not None and long / short * shortest > longest:
        exact = longest * short / long
    new = round(exact)
    if new == short:
        return size
    sides = max(1, new), max(1, int(exact * long / short))
    return sides if size[0] <= size[1] else sides[::-1]


def fitted_size(size: tuple[int, int], most: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the same shape, the largest within `most`, cut to whole pixels."""
    scale = min(m / s for s, m in zip(size, most))
    return tuple(max(1, int(s * scale)) for s in size)


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    if image.mode in _FULL:
        pixels = np.asarray(image).astype(np.float32)
        low, high = pixels.min(initial=0), pixels.max(initial=0)
        white = 1 if image.mode == "F" and high <= 1 else max(_FULL[image.mode], high)
        if image.mode != "F" and high > 0:
            if stated := image.info.get("white"):
                white = max(stated, high)
            elif high <= _NARROW[-1]:
                white = _narrow_white(high, name)
        if low < -1e-3 * white:
            raise ValueError(f"{name}: pixels must not be negative, got {low:.4g}")
        return pixels / np.float32(white)
    if image.mode != (mode := _mode(image)):  # convert copies where it need not
        image = image.convert(mode)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode))


def _narrow_white(high: float, name: str) -> int:
    """White of 16-bit pixels whose brightest is that, where their file does not state it."""
    white = next(top for top in _NARROW if high <= top)
    warnings.warn(
        f"{name}: the brightest of its 16-bit pixels is {high:.0f}: white is taken as {white}",
        stacklevel=4,
    )
    return white


def _bands(path: str | Path | BinaryIO, max_pixels: int | None, channels: int) -> np.ndarray:
    """The bands of a TIFF, [H, W, C] uint8, or float32 in [0, 1]; floats up to 255 or 65535 are
    scaled as integers of 8 and 16 bits are."""
    pixels, white = read_bands(path, max_pixels, channels)
    if pixels.dtype == np.uint8:
        return pixels
    high = float(pixels.max(initial=0))
    if pixels.dtype == np.float32 and not white:
        white = 1 if high <= 1 else 255 if high <= 255 else max(65535, high)
    elif not white:
        narrow = 0 < high <= _NARROW[-1]
        white = _narrow_white(high, str(path)) if narrow else _FULL["I;16"]
    return pixels.astype(np.float32) / np.float32(max(white, high))


def shown(image: Tensor) -> Tensor:
    """What a picture [C, H, W] of any number of channels is drawn as: its first three, or one."""
    return image[:3] if len(image) >= 3 else image[:1]


def _on_white(x: Tensor) -> Tensor:
    """[C + 1, H, W] -> [C, H, W]: the last channel is the opacity."""
    top = 255.0 if x.dtype == torch.uint8 else 1.0
    pixels, alpha = x[:-1].float(), x[-1:].float() / top
    mixed = pixels * alpha + top * (1 - alpha)
    return mixed.round().to(x.dtype) if x.dtype == torch.uint8 else mixed
