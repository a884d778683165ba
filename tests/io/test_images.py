"""Pictures in files as other programs write them: bands, pages, turns, palettes, sizes."""

import os
import struct
import warnings
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from segkern.inference.predict_files import pictures
from segkern.inference.segment import segment
from segkern.io.images import open_image, picture_suffixes, read_image, read_pixels
from support.models import Squares, half_bright


def tiff(path, *pages):
    """Writes a TIFF by its rules: of each page pixels [H, W, bands], and further tags."""
    data = b"II*\0" + struct.pack("<I", 0)
    link = 4
    for pixels, more in pages:
        h, w, bands = pixels.shape
        place, raw = len(data), pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
        bits = 8 * pixels.dtype.itemsize
        tags = {256: [w], 257: [h], 258: bands * [bits], 259: [1], 262: [2 if bands > 2 else 1]}
        tags |= {273: [place], 277: [bands], 278: [h], 279: [pixels.nbytes], 284: [1]} | more
        data += raw
        entries = b""
        for tag, values in sorted(tags.items()):
            packed = struct.pack(f"<{len(values)}{'I' if len(values) == 1 else 'H'}", *values)
            kind = 4 if len(values) == 1 else 3  # LONG, SHORT
            if len(packed) > 4:
                packed, data = struct.pack("<I", len(data)), data + packed
            entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
        data = data[:link] + struct.pack("<I", len(data)) + data[link + 4 :]
        data += struct.pack("<H", len(tags)) + entries
        link = len(data)
        data += struct.pack("<I", 0)
    path.write_bytes(data)
    return path


def bands(*values, dtype=np.uint8):
    return np.broadcast_to(np.array(values, dtype), (6, 5, len(values))).copy()


FOUR = {  # bands, ExtraSamples, and the colour that shows
    "none said": (bands(200, 100, 0, 51), {}, [200, 100, 0]),
    "unspecified": (bands(200, 100, 0, 51), {338: [0]}, [200, 100, 0]),
    "alpha": (bands(200, 100, 0, 51), {338: [2]}, [244, 224, 204]),
    "alpha, multiplied in": (bands(40, 20, 0, 51), {338: [1]}, [244, 224, 204]),
    "16 bits, none said": (bands(51400, 25700, 0, 13107, dtype=np.uint16), {}, [200, 100, 0]),
    "grey and one band": (bands(90, 51), {338: [0]}, [90, 90, 90]),
    "grey and alpha": (bands(90, 51), {338: [2]}, [222, 222, 222]),
}


@pytest.mark.parametrize("case", FOUR)
def test_a_further_band_of_a_tiff_is_alpha_only_where_it_says_so(case, tmp_path):
    pixels, extra, want = FOUR[case]
    path = tiff(tmp_path / "a.tiff", (pixels, extra))
    for image in (path, Image.open(path)):
        found = read_pixels(image)
        assert found.shape == (6, 5, 3)
        assert np.abs(found.astype(int) - want).max() <= 1


def colours(n):
    return [Image.new("RGB", (6, 4), (40 * i + 5, 10, 10)) for i in range(n)]


def saved(path, **options):
    first, *rest = colours(3)
    first.save(path, save_all=True, append_images=rest, **options)
    return path


PAGES = {
    "tiff": (lambda p: saved(p / "a.tiff"), 2),
    "gif": (lambda p: saved(p / "a.gif"), 2),
    "webp": (lambda p: saved(p / "a.webp", lossless=True), 2),
    "png": (lambda p: saved(p / "a.png"), 2),
    "phone's photo": (lambda p: saved(p / "a.jpg", format="MPO"), 0),
    "one page": (lambda p: tiff(p / "a.tiff", (bands(5, 10, 10), {})), 0),
    "smaller copy and mask": (
        lambda p: tiff(
            p / "a.tiff",
            (bands(5, 10, 10), {}),
            (bands(90, 0, 0)[:3], {254: [1]}),
            (bands(1), {254: [4]}),
            (bands(0, 0, 90), {254: [2]}),
        ),
        1,
    ),
}


@pytest.mark.parametrize("case", PAGES)
def test_of_several_pages_the_first_is_read_and_the_others_told(case, tmp_path):
    make, others = PAGES[case]
    path = make(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pixels = read_pixels(path)
    assert np.abs(pixels[0, 0].astype(int) - (5, 10, 10)).max() <= 8
    want = [f"{path}: the first page alone is read; left out: {others}"] if others else []
    assert [str(w.message) for w in told] == want


def test_pages_cut_off_do_not_keep_the_first_from_being_read(tmp_path):
    path = saved(tmp_path / "a.tiff")
    whole = path.read_bytes()
    first = int.from_bytes(whole[4:8], "little")
    count = int.from_bytes(whole[first : first + 2], "little")
    link = first + 2 + 12 * count
    path.write_bytes(whole[:link] + struct.pack("<I", len(whole) - 3) + whole[link + 4 :])
    assert read_pixels(path).shape == (4, 6, 3)


# of a picture with one bright corner, upper left: where it is once it is turned upright
CORNERS = [(0, 0), (0, -1), (-1, -1), (-1, 0), (0, 0), (0, -1), (-1, -1), (-1, 0)]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_photos_are_turned_upright(turn, suffix, tmp_path):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :16] = 250
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif)
    found = read_pixels(tmp_path / f"a.{suffix}").astype(int)
    assert found.shape == ((32, 64, 3) if turn < 5 else (64, 32, 3))
    assert found[CORNERS[turn - 1]].min() > 200
    others = {(0, 0), (0, -1), (-1, -1), (-1, 0)} - {CORNERS[turn - 1]}
    assert max(found[corner].max() for corner in others) < 50


def palette():
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 0])
    image.putpixel((0, 0), 0)
    return image


KINDS = {  # suffix, picture, options of its writer, colour of the last pixel
    "palette": ("png", palette(), {}, [200, 100, 0]),
    "palette, a colour clear": ("png", palette(), {"transparency": 1}, [255, 255, 255]),
    "palette, half clear": (
        "png",
        palette(),
        {"transparency": bytes([255, 128])},
        [227, 177, 127],
    ),
    "palette, gif": ("gif", palette(), {"transparency": 1}, [255, 255, 255]),
    "rgb, a colour clear": (
        "png",
        Image.new("RGB", (4, 2), (9, 8, 7)),
        {"transparency": (9, 8, 7)},
        [255, 255, 255],
    ),
    "CMYK": ("tiff", Image.new("CMYK", (4, 2), (0, 255, 255, 0)), {}, [255, 0, 0]),
    "CMYK, jpeg": ("jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, [254, 0, 0]),
    "16 bits": ("png", Image.fromarray(np.full((2, 4), 25700, np.uint16)), {}, [100, 100, 100]),
    "16 bits, tiff": (
        "tiff",
        Image.fromarray(np.full((2, 4), 25700, np.uint16)),
        {},
        [100, 100, 100],
    ),
    "one bit": ("png", Image.new("1", (4, 2), 1), {}, [255, 255, 255]),
    "grey, alpha": ("png", Image.new("LA", (4, 2), (0, 51)), {}, [204, 204, 204]),
    "one pixel": ("png", Image.new("RGB", (1, 1), (1, 2, 3)), {}, [1, 2, 3]),
    "a line": ("png", Image.new("RGB", (3000, 2), (1, 2, 3)), {}, [1, 2, 3]),
    "upright line": ("bmp", Image.new("RGB", (2, 3000), (1, 2, 3)), {}, [1, 2, 3]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind_show_their_colour(kind, tmp_path):
    suffix, image, options, want = KINDS[kind]
    path = tmp_path / f"a.{suffix}"
    image.save(path, **options)
    found = read_pixels(path)
    assert found.shape == (*reversed(image.size), 3)
    assert np.abs(found[-1, -1].astype(int) - want).max() <= 2
    result = segment(Squares(longest_edge=64), path)
    assert result.segmentation.shape == found.shape[:2]
    assert sum(s.area for s in result.segments) <= result.segmentation.numel()


def test_hidden_files_of_a_folder_are_passed_over(tmp_path):
    for name in ("b.png", "A.JPG"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    for name in ("._b.png", ".DS_Store", "Thumbs.db", ".hidden.jpg", "scan.h5", "film.mpg", "x"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2")
    assert [os.path.basename(p.path) for p in pictures([tmp_path])] == ["A.JPG", "b.png"]
    assert pictures([tmp_path / ".hidden.jpg"])  # who names it gets it
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/.a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no image"):
        pictures([tmp_path / "bare"])
    assert picture_suffixes() >= {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp"}


@pytest.fixture
def low_limit(monkeypatch):
    """Pillow's limit for a quick test: an error above 2 x 5,000 pixels, a warning above 5,000."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)


def test_large_pictures_are_read_where_max_pixels_says_so(tmp_path, low_limit):
    path = tmp_path / "a.png"
    Image.fromarray(half_bright(100, 150)).save(path)
    for read in (open_image, read_image, lambda x: segment(Squares(), x)):
        with pytest.raises(ValueError, match=r"a\.png: too large .* max_pixels \(--max-pixels"):
            read(path)
    assert open_image(path, 15_000).size == (150, 100)
    assert read_image(path, max_pixels=10**9).shape == (3, 100, 150)
    assert segment(Squares(), [path], max_pixels=15_000)[0].segmentation.shape == (100, 150)
    assert Image.MAX_IMAGE_PIXELS == 5000
    with pytest.raises(ValueError, match=r"150 x 100 pixels, more than max_pixels = 14999"):
        open_image(path, 14_999)
    for bad in (0, -1, 2.5, "9", True):
        with pytest.raises((TypeError, ValueError), match="max_pixels must be"):
            open_image(path, bad)


def test_other_pages_are_not_looked_for_where_they_do_not_matter(tmp_path, recwarn):
    first, second = (Image.new("L", (7, 5), grey) for grey in (0, 255))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert open_image(tmp_path / "a.gif", count_pages=False).size == (7, 5)
    assert not recwarn
    with pytest.warns(UserWarning, match="left out: 1"):
        open_image(tmp_path / "a.gif")


def test_open_files_of_known_formats_are_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    for opened in (path.open("rb"), BytesIO(path.read_bytes())):
        with opened:
            assert np.array_equal(read_image(opened).movedim(0, 2), pixels)
    assert open_image(path, formats=("PNG", "JPEG")).size == (7, 5)
    with pytest.raises(ValueError, match="not an image that PIL can read"):
        open_image(path, formats=("JPEG",))
