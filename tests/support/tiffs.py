"""TIFFs of any number of bands, written byte by byte."""

import struct
import zlib

import numpy as np


def tiff(
    pixels,
    order="<",
    planar=False,
    deflate=False,
    predictor=1,
    tile=0,
    rows=0,
    more=(),
    packed=b"",
):
    """A TIFF of one page, its bands by pixel or by plane; `packed` stands for each part."""
    height, width, bands = pixels.shape
    kind = 3 if pixels.dtype.kind == "f" else 1
    planes = np.moveaxis(pixels, 2, 0)[..., None] if planar else pixels[None]
    parts = []
    for plane in planes:
        h, w = (tile, tile) if tile else (rows or height, width)
        for y in range(0, height, h):
            for x in range(0, width, w):
                part = plane[y : y + h, x : x + w]
                if tile:
                    part = np.pad(part, ((0, h - len(part)), (0, w - part.shape[1]), (0, 0)))
                if predictor == 2:
                    part = np.diff(part, axis=1, prepend=part[:, :1] * 0).astype(part.dtype)
                data = part.astype(part.dtype.newbyteorder(order)).tobytes()
                parts.append(packed or (zlib.compress(data) if deflate else data))
    tags = {
        256: [width], 257: [height], 258: [8 * pixels.dtype.itemsize] * bands,
        259: [8 if deflate else 1], 262: [1], 277: [bands], 278: [rows or height],
        284: [2 if planar else 1], 317: [predictor], 339: [kind] * bands,
    }  # fmt: skip
    tags |= {322: [tile], 323: [tile]} if tile else {}
    body, offsets = b"", []
    for part in parts:
        offsets.append(8 + len(body))
        body += part + b"\0" * (len(part) % 2)
    places = (324, 325) if tile else (273, 279)
    tags |= dict(zip(places, (offsets, [len(part) for part in parts])))
    tags |= dict(more)
    directory, tail = struct.pack(order + "H", len(tags)), b""
    start = 8 + len(body) + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            tail += packed
            packed = struct.pack(order + "I", start + len(tail) - len(packed))
        directory += struct.pack(order + "HHI", tag, 4, len(numbers)) + packed
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(body))
    return head + body + directory + b"\0" * 4 + tail
