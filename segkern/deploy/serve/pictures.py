"""Pictures from clients: known formats alone, measured by their head before they are decoded."""

from io import BytesIO
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ...inference.segment import Input
from ...io.images import open_image, read_image, shown, size_in_head
from ...io.tiff import read_size
from ...structures.settings import InputConfig
from .batches import VIEWS
from .refused import Refused

# those that cameras, phones and browsers write, as far as this Pillow was built with them; others
# of Pillow's start programs (EPS) or have no use
Image.init()
FORMATS = tuple(
    x for x in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF") if x in Image.OPEN
)
_SMALL = 2**21  # pixels that may be held as floats


class Body(BytesIO):
    """A picture's file in memory, which messages call by its name.

    Args:
        data: the bytes.
        name: such as "image 2".
    """

    def __init__(self, data: bytes, name: str = "image"):
        super().__init__(data)
        self.name = name

    def __str__(self) -> str:
        return self.name


class Picture(NamedTuple):
    """A picture that was decoded.

    Attributes:
        input: as the model takes it.
        shown: [1 or 3, H, W], for an overlay; None where none is drawn.
    """

    input: Input
    shown: Tensor | None


def pixels_of(body: Body, channels: int, max_pixels: int) -> int:
    """Width times height, from the file's head; for each three bands once, where the model takes
    bands of a TIFF.

    Args:
        body: the file.
        channels: that the model takes.
        max_pixels: the most that is taken.

    Raises:
        Refused: not of `FORMATS`, or too large.
    """
    known, bands = FORMATS if channels == 3 else ("TIFF",), 3
    try:
        if channels == 3:
            height, width = size_in_head(body, FORMATS)
        else:
            height, width, bands = read_size(body, channels)
    except ValueError as error:
        if not body.getbuffer().nbytes:
            raise Refused(400, f"{body}: empty, a picture's file was expected") from error
        reason = f"{body}: not a picture that is taken ({', '.join(known)})"
        raise Refused(415, reason) from error
    pixels = width * height * max(1, -(-bands // 3))
    if pixels > max_pixels:
        times = f" of {bands} bands" if bands > 3 else ""
        raise Refused(
            413, f"{body}: {width} x {height} pixels{times}, at most {max_pixels} pixels are taken"
        )
    return pixels


def decode(body: Body, settings: InputConfig, max_pixels: int, keep: bool) -> Picture:
    """A picture as a model takes it.

    It is resized here, so that the full size need not wait for the model; but a large picture
    that the model takes as large is resized when its batch is made, as it has four times the bytes
    then.

    Args:
        body: the file, measured by `pixels_of`.
        settings: the model's `config.input`.
        max_pixels: width times height that it may have.
        keep: keeps the picture itself, too.

    Raises:
        Refused: it is damaged, or the model cannot take it.
    """
    body.seek(0)
    try:
        image = body
        if settings.channels == 3:
            image = open_image(body, max_pixels, formats=FORMATS, count_pages=False)
        pixels = read_image(image, str(body), max_pixels, settings.channels)
        one = Input.of(pixels, settings, VIEWS)
    except (ValueError, TypeError, MemoryError) as error:
        raise Refused(422, " ".join(str(error).split())) from error
    if sum(h * w for h, w in one.sizes) <= max(_SMALL, pixels[0].numel() // 4):
        ready = [one.read(k) for k in range(len(one.sizes))]
        one = one._replace(read=ready.__getitem__)
    return Picture(one, shown(pixels).clone() if keep else None)
