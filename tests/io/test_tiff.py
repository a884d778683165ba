"""TIFFs of many bands, written byte by byte and by Pillow: each layout, and damaged files."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from segkern.io.images import read_head, read_image
from segkern.io.tiff import read_bands, read_size
from support.tiffs import tiff

H, W, C = 5, 7, 6


def values(dtype=np.uint8, shape=(H, W, C)):
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    return (np.random.default_rng(0).random(shape) * top).astype(dtype)


LAYOUTS = {
    "by pixel": {},
    "by plane": {"planar": True},
    "big endian": {"order": ">"},
    "deflated": {"deflate": True},
    "differences": {"deflate": True, "predictor": 2},
    "strips": {"rows": 2},
    "tiles": {"tile": 4},
    "tiles by plane": {"tile": 4, "planar": True, "deflate": True, "predictor": 2},
}


CASES = [(dtype, layout) for dtype in (np.uint8, np.uint16) for layout in LAYOUTS]
CASES += [(np.float32, name) for name, how in LAYOUTS.items() if "predictor" not in how]


@pytest.mark.parametrize(("dtype", "layout"), CASES)
def test_layouts(dtype, layout, tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(values(dtype), **LAYOUTS[layout]))
    found, white = read_bands(tmp_path / "a.tif")
    assert found.dtype == dtype
    assert np.array_equal(found, values(dtype))
    assert white is None
    assert read_head(tmp_path / "a.tif") == ((H, W), (H, W), 1)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pages_follow_each_other(dtype, compression, tmp_path):
    pages = [Image.fromarray(values(dtype)[..., c]) for c in range(C)]
    pages[0].save(
        tmp_path / "a.tif", save_all=True, append_images=pages[1:], compression=compression
    )
    assert np.array_equal(read_bands(tmp_path / "a.tif")[0], values(dtype))


def test_smaller_copies_are_no_bands(tmp_path):
    pages = [Image.fromarray(values()[..., c]) for c in range(2)]
    pages.append(Image.fromarray(values()[::2, ::2, 0]))
    for page in pages[2:]:
        page.encoderinfo = {"tiffinfo": {254: 1}}
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert np.array_equal(read_bands(tmp_path / "a.tif")[0], values()[..., :2])


def test_pixels_are_scaled_by_white(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(values(np.uint16)))
    found = read_image(path, channels=C).movedim(0, 2).numpy()
    assert np.allclose(found, values(np.uint16) / 65535, atol=1e-6)
    path.write_bytes(tiff(values(np.uint16) // 16))
    with pytest.warns(UserWarning, match="brightest of its 16-bit pixels is .* taken as 4095"):
        found = read_image(path, channels=C).movedim(0, 2).numpy()
    assert np.allclose(found, (values(np.uint16) // 16) / 4095, atol=1e-6)
    path.write_bytes(tiff(values(np.uint16) // 16, more={281: [10_000]}.items()))
    found = read_image(path, channels=C).movedim(0, 2).numpy()
    assert np.allclose(found, (values(np.uint16) // 16) / 10_000, atol=1e-6)
    path.write_bytes(tiff(values(np.float32)))
    assert np.allclose(read_image(path, channels=C).movedim(0, 2), values(np.float32))
    path.write_bytes(tiff(values()))
    assert np.array_equal(read_image(path, channels=C).movedim(0, 2), values())


BAD = {
    "not there": (None, "no such file"),
    "no TIFF": (b"\x89PNG....", "not a TIFF whose bands can be read"),
    "empty": (b"", "not a TIFF whose bands can be read"),
    "cut off": (tiff(values())[:100], "not a TIFF whose bands can be read"),
    "deflated badly": (tiff(values(), deflate=True).replace(b"x\x9c", b"xx"), "not a TIFF"),
    "64 bits": (tiff(values(np.float32), more={258: [64] * C}.items()), "bits 64, format 3"),
    "fax": (tiff(values(), more={259: [4]}.items()), "not a TIFF whose bands can be read"),
    "no width": (tiff(values(), more={256: [0]}.items()), "must be at least 1, got"),
    "too large": (tiff(values(), more={256: [10**6], 257: [10**6]}.items()), "raise max_pixels"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_bad_files(case, tmp_path):
    data, message = BAD[case]
    if data is not None:
        (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(ValueError, match=f"a.tif: .*{message}|a.tif: {message}"):
        read_bands(tmp_path / "a.tif")


def test_other_numbers_of_channels_are_refused(tmp_path):
    for image, channels in ((values(), 5), (values()[..., 0], 2)):
        with pytest.raises(ValueError, match=f"with {channels} channels and not empty, got"):
            read_image(image, channels=channels)
    with pytest.raises(
        ValueError, match="must be a TIFF, array or tensor of 5 channels, got a PIL"
    ):
        read_image(Image.new("RGB", (4, 4)), channels=5)


@pytest.mark.parametrize(("channels", "got"), [(5, "6 or more"), (7, "6")])
def test_files_of_other_channels_are_not_decoded(channels, got, tmp_path):
    damaged = tiff(values(), deflate=True).replace(b"x\x9c", b"xx")
    (tmp_path / "a.tif").write_bytes(damaged)
    assert read_size(tmp_path / "a.tif") == (H, W, C)
    with pytest.raises(ValueError, match=f"a.tif: must have {channels} channels, got {got}$"):
        read_image(tmp_path / "a.tif", channels=channels)


def test_of_very_many_pages_none_are_read(tmp_path):
    """A directory that leads to the next, thousands of times, and no page of them a picture."""
    entry = struct.pack("<HHHII", 1, 254, 4, 1, 1)
    pages = [entry + struct.pack("<I", 8 + 18 * (i + 1)) for i in range(5000)]
    (tmp_path / "a.tif").write_bytes(b"II" + struct.pack("<HI", 42, 8) + b"".join(pages))
    with pytest.raises(ValueError, match="more than 4096 pages"):
        read_size(tmp_path / "a.tif")


def test_a_part_gives_no_more_than_what_belongs_there(tmp_path):
    pixels = values()
    parts = zlib.compress(pixels.tobytes() + bytes(50_000_000))
    (tmp_path / "a.tif").write_bytes(tiff(pixels, deflate=True, packed=parts))
    tracemalloc.start()
    found, _ = read_bands(tmp_path / "a.tif")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found, pixels)
    assert peak < 5_000_000
