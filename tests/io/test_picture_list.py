"""Where the pictures of a job are: folders, lists, tar archives as WebDataset has them."""

import io
import os
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from segkern.io import picture_list
from segkern.io.ahead import ahead
from segkern.io.picture_list import Place, listed, parsed, read_list, read_place, write_list


def picture(value, format="PNG"):
    data = io.BytesIO()
    Image.fromarray(np.full((5, 7, 3), value, np.uint8)).save(data, format)
    return data.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A shard that WebDataset itself wrote: pictures, annotations, maps of segments."""
    path = tmp_path_factory.mktemp("tar") / "000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(3):
            parts = {"jpg": picture(50 * i, "JPEG"), "json": {"n": i}, "seg.png": picture(255)}
            writer.write({"__key__": f"some/deep/{i:04d}", **parts})
        writer.write({"__key__": "last", "webp": picture(7, "WEBP"), "cls": 3})
    return path


def test_pictures_of_an_archive_are_read_where_they_lie(archive):
    places = list(listed([archive]))
    names = [f"some/deep/{i:04d}.jpg" for i in range(3)]
    assert [place.member for place in places] == [*names, "last.webp"]
    assert [place.archive for place in places] == [str(archive)] * 4
    values = [read_place(place).float().mean().item() for place in places]
    assert values == pytest.approx([0, 50, 100, 7], abs=2)
    theirs = webdataset.WebDataset(str(archive), shardshuffle=False)
    assert [place.member.partition(".")[0] for place in places] == [
        sample["__key__"] for sample in theirs
    ]


def test_an_archive_that_is_cut_gives_what_is_whole(archive, tmp_path):
    data = archive.read_bytes()
    _, second, *_ = listed([archive])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(data[: second.offset + 100])
    one, two, end = listed([cut])
    assert read_place(one).shape == (3, 5, 7)
    with pytest.raises(ValueError, match=r"cut.tar: .*0001.jpg: cut off after 100 of \d+ bytes"):
        read_place(two)
    with pytest.raises(ValueError, match=r"cut.tar: not a whole tar archive after 2 pictures"):
        read_place(end)


WRONG = {
    "none.tar": (None, "no such file"),
    "text.tar": (b"text" * 500, "not a whole tar archive"),
    "a.tar.gz": (b"", "a tar archive must be uncompressed"),
    "bare.tar": ({"a.txt": b"note"}, "holds no picture KEY.jpg"),
    "maps.tar": ({"a.seg.png": picture(1)}, "a.seg.png is an annotation beside one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_archive_without_pictures_is_an_error_of_its_own(name, tmp_path):
    content, message = WRONG[name]
    path = tmp_path / name
    if isinstance(content, dict):
        with tarfile.open(path, "w") as archive:
            for member, data in content.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    elif content is not None:
        path.write_bytes(content)
    (place,) = listed([path])
    with pytest.raises(ValueError, match=rf"{name}: .*{message}|{name}: {message}"):
        read_place(place)


@pytest.fixture
def tree(tmp_path):
    for name in ("b.png", "a.JPG", "sub/c.png", "sub/deep/d.png", "sub/.e.png", ".f/g.png"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(3, "JPEG" if name.endswith("JPG") else "PNG"))
    (tmp_path / "tree/sub/round").symlink_to(tmp_path / "tree")
    (tmp_path / "tree/note.txt").write_text("no picture")
    return tmp_path / "tree"


def test_folders_in_folders_are_read_where_asked_for(tree):
    def names(recursive):
        return [os.path.relpath(p.path, tree) for p in listed([tree], recursive=recursive)]

    assert names(False) == ["a.JPG", "b.png"]
    assert names(True) == ["a.JPG", "b.png", "sub/c.png", "sub/deep/d.png"]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 8, 20])
def test_any_number_of_names_is_sorted_on_disk(count, monkeypatch):
    monkeypatch.setattr(picture_list, "_AT_ONCE", 4)
    names = [f"{i * 7 % 23}\n\udcff" for i in range(count)]  # any bytes may be in a name
    assert list(picture_list._sorted(iter(names))) == sorted(names)


CAFE = "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png"


def test_a_list_is_read_a_line_at_a_time(tmp_path, archive):
    path = tmp_path / "list.txt"
    text = f"a.png\n\nhttp://host/b%20c.png?d=e.f\r\n{archive}\n{CAFE}"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\nx\xff.png\n")
    found = listed([], [path])
    assert next(found) == Place("a.png")
    url = next(found)
    assert (url.image, url.name, url.archive) == ("http://host/b%20c.png?d=e.f", "b c.png", None)
    rest = list(found)
    assert [place.path for place in rest[:4]] == [str(archive)] * 4
    assert os.fsencode(rest[-1].path) == b"x\xff.png"
    assert rest[-2].name == CAFE
    places = [url, *rest]
    write_list(tmp_path / "written", places)
    blocks = list(read_list(tmp_path / "written", 4))
    assert [number for number, _ in blocks] == [0, 1]
    assert [parsed(line) for _, lines in blocks for line in lines] == places


def test_work_is_done_ahead_in_order_and_no_further():
    begun = []

    def work(x):
        begun.append(x)
        if x == 2:
            raise ValueError("two")
        return 10 * x

    results = ahead(work, iter(range(100)), 3, 5)
    assert not begun
    assert next(results) == (0, 0)
    assert next(results) == (1, 10)
    item, error = next(results)
    assert (item, str(error)) == (2, "two")
    results.close()
    assert max(begun) < 3 + 5
    assert [y for _, y in ahead(work, range(3, 50), 3, 5)] == [10 * x for x in range(3, 50)]
