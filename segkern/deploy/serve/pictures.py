"""Pictures from clients: known formats alone, measured by their head before they are decoded."""

import warnings
from io import BytesIO
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ...inference.segment import Input
from ...io.images import open_image, read_image, shown
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


def pixels_of(body: Body, max_pixels: int) -> int:
    """Width times height, from the file's head.

    Raises:
        Refused: not of `FORMATS`, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its limit is ours
            width, height = Image.open(body, formats=FORMATS).size
    except Image.DecompressionBombError as error:
        raise Refused(413, f"{body}: too many pixels, at most {max_pixels} are taken") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        known = ", ".join(FORMATS)
        if not body.getbuffer().nbytes:
            raise Refused(400, f"{body}: empty, a picture's file was expected") from error
        raise Refused(415, f"{body}: not a picture that is taken ({known})") from error
    if width * height > max_pixels:
        raise Refused(
            413, f"{body}: {width} x {height} pixels, at most {max_pixels} pixels are taken"
        )
    return width * height


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
            image = open_image(body, max_pixels, formats=FORMATS)
        pixels = read_image(image, str(body), max_pixels, settings.channels)
        one = Input.of(pixels, settings, VIEWS)
    except (ValueError, TypeError, MemoryError) as error:
        raise Refused(422, " ".join(str(error).split())) from error
    if sum(h * w for h, w in one.sizes) <= max(_SMALL, pixels[0].numel() // 4):
        ready = [one.read(k) for k in range(len(one.sizes))]
        one = one._replace(read=ready.__getitem__)
    return Picture(one, shown(pixels).clone() if keep else None)
