"""Shards that are spoilt: what is named, what stands for it, and what is never read."""

import io
import json
import pickle
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segkern.cli import main
from segkern.data import Shards, build_dataset, collate, find_format
from segkern.data.views import InstanceViews, ViewConfig
from support.shards import members, rewrite, shards_of, write_numbered
from support.spoilt import spoil

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
N = 14


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbered")
    return Path(shards_of(write_numbered(root / "set", N), root / "shards").root)


@pytest.fixture
def root(written, tmp_path):
    """A copy to be spoilt."""
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def opened(root, views=None):
    return Shards(find_format(root)[0], "train", views)


def change_member(root, suffix, data, shard=1, sample=1):
    """Puts other bytes into a member of a sample; None removes it."""

    def change(held):
        found = [i for i, (name, _) in enumerate(held) if name.partition(".")[2] == suffix]
        mine = found[sample]
        held[mine] = held[mine][0], data
        return [row for row in held if row[1] is not None]

    rewrite(root / f"train-{shard:05}.tar", change)


def png(height, width, mode="RGB"):
    out = io.BytesIO()
    Image.new(mode, (width, height), 9 if mode == "L" else 0).save(out, "PNG")
    return out.getvalue()


PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
BAD = {  # member, what it holds then, what is said of it
    "no picture": ("png", None, "must have one picture, got members json, seg.png"),
    "a spoilt picture": ("png", PNG, "not an image that PIL can read"),
    "another picture": ("png", png(5, 5), r"height and width must be \[5, 5\], .* got \[24, 32\]"),
    "no annotations": ("json", None, "has no JSON of annotations"),
    "no JSON": ("json", b"{", "its JSON cannot be read"),
    "deep JSON": ("json", b"[" * 100_000, "its JSON cannot be read"),
    "other JSON": ("json", b"[1, 2]", "must have a list of annotations"),
    "no map": ("seg.png", None, "has no map of labels, seg.png"),
    "another map": ("seg.png", png(5, 5), r"seg.png must be \[24, 32\] integers"),
    "a huge map": ("seg.png", png(50, 50), "seg.png: too large"),
    "other labels": (
        "seg.png",
        png(24, 32, "L"),
        "must hold labels below 2 or 255, got 9",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_named_and_the_next_stands_for_it(case, root):
    suffix, data, message = BAD[case]
    change_member(root, suffix, data)
    shards = opened(root)
    bad = int(shards.first[1]) + 1
    with pytest.raises(ValueError, match=message) as raised:
        shards.examined(bad)
    key = f"{bad:09}"
    assert str(raised.value).startswith(f"{root}/train-00001.tar: sample {key}")
    with pytest.warns(UserWarning, match=message):
        sample = shards[bad]
    assert (sample["id"], sample["unread"]) == (bad + 1, str(raised.value))
    good = [i for i in range(N) if i != bad]
    assert [shards[i]["id"] for i in good] == good
    assert not any("unread" in shards[i] for i in good)


def test_annotations_with_anything_in_any_place(root):
    """Read as far as they are right, or refused by name."""
    path, rng, read = root / "train-00000.tar", random.Random(0), 0
    text = next(data for head, data in members(path) if head.name.endswith(".json"))
    for _ in range(60):
        content = json.loads(text)
        spoil(content, rng)
        change_member(root, "json", json.dumps(content).encode(), 0, 0)
        shards = opened(root)
        try:
            sample, _ = shards.examined(0)
            assert sample["image"].shape == (24, 32, 3)
            read += 1
        except ValueError as error:
            assert f"{path}: sample 000000000" in str(error)  # noqa: PT017
    assert 10 < read < 60


def test_a_shard_that_is_cut_short(root):
    path = root / "train-00001.tar"
    shards = opened(root)
    first, end = int(shards.first[1]), int(shards.first[2])
    starts = np.fromfile(path.with_suffix(".idx"), "<i8")
    path.write_bytes(path.read_bytes()[: starts[2] + 700])  # in the middle of the third sample
    for find_places in (False, True):
        if find_places:
            path.with_suffix(".idx").unlink()
        with pytest.warns(UserWarning, match=f"{path}: must have 20480 bytes"):
            shards = opened(root)
        assert len(shards.faults) == 1
        assert [shards[i]["id"] for i in (first, first + 1)] == [first, first + 1]
        for i in range(first + 2, end):
            with pytest.raises(ValueError, match=rf"{path}: sample {i - first} .*cut short"):
                shards.examined(i)
            assert shards[i]["id"] == end + (i - first) % (N - end)  # of the next shard


def test_a_shard_that_is_missing(root):
    (root / "train-00001.tar").unlink()
    with pytest.warns(UserWarning, match="no such file: 5 samples are lost"):
        shards = opened(root)
    first, end = int(shards.first[1]), int(shards.first[2])
    lost = range(end - first)
    assert [shards[first + k]["id"] for k in lost] == [end + k % (N - end) for k in lost]


def test_the_only_shard_is_cut_short(root):
    """Samples before the cut stand for those after it."""
    index = root / "index.json"
    content = json.loads(index.read_text())
    del content["splits"]["train"][1:]
    index.write_text(json.dumps(content))
    path = root / "train-00000.tar"
    starts = np.fromfile(path.with_suffix(".idx"), "<i8")
    path.write_bytes(path.read_bytes()[: starts[3]])
    shards = opened(root)
    assert [shards[i]["id"] for i in range(len(shards))] == [0, 1, 2, 1, 2]


def test_views_that_this_version_does_not_know(root):
    index = root / "index.json"
    content = json.loads(index.read_text())
    content["views"]["turned"] = 0.5
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"index.json: views are not as they must be: .*turned"):
        find_format(root)


@pytest.mark.slow
def test_check_lists_every_fault(root, tmp_path, capsys):
    change_member(root, "png", PNG, 0, 1)
    change_member(root, "json", b"{", 1, 1)
    lost = opened(root).shards[2].samples
    (root / "train-00002.tar").unlink()
    assert main(["data", "check", str(root), "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "train-00000.tar: sample 000000001: not an image" in printed
    assert "train-00001.tar: sample 000000006: its JSON cannot be read" in printed
    assert f"{root}/train-00002.tar: no such file" in printed
    assert f"{N - 2 - lost} of {N} pictures can be read" in printed
    report = json.loads((tmp_path / "report/report.json").read_text())["splits"]["train"]
    assert (report["pictures"], report["readable"]) == (N, N - 2 - lost)
    assert report["findings_in_all"] == 1 + lost + 2


def test_more_than_half_missing_is_an_error(root):
    for k in (0, 1):
        (root / f"train-{k:05}.tar").unlink()
    with pytest.raises(ValueError, match=r"2 of 3 shards are missing or cut short, .*50% of 14"):
        opened(root)


def test_nothing_left_ends_the_search(root, monkeypatch):
    shards = opened(root)
    for path in root.glob("train*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match="nor can the 99 that were tried after it"):
        _ = shards[3]


def test_a_batch_says_what_it_lacks(root):
    change_member(root, "png", PNG, 0, 1)
    shards = opened(root, InstanceViews(ViewConfig((32, 32)), (0.5,) * 3, (0.5,) * 3))
    batch = collate(shards.__getitems__([(0, 0), (1, 0), (1, 1)]), 2)
    assert len(batch.unread) == 2
    assert "train-00000.tar: sample 000000001: not an image" in batch.unread[0]


class Harmful:
    """Says that it was unpickled."""

    def __reduce__(self):
        return Harmful.found, ()

    @staticmethod
    def found():
        raise AssertionError("a member was unpickled")


def test_nothing_is_unpickled_and_no_name_is_a_path(written, tmp_path, monkeypatch):
    """Members of other kinds do not matter; names that lead elsewhere do nothing."""
    root, work = tmp_path / "a/shards", tmp_path / "a/work"
    shutil.copytree(written, root)
    work.mkdir()
    monkeypatch.chdir(work)
    held = pickle.dumps(Harmful())

    def change(rows):
        out = []
        for name, data in rows:
            out.append((f"../{name}" if name.endswith("png") else f"{tmp_path}/{name}", data))
            if name.endswith("json"):
                out += [(f"../{name[:-4]}{kind}", held) for kind in ("pyd", "pickle", "pth")]
        return out

    path = root / "train-00000.tar"
    rewrite(path, change)
    before = set(tmp_path.rglob("*"))
    shards = opened(root)
    assert [shards[i]["id"] for i in range(3)] == [0, 1, 2]
    assert set(tmp_path.rglob("*")) == before
    with tarfile.open(path) as tar:  # whoever takes them as paths writes there
        tar.extractall(filter="fully_trusted")
    made = {found.parent for found in set(tmp_path.rglob("*")) - before}
    assert made == {tmp_path, tmp_path / "a"}


def link(rows):
    head = tarfile.TarInfo(rows[0][0])
    head.type, head.linkname = tarfile.SYMTYPE, "/etc/hostname"
    return [(head, b""), *rows[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (link, "must be a plain file"),
        (lambda rows: [*rows[:2], rows[1], *rows[2:]], "is there twice"),
    ],
)
def test_members_that_are_no_files(change, message, root):
    rewrite(root / "train-00000.tar", change)
    with pytest.raises(ValueError, match=message):
        opened(root).examined(0)


def test_places_of_another_tar_are_noticed(root):
    """A file of places that does not fit its tar gives errors, and no wrong sample."""
    places = root / "train-00000.idx"
    starts = np.fromfile(places, "<i8")
    shifted = starts.copy()
    shifted[1:-1] += 512
    for wrong, message in (
        (shifted, "sample 1: "),
        (starts[:-1], "must have 48 bytes, got 40"),
        (starts[::-1], "must have rising places"),
        (starts * 1000, "must have rising places"),
    ):
        wrong.astype("<i8").tofile(places)
        with pytest.raises(ValueError, match=message):
            opened(root).examined(1)


WRONG = {
    "version": (lambda x: x | {"version": 2}, "version must be 1, as this version"),
    "task": (lambda x: x | {"task": "depth"}, "task and channels: 'depth'"),
    "classes": (lambda x: x | {"classes": []}, "classes must have names"),
    "no splits": (lambda x: {k: v for k, v in x.items() if k != "splits"}, "lacks 'splits'"),
    "a path": (
        lambda x: x | {"splits": {"train": [{"file": "../a.tar", "samples": 1, "bytes": 1}]}},
        "file must be a plain name with .tar, got '../a.tar'",
    ),
    "no number": (
        lambda x: x | {"splits": {"train": [{"file": "a.tar", "samples": 0, "bytes": 1}]}},
        "a.tar: samples and bytes must be integers",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_index(case, root):
    change, message = WRONG[case]
    path = root / "index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=rf"{path}: no index of shards: .*{message}"):
        find_format(root)


def test_shards_of_others_are_refused_by_what_they_lack(tmp_path, capsys):
    with tarfile.open(tmp_path / "data-000.tar", "w") as tar:
        for name in ("a.jpg", "a.cls"):
            tar.addfile(tarfile.TarInfo(name))
    message = r"holds tar files \(data-000.tar\), but no index.json: .* names of the classes"
    with pytest.raises(ValueError, match=message):
        find_format(tmp_path)
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "no index.json" in " ".join(capsys.readouterr().err.split())


def test_a_split_that_is_not_there(root):
    path = root / "index.json"
    content = json.loads(path.read_text())
    del content["splits"]["val"]
    path.write_text(json.dumps(content))
    config = find_format(root)[0]
    with pytest.raises(ValueError, match=r"index.json: has no val split"):
        build_dataset(config, "val")
