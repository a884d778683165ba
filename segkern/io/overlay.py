"""Segments drawn over a picture, and label maps as PNG.

Letters: H W picture size.

A label has one hue wherever it is drawn, so truth and prediction can be compared by colour;
further instances of it differ in lightness. A result is anything with `segmentation`, `segments`
and `name(label)` like `structures.Segmentation`.
"""

import colorsys
import importlib.util
from pathlib import Path

import numpy as np
import scipy
from PIL import Image, ImageDraw, ImageFont

from .atomic_files import atomic

# far apart for the first labels; later ones turn these hues by the golden ratio
_BASE = (
    (31, 136, 229),
    (255, 143, 0),
    (67, 190, 80),
    (229, 40, 55),
    (150, 85, 220),
    (0, 190, 190),
    (240, 98, 180),
    (250, 215, 40),
    (150, 100, 60),
    (170, 230, 50),
    (110, 125, 145),
    (60, 80, 190),
)
_THING, _STUFF = 0.55, 0.25  # opacity


def colour(label: int, nth: int = 0) -> tuple[int, int, int]:
    """Colour of the nth instance of a label: red, green, blue in [0, 255]."""
    turn, place = divmod(label, len(_BASE))
    hue, saturation, value = colorsys.rgb_to_hsv(*(x / 255 for x in _BASE[place]))
    shade = colorsys.hsv_to_rgb((hue + turn * 0.618034) % 1.0, saturation, value)
    goal, share = ((0.0, 0.0), (1.0, 0.4), (0.0, 0.35))[nth % 3]  # as it is, lighter, darker
    return tuple(round(255 * (x + share * (goal - x))) for x in shade)


def colours(segments) -> list[tuple[int, int, int]]:
    """A colour for each segment."""
    count: dict[int, int] = {}
    out = []
    for s in segments:
        out.append(colour(s.label_id, count.get(s.label_id, 0)))
        count[s.label_id] = count.get(s.label_id, 0) + 1
    return out


def overlay(
    image: np.ndarray,  # [H, W, 3]
    result,
    least_side: int = 384,
    label_stuff: bool = True,
) -> Image.Image:
    """The picture with its segments in colour over grey, contours, names and scores.

    Args:
        image: [H, W, 3] uint8.
        result: a `Segmentation` of the same size.
        least_side: a picture with a shorter side is enlarged by a whole number, so that names can
            be read; larger ones keep their resolution.
        label_stuff: write the names of stuff, too.

    Returns:
        an RGB image of a multiple of [H, W].

    Raises:
        ValueError: the sizes differ.
    """
    ids = result.segmentation.cpu().numpy()
    if image.shape != (*ids.shape, 3):
        raise ValueError(
            f"overlay: image must be [{ids.shape[0]}, {ids.shape[1]}, 3] as its result, "
            f"got {list(image.shape)}"
        )
    times = max(1, -(-least_side // min(ids.shape)))
    if times > 1:
        image = np.asarray(
            Image.fromarray(image).resize((ids.shape[1] * times, ids.shape[0] * times), 0)
        )
        ids = ids.repeat(times, 0).repeat(times, 1)
    line = max(2, round(min(ids.shape) / 500))
    shades = colours(result.segments)
    top = max([0, *(s.id for s in result.segments), int(ids.max())]) + 1
    table = np.zeros((top, 4), np.float32)  # of an id: colour and opacity
    for s, shade in zip(result.segments, shades):
        table[s.id] = (*shade, _THING if s.isthing else _STUFF)
    table[:, :3] *= table[:, 3:]
    out = np.empty_like(image)
    edges = _edges(ids, line)
    for rows in np.array_split(np.arange(len(ids)), -(-ids.size // 2**20)):
        tint = table[ids[rows]]
        # colours mean labels: under a segment only the picture's brightness stays
        grey = image[rows] @ np.array((0.299, 0.587, 0.114), np.float32)
        base = np.where(tint[..., 3:] > 0, grey[..., None], image[rows])
        mixed = base * (1 - tint[..., 3:]) + tint[..., :3]
        strong = tint[..., :3] / np.maximum(tint[..., 3:], 1e-6)
        edge = (edges[rows] & (tint[..., 3] == np.float32(_THING)))[..., None]
        out[rows] = np.where(edge, 0.9 * strong + 25, mixed).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(out)
    _write_names(picture, result, shades, ids, label_stuff)
    return picture


def save_label_map(path: str | Path, result) -> None:
    """Writes what `label_map` draws as PNG.

    Raises:
        ValueError: an id above 65535.
    """
    picture = label_map(result)
    with atomic(path) as temporary:
        picture.save(temporary, "PNG")


def label_map(result) -> Image.Image:
    """The label map as a picture: the pixel values are the ids.

    With ids up to 255 it is a palette picture in the colours of `overlay` (id 0 black unless a
    segment has it), else 16 bits of grey.

    Raises:
        ValueError: an id above 65535.
    """
    ids = result.segmentation.cpu().numpy()
    if ids.max(initial=0) > 65535:
        raise ValueError(f"label_map: ids must fit 16 bits, got {ids.max()}")
    if ids.max(initial=0) > 255:
        return Image.fromarray(ids.astype(np.uint16))
    picture = Image.fromarray(ids.astype(np.uint8))
    palette = np.zeros((256, 3), np.uint8)
    for s, shade in zip(result.segments, colours(result.segments)):
        if s.id < 256:
            palette[s.id] = shade
    picture.putpalette(palette.tobytes())
    return picture


def drawable_suffix(suffix: str) -> bool:
    """Whether PIL writes pictures to files with this suffix, such as ".png"."""
    return Image.registered_extensions().get(suffix.lower()) in Image.SAVE


def save_picture(path: str | Path, picture: Image.Image) -> None:
    """Writes a picture in the format of the path's suffix, whole or not at all."""
    with atomic(path) as temporary:
        picture.save(temporary)


def _edges(ids: np.ndarray, line: int) -> np.ndarray:
    """[H, W] bool: pixels that have another id within `line` pixels beside or above them."""
    out = np.zeros(ids.shape, bool)
    for d in range(1, line + 1):
        across, down = ids[:, d:] != ids[:, :-d], ids[d:] != ids[:-d]
        out[:, d:] |= across
        out[:, :-d] |= across
        out[d:] |= down
        out[:-d] |= down
    return out


def _write_names(picture: Image.Image, result, shades, ids: np.ndarray, label_stuff: bool) -> None:
    draw = ImageDraw.Draw(picture)
    height, width = ids.shape
    names = "".join(result.name(s.label_id) for s in result.segments)
    font = _font(max(11, round(min(height, width) / 26)), names)
    taken: list[tuple[float, float, float, float]] = []
    order = sorted(range(len(result.segments)), key=lambda i: -result.segments[i].area)
    boxes = scipy.ndimage.find_objects(ids + 1)  # of id 0, 1, ...; it takes 0 for nothing
    for i in order:
        s = result.segments[i]
        box = boxes[s.id] if s.id < len(boxes) else None  # None: hidden under other instances
        if box is None or not (s.isthing or label_stuff):
            continue
        ys, xs = np.nonzero(ids[box] == s.id)
        ys, xs = ys + box[0].start, xs + box[1].start
        text = result.name(s.label_id) + ("" if s.score is None else f" {s.score:.2f}")
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        w, h = right - left + 8, bottom - top + 6
        (y0, y1), (x0, x1) = ((side.start, side.stop) for side in box)
        middle = ys[len(ys) // 2], xs[len(xs) // 2]
        beside = [(x0, y0 - h), (x0, y1), (x1 - w, y0 - h), (x1 - w, y1), (x1, y0), (x0 - w, y0)]
        inside = [(middle[1] - w / 2, middle[0] - h / 2), (x0, y0)]
        scattered = len(ys) < 0.15 * (y1 - y0) * (x1 - x0)
        large = s.area > 0.04 * ids.size or scattered or not s.isthing
        places = [
            (min(max(0, x), max(0, width - w)), min(max(0, y), max(0, height - h)))
            for x, y in (inside + beside if large else beside + inside)
        ]
        x, y = min(places, key=lambda p: _overlap((*p, p[0] + w, p[1] + h), taken))
        taken.append((x, y, x + w, y + h))
        draw.rounded_rectangle(taken[-1], radius=3, fill=shades[i])
        light = np.dot(shades[i], (0.299, 0.587, 0.114)) > 140
        draw.text((x + 4 - left, y + 3 - top), text, fill="black" if light else "white", font=font)


def _font(size: int, text: str):
    """Pillow's own, or where letters beyond ASCII come and matplotlib is there, that of it."""
    found = None if text.isascii() else importlib.util.find_spec("matplotlib")
    if found is None:
        return ImageFont.load_default(size)
    path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, size) if path.is_file() else ImageFont.load_default(size)


def _overlap(box, taken) -> float:
    """Area of `box` (x0, y0, x1, y1) that other boxes cover."""
    return sum(
        max(0, min(box[2], t[2]) - max(box[0], t[0]))
        * max(0, min(box[3], t[3]) - max(box[1], t[1]))
        for t in taken
    )
