"""Folders of maps as people have them: depths, turned pictures, links, names, what is said."""

import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from segkern.data import Folder, FolderConfig
from segkern.io.images import read_pixels, read_values
from support.pictures import SIZE, noise, write


def values(top=2):
    """A map with each label from 0 to `top`."""
    return (np.arange(40) % (top + 1)).astype(np.uint8) * np.ones((30, 1), np.uint8)


def grey_png(path, pixels, depth):
    """A grey PNG of 1, 2, 4 or 8 bits, which Pillow does not write."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    H, W = pixels.shape
    bits = np.unpackbits(pixels[..., None], axis=2)[..., 8 - depth :].reshape(H, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
    head = struct.pack(">IIBBBBB", W, H, depth, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.fixture
def root(tmp_path):
    """A folder of one picture with three classes."""
    write(tmp_path / "images/train/a.png", noise(0))
    write(tmp_path / "labels/train/a.png", values())
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    return tmp_path


def opened(root, **settings):
    return Folder(FolderConfig(root, **settings))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_values_of_few_bits_are_those_of_the_file(depth, root):
    labels = values(min(2**depth - 1, 2))
    grey_png(root / "labels/train/a.png", labels, depth)
    assert np.array_equal(opened(root)[0]["semantic"], labels)
    top = values(2**depth - 1) if depth < 8 else labels
    grey_png(root / "b.png", top, depth)
    assert np.array_equal(read_values(root / "b.png"), top)


def test_values_of_a_palette_are_its_places(root):
    picture = Image.fromarray(values(), "P")
    picture.putpalette([9, 8, 7, 200, 100, 0, 1, 2, 3])
    picture.save(root / "labels/train/a.png", bits=2)
    assert np.array_equal(opened(root)[0]["semantic"], values())


TURNS = {  # orientation, size of the file's pixels, size of the map, whether it is turned, said
    "map upright": (6, (40, 30), (30, 40), True, False),
    "map raw": (6, (30, 40), (30, 40), False, False),
    "upside down": (3, (30, 40), (30, 40), True, True),
}


@pytest.mark.parametrize("case", TURNS)
def test_turned_pictures(case, root, recwarn):
    orientation, raw, drawn, turned, said = TURNS[case]
    tags = Image.Exif()
    tags[274] = orientation
    Image.fromarray(noise(0, raw)).save(root / "images/train/a.png", exif=tags)
    data = opened(root)
    assert data[0]["image"].shape[:2] == data[0]["semantic"].shape == drawn
    assert np.array_equal(data[0]["image"], noise(0, raw)) != turned
    told = [str(w.message) for w in recwarn if "orientation" in str(w.message)]
    assert bool(told) == said
    assert all("a.png: its EXIF tag (orientation 3)" in text for text in told)
    data.check(progress=False)
    if raw == drawn:
        assert np.array_equal(opened(root, exif="raw")[0]["image"], noise(0, raw))


def test_linked_folders_are_followed_and_loops_are_not(root):
    for name, pixels in (("images", noise(1)), ("labels", values())):
        write(root / "there" / name / "b.png", pixels)
        (root / name / "train/more").symlink_to(root / "there" / name)
        (root / "there" / name / "loop").symlink_to(root / name / "train")
    assert [p.name for p, _ in opened(root).pairs] == ["a.png", "b.png"]


def test_hidden_files_are_none_of_it(root):
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (root / "images/train" / name).write_bytes(b"x")
        (root / "labels/train" / name).write_bytes(b"x")
    assert len(opened(root)) == 1


NAMES = {
    "suffix": ("a.png", "a.PNG"),
    "of a photo": ("a.JPG", "a.png"),
    "letters": ("für 猫.png", "für 猫.png"),
    "accents": (
        unicodedata.normalize("NFC", "für.png"),
        unicodedata.normalize("NFD", "für.png"),
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_names(case, root):
    of_image, of_map = NAMES[case]
    for folder, name, pixels in (("images", of_image, noise(0)), ("labels", of_map, values())):
        (root / folder / "train/a.png").unlink()
        write(root / folder / "train" / name, pixels)
    assert np.array_equal(opened(root)[0]["semantic"], values())


@pytest.mark.parametrize("text", ["\ufeffa\nb\nc\n", "a\r\nb\r\nc\r\n", "a\nb\nc"])
def test_names_of_classes(text, root):
    (root / "classes.txt").write_bytes(text.encode())
    assert opened(root).classes == ["a", "b", "c"]


# values of the map, what is said of them before training
SAID = {
    "0 and 255": (values(1) * 255, ["b", "c"]),
    "1 to K - 1": (values(1) + 1, ["a"]),
}


@pytest.mark.parametrize("case", SAID)
def test_classes_that_never_occur_are_named(case, root):
    pixels, absent = SAID[case]
    write(root / "labels/train/a.png", pixels)
    assert opened(root).check(progress=False) == absent


def test_labels_from_1_to_K(root):
    write(root / "labels/train/a.png", values() + 1)
    with pytest.raises(ValueError, match=r"a.png: values .* got 3: labels count from 0"):
        opened(root).check(progress=False)


FILES = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:500]), "not a readable image"),
    "empty": (lambda p: p.write_bytes(b""), "not an image that PIL can read"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("which", ["images", "labels"])
def test_a_file_that_cannot_be_read_does_not_stop_a_run(which, case, root):
    write(root / "images/train/b.png", noise(1))
    write(root / "labels/train/b.png", values())
    spoil, message = FILES[case]
    if which == "labels" and case == "truncated":
        write(root / "labels/train/a.png", noise(0)[..., 0])
    spoil(root / which / "train/a.png")
    data = opened(root)
    with pytest.warns(UserWarning, match=f"{which}/train/a.png: {message}"):
        assert data[0]["path"].endswith("b.png")
    (root / which / "train/b.png").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="the next picture stands for it"),
        pytest.raises(ValueError, match="no picture is left that can be read"),
    ):
        data[0]


def test_a_huge_picture_is_read_where_it_is_allowed(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with (
        pytest.warns(UserWarning, match="raise max_pixels"),
        pytest.raises(ValueError, match="too large"),
    ):
        opened(root)[0]
    data = opened(root, max_pixels=1200)
    assert data[0]["semantic"].shape == SIZE
    data.check(progress=False)


# brightest pixel of 16 bits, white that it is taken for
DEEP = {"8 bits": (200, 255), "10 bits": (1000, 1023), "12 bits": (4000, 4095)}


@pytest.mark.parametrize("case", DEEP)
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_deep_pictures_that_use_few_bits(case, suffix, tmp_path):
    top, white = DEEP[case]
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.array([[0, top // 2, top]], np.uint16)).save(path)
    with pytest.warns(UserWarning, match=rf"a.{suffix}: .* white is taken as {white}"):
        found = read_pixels(path, str(path))
    assert found[0, :, 0].tolist() == [0, *(round(x / white * 255) for x in (top // 2, top))]


@pytest.mark.parametrize(
    ("value", "stated", "white"),
    [(500, 4095, 4095), (4200, 16383, 16383), (1000, 255, 1000)],
    ids=["dark", "brighter than 12 bits", "less than there is"],
)
def test_white_that_a_tiff_states(value, stated, white, tmp_path, recwarn):
    Image.fromarray(np.array([[0, value]], np.uint16)).save(
        tmp_path / "a.tiff", tiffinfo={281: stated}
    )
    assert read_pixels(tmp_path / "a.tiff")[0, 1, 0] == round(value / white * 255)
    assert not recwarn


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (np.int16, -1, r"values must be 0 to .*got -1|-1"),
        (np.float32, 0.5, "a map must hold integers"),
    ],
    ids=["below zero", "a fraction"],
)
def test_values_that_stand_for_no_class(where, value, message, root):
    (root / "labels/train/a.png").unlink()
    labels = np.zeros(SIZE, np.int32 if where is np.int16 else where)
    labels[0, 0] = value
    Image.fromarray(labels).save(root / "labels/train/a.tif")
    with (
        pytest.warns(UserWarning, match=message),
        pytest.raises(ValueError, match="no picture is left"),
    ):
        opened(root)[0]


def test_pages_that_are_not_read_are_told(root):
    pages = [Image.fromarray(noise(i)) for i in range(3)]
    (root / "images/train/a.png").unlink()
    pages[0].save(root / "images/train/a.tiff", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match=r"a.tiff: the first page alone is read; left out: 2"):
        assert np.array_equal(opened(root)[0]["image"], noise(0))
