"""TIFFs of any number of bands, as instruments and geographic tools write them.

Pillow gives no more than four bands, and of 16 bits one. Here bands lie by pixel or by plane, in
strips or tiles, uncompressed or deflated, of 8, 16 or 32 bits, in one page or several, whose bands
follow each other. Pages that hold a smaller copy or a mask are passed over. Pages of another
compression are read by Pillow where it knows their kind.

Letters: C band, H W size.
"""

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _KIND = 256, 257, 258, 259, 254
_STRIPS, _BANDS, _STRIP_ROWS, _PLANES, _PREDICTOR = 273, 277, 278, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _FORMAT, MOST = 322, 323, 324, 339, 281
_PLAIN, _DEFLATE = (1,), (8, 32946)
_ONE_KIND = "its pages must be of one size and kind"
_NOT_A_PICTURE = 5  # bits of the kind of a page: 1 a smaller copy, 4 a mask
_MOST_PAGES = 4096  # also of those that are passed over: a small file may have millions


def read_size(path: str | Path | BinaryIO, channels: int | None = None) -> tuple[int, int, int]:
    """Height, width and bands of a TIFF, by its directories alone, however large it is.

    Args:
        path: of the file, or the file, open in binary mode.
        channels: bands that are wanted: of a file with more, those are counted until there are
            more.

    Raises:
        ValueError: no such file, no TIFF, damaged, pages of several sizes, or thousands of pages;
            names the file.
    """
    with _said_of(path):
        found = _opened(path, channels)
    return *found.size, found.bands


def read_bands(
    path: str | Path | BinaryIO, max_pixels: int | None = None, channels: int | None = None
) -> tuple[np.ndarray, int | None]:
    """All bands of a TIFF, as its pixels lie in the file.

    Args:
        path: of the file, or the file, open in binary mode.
        max_pixels: width times height that it may have; None takes Pillow's limit.
        channels: C that is wanted; None takes any. Files with others are not decoded.

    Returns:
        [H, W, C] uint8, uint16 or float32, and the white that the file states, or None.

    Raises:
        ValueError: no such file, no TIFF, damaged, too large, other channels, pages of several
            sizes or kinds, or of a kind that is not read here; names the file.
    """
    most = max_pixels or 2 * (Image.MAX_IMAGE_PIXELS or 2**62)
    with _said_of(path):
        found, white = _opened(path, channels), None
        height, width = found.size
        if height * width > most:
            raise ValueError(f"{width} x {height} pixels, more than {most}: raise max_pixels")
    if channels not in (None, found.bands):
        more = " or more" if found.bands > channels else ""
        raise ValueError(f"{path}: must have {channels} channels, got {found.bands}{more}")
    pages = []
    with _said_of(path):
        for number, tags in found.pages:
            pages.append(_page(path, found.data, number, tags))
            white = white or _first(tags.get(MOST))
        if len({(page.shape[:2], page.dtype) for page in pages}) != 1:
            raise ValueError(_ONE_KIND)
    return np.concatenate(pages, 2), white


class _Opened(NamedTuple):
    """A file, the numbers and tags of its pages, and what they say."""

    data: bytes
    pages: list[tuple[int, TiffImagePlugin.ImageFileDirectory_v2]]
    size: tuple[int, int]
    bands: int


@contextmanager
def _said_of(path: str | Path | BinaryIO) -> Iterator[None]:
    """What is wrong is said of the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except Exception as error:  # of damaged files the parsers raise whatever they stumble over
        raise ValueError(f"{path}: not a TIFF whose bands can be read ({error!s:.120})") from error


def _opened(path: str | Path | BinaryIO, channels: int | None) -> _Opened:
    data = path.read() if hasattr(path, "read") else Path(path).read_bytes()
    pages, sizes, bands = [], set(), 0
    for number, tags in enumerate(_directories(data)):
        if number == _MOST_PAGES:
            raise ValueError(f"more than {_MOST_PAGES} pages")
        if tags.get(_KIND, 0) & _NOT_A_PICTURE:
            continue
        pages.append((number, tags))
        size = tags[_HEIGHT], tags[_WIDTH], tags.get(_BANDS, 1)
        if any(type(x) is not int or x < 1 for x in size):
            raise ValueError(f"height, width and bands must be at least 1, got {size}")
        sizes.add(size[:2])
        bands += size[2]
        if channels is not None and bands > channels:
            break
    if len(sizes) != 1:
        raise ValueError(_ONE_KIND)
    return _Opened(data, pages, sizes.pop(), bands)


def _directories(data: bytes) -> Iterator[TiffImagePlugin.ImageFileDirectory_v2]:
    file, seen = io.BytesIO(data), set()
    header = data[: 16 if data[2:3] == b"\x2b" or data[3:4] == b"\x2b" else 8]
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    place = tags.next
    while place and place not in seen:  # a damaged file may lead in a circle
        seen.add(place)
        file.seek(place)
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        tags.load(file)
        yield tags
        place = tags.next


def _first(value):
    return value[0] if isinstance(value, tuple) else value


def _page(path: str | Path | BinaryIO, data: bytes, number: int, tags) -> np.ndarray:
    """The bands of a page, [H, W, C]."""
    H, W, C = tags[_HEIGHT], tags[_WIDTH], tags.get(_BANDS, 1)
    compression = tags.get(_COMPRESSION, 1)
    if compression not in (*_PLAIN, *_DEFLATE):
        return _by_pillow(path, number, C)
    bits, kind = _first(tags.get(_BITS, 1)), _first(tags.get(_FORMAT, 1))
    dtype = {(8, 1): "u1", (16, 1): "u2", (32, 3): "f4"}.get((bits, kind))
    predictor = tags.get(_PREDICTOR, 1)
    if dtype is None or predictor not in (1, 2) or (predictor == 2 and kind == 3):
        raise ValueError(f"bits {bits}, format {kind}, predictor {predictor} are not read here")
    order = "<" if data[:2] == b"II" else ">"
    planes = C if tags.get(_PLANES, 1) == 2 else 1
    if tiled := _TILES in tags:
        h, w, offsets, lengths = tags[_TILE_HEIGHT], tags[_TILE_WIDTH], _TILES, _TILES + 1
    else:
        h, w, offsets, lengths = min(tags.get(_STRIP_ROWS, H), H), W, _STRIPS, 279
    out = np.zeros((planes, H, W, C // planes), dtype)
    places = ((p, y, x) for p in range(planes) for y in range(0, H, h) for x in range(0, W, w))
    for (p, y, x), start, length in zip(places, tags[offsets], tags[lengths], strict=True):
        part = data[start : start + length]
        rows = h if tiled else min(h, H - y)
        if compression in _DEFLATE:  # no more than what belongs there
            size = rows * w * (C // planes) * np.dtype(dtype).itemsize
            part = zlib.decompressobj().decompress(part, size)
        pixels = np.frombuffer(part, order + dtype, rows * w * (C // planes))
        pixels = pixels.reshape(rows, w, -1).astype(dtype)
        if predictor == 2:
            pixels = np.cumsum(pixels, 1, dtype)
        target = out[p, y : y + h, x : x + w]
        target[:] = pixels[: target.shape[0], : target.shape[1]]
    return np.ascontiguousarray(np.moveaxis(out, 0, 2).reshape(H, W, C))


def _by_pillow(path: str | Path | BinaryIO, number: int, C: int) -> np.ndarray:
    with Image.open(path) as image:
        image.seek(number)
        pixels = np.asarray(image)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] != C or pixels.dtype not in (np.uint8, np.uint16, np.float32):
        raise ValueError("save it uncompressed or deflated")
    return pixels
