"""Shards of results: what is in them, runs that were stopped, pictures that are broken."""

import gc
import itertools
import json
import os
import shutil
import threading
import tracemalloc
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet
import pycocotools.mask
import pytest
import torch
from PIL import Image

from segkern.inference.predict_many import predict_many
from segkern.inference.segment import segment
from segkern.io import picture_list
from support.models import Squares, half_bright

COUNT, SIZE = 11, 4  # pictures, and in a shard: the last has three


def draw(path, number=0, size=(40, 60)):
    picture = half_bright(*size)
    picture[: number + 1] = 0
    Image.fromarray(picture).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of two sizes; among them a note, and one that is hidden."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        draw(root / f"{i:02d}.png", i, (40, 60) if i % 3 else (24, 32))
    (root / "note.txt").write_text("not a picture, and not tried")
    draw(root / ".hidden.png")
    return root


def shards(out, suffix="jsonl"):
    return {path.name: path.read_bytes() for path in sorted(out.glob(f"shard-*.{suffix}"))}


def rows(out):
    lines = b"".join(shards(out).values()).decode().splitlines()
    return [json.loads(line) for line in lines]


def failures(out):
    return [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert predict_many(Squares(), [folder], out, shard_size=SIZE) == (COUNT, 0)
    return out


def test_shards_hold_what_segment_finds(folder, whole):
    names = [f"shard-{i:06d}.jsonl" for i in range(3)]
    assert sorted(p.name for p in whole.iterdir()) == ["job.json", "pictures.jsonl", *names]
    assert [content.count(b"\n") for content in shards(whole).values()] == [4, 4, 3]
    found = rows(whole)
    assert [row["number"] for row in found] == list(range(COUNT))
    for i, row in enumerate(found):
        path = folder / f"{i:02d}.png"
        assert (row["image"], row["archive"]) == (str(path), None)
        result = segment(Squares(), path)
        assert {k: row[k] for k in ("task", "size", "segments")} == result.to_json()
        for one in row["segments"]:
            mask = pycocotools.mask.decode(one["segmentation"])
            assert (mask == (result.segmentation == one["id"]).numpy()).all()


def test_pictures_of_one_size_run_together(folder, tmp_path):
    model = Squares()
    predict_many(model, [folder], tmp_path / "out", shard_size=COUNT, batch_size=4)
    assert max(len(pixels) for pixels in model.seen) == 4
    assert sum(len(pixels) for pixels in model.seen) == COUNT


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_parquet_has_the_rows_of_json(task, folder, tmp_path):
    given = Squares(), [folder]
    for format in ("jsonl", "parquet"):
        predict_many(*given, tmp_path / format, task, format=format, shard_size=SIZE)
    parts = sorted((tmp_path / "parquet").glob("shard-*.parquet"))
    assert [pyarrow.parquet.read_metadata(part).num_rows for part in parts] == [4, 4, 3]
    read = [row for part in parts for row in pyarrow.parquet.read_table(part).to_pylist()]
    assert read == rows(tmp_path / "jsonl")
    assert any(row["segments"] for row in read)
    whole = pyarrow.parquet.read_table(parts).select(["number"])  # as one data set
    assert whole["number"].to_pylist() == list(range(COUNT))


class Stop(Exception):
    pass


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_run_that_was_stopped_goes_on(format, folder, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    predict_many(Squares(), [folder], whole, format=format, shard_size=SIZE)

    def stop(shard):
        raise Stop

    with pytest.raises(Stop):
        predict_many(Squares(), [folder], out, format=format, shard_size=SIZE, report=stop)
    assert len(shards(out, format)) == 1
    first = out / f"shard-000000.{format}"
    before = first.stat()
    left = out / f".{'0' * 32}.{format}"  # as a run that is killed leaves it
    left.write_text("half a li")
    told = []
    model = Squares()
    done = predict_many(model, [folder], out, format=format, shard_size=SIZE, report=told.append)
    assert done == (COUNT, 0)
    assert [shard.kept for shard in told] == [True, False, False]
    assert sum(len(pixels) for pixels in model.seen) == COUNT - SIZE
    assert shards(out, format) == shards(whole, format)
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not left.exists()


def test_the_list_of_a_job_stays(folder, tmp_path):
    """A picture that comes while a job is stopped would move those behind it to other shards."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(3):
        draw(source / f"{i}.png", i)
    predict_many(Squares(), [source], out, shard_size=2)
    before = rows(out)
    (out / "shard-000001.jsonl").unlink()
    draw(source / "00.png")
    assert predict_many(Squares(), [source], out, shard_size=2) == (3, 0)
    assert rows(out) == before


def test_the_shards_of_another_job_are_kept(folder, whole, tmp_path):
    before = shards(whole)
    other = Squares()
    torch.nn.init.constant_(other.weight, 0.5)
    for model, changes, name in (
        (Squares(), {"task": "semantic"}, "task is 'panoptic', here 'semantic'"),
        (Squares(), {"shard_size": 5}, "shard_size is 4, here 5"),
        (other, {}, "model is"),
        (Squares(std=(0.3,) * 3), {}, "model is"),  # the same weights
    ):
        with pytest.raises(ValueError, match=f"another job, whose {name}.*choose another --out"):
            predict_many(model, [folder], whole, **{"shard_size": SIZE} | changes)
    assert shards(whole) == before


def truncated(path):
    draw(path)
    path.write_bytes(path.read_bytes()[:700])


def test_broken_pictures_are_collected(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    for name in ("a.png", "d.png", "f.png"):
        draw(root / name)
    truncated(root / "b.jpg")
    (root / "c.png").write_text("not a picture")
    names = ["a.png", "b.jpg", "c.png", "d.png", "gone.png", "f.png"]
    (tmp_path / "list.txt").write_text("".join(f"{root / name}\r\n\n" for name in names))
    given = {"lists": [tmp_path / "list.txt"], "shard_size": 4}
    assert predict_many(Squares(), [], out, **given) == (6, 3)
    assert [row["number"] for row in rows(out)] == [0, 3, 5]
    found = failures(out)
    assert [row["number"] for row in found] == [1, 2, 4]
    assert [row["image"] for row in found] == [str(root / names[i]) for i in (1, 2, 4)]
    told = ("not a readable image (", "not an image that PIL can read", "no such file")
    for row, text in zip(found, told):
        assert row["error"].startswith(f"{row['image']}: {text}")
    content, errors = shards(out), (out / "errors.jsonl").read_bytes()
    assert predict_many(Squares(), [], out, **given) == (6, 3)  # finished: nothing is tried
    assert shards(out) == content
    assert (out / "errors.jsonl").read_bytes() == errors
    draw(root / "gone.png")
    draw(root / "c.png")
    assert predict_many(Squares(), [], out, retry=True, **given) == (6, 1)
    assert [row["number"] for row in rows(out)] == [0, 2, 3, 4, 5]
    assert [row["number"] for row in failures(out)] == [1]
    draw(root / "b.jpg")
    assert predict_many(Squares(), [], out, retry=True, **given) == (6, 0)
    assert not list(out.glob("errors*"))


class Killed(BaseException):
    pass


def kill_after(monkeypatch, steps):
    """Lets so many files be renamed or removed, and none after them, as a killed process."""
    done = []

    def counted(step):
        def run(*given, **options):
            if len(done) == steps:
                raise Killed
            done.append(step)
            return step(*given, **options)

        return run

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize("mended", [1, 2])
def test_a_kill_of_a_second_try_lists_no_picture_twice_and_none_never(
    mended, tmp_path, monkeypatch
):
    """Wherever it comes: between any two files that the second try renames or removes."""
    root = tmp_path / "in"
    root.mkdir()
    draw(root / "a.png")
    for name in "bc":
        (root / f"{name}.png").write_text("not a picture")
    before = tmp_path / "before"
    assert predict_many(Squares(), [root], before) == (3, 2)
    for name in "bc"[:mended]:
        draw(root / f"{name}.png")
    for steps in itertools.count():
        out = tmp_path / str(steps)
        shutil.copytree(before, out)
        with monkeypatch.context() as patch:
            kill_after(patch, steps)
            try:
                predict_many(Squares(), [root], out, retry=True)
                break
            except Killed:
                pass
        assert predict_many(Squares(), [root], out)[0] == 3
        found = rows(out) + (failures(out) if (out / "errors.jsonl").is_file() else [])
        assert sorted(row["number"] for row in found) == [0, 1, 2], steps
    assert steps > 3


class Narrow(Squares):
    """Has no memory for pictures of some size."""

    def predict(self, pixel_values):
        if pixel_values.shape[-1] == 32:
            raise torch.OutOfMemoryError("no memory for 32 columns")
        return super().predict(pixel_values)


def test_pictures_that_the_model_cannot_do_leave_the_others(folder, whole, tmp_path):
    out = tmp_path / "out"
    small = [i for i in range(COUNT) if not i % 3]
    assert predict_many(Narrow(), [folder], out, shard_size=SIZE) == (COUNT, len(small))
    assert [row["number"] for row in failures(out)] == small
    assert failures(out)[0]["error"] == f"{folder / '00.png'}: no memory for 32 columns"
    assert rows(out) == [row for row in rows(whole) if row["number"] not in small]


def test_a_fault_of_the_program_is_no_fault_of_a_picture(folder, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyError("of the program")

    monkeypatch.setattr("segkern.inference.predict_many.read_place", broken)
    with pytest.raises(KeyError):
        predict_many(Squares(), [folder], tmp_path / "out")


@pytest.fixture
def server(folder):
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=folder)) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def test_a_list_has_addresses(server, folder, whole, tmp_path):
    lines = f"{server}/01.png?size=full\n{folder / '02.png'}\n{server}/gone.png\n"
    (tmp_path / "list.txt").write_text(lines)
    out = tmp_path / "out"
    assert predict_many(Squares(), [], out, lists=[tmp_path / "list.txt"]) == (3, 1)
    (bad,) = failures(out)
    assert bad["image"] == f"{server}/gone.png"
    assert "gone.png cannot be fetched: HTTP Error 404" in bad["error"]
    first, second = rows(out)
    assert first["image"] == f"{server}/01.png?size=full"
    assert [first["segments"], second["segments"]] == [row["segments"] for row in rows(whole)[1:3]]


def test_an_empty_job_and_bad_options_are_refused(folder, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "list.txt").write_text("\n")
    out = tmp_path / "out"
    for given, message in (
        ({"inputs": [tmp_path / "bare"]}, "bare holds no image"),
        ({"inputs": []}, "no image given"),
        ({"inputs": [], "lists": [tmp_path / "list.txt"]}, "no image given"),
        ({"inputs": [folder], "shard_size": 0}, "shard_size must be"),
        ({"inputs": [folder], "format": "csv"}, "format must be one of .* got 'csv'"),
    ):
        with pytest.raises(ValueError, match=message):
            predict_many(Squares(), out_dir=out, **given)
    assert not list(out.glob("*.json*"))


def test_parquet_without_pyarrow_comes_with_the_remedy(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        predict_many(Squares(), [folder], tmp_path / "out", format="parquet")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pictures(tmp_path, monkeypatch):
    """5,000 pictures, whose names are sorted on disk, are read and written; what would be found in
    them is given. The names of those between the first measure and the last alone would be more
    than 400 kB."""
    monkeypatch.setattr(picture_list, "_AT_ONCE", 500)
    root, out, count = tmp_path / "in", tmp_path / "out", 5_000
    root.mkdir()
    Image.fromarray(half_bright(8, 8)).save(root / "0.png")
    for i in range(1, count):
        (root / f"{i * 7919 % count}.png").hardlink_to(root / "0.png")
    result = segment(Squares(), root / "0.png")

    def given(model, pictures, **_):
        assert all(picture.shape == (3, 8, 8) for picture in pictures)
        return [result] * len(pictures)

    monkeypatch.setattr("segkern.inference.predict_many.segment", given)
    held, peaks = [], []

    def measure(shard):
        if shard.path.name.endswith("9.jsonl"):
            peaks.append(tracemalloc.get_traced_memory()[1])
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
            tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        told = predict_many(Squares(), [root], out, shard_size=50, report=measure)
    finally:
        tracemalloc.stop()
    assert told == (count, 0)
    assert len(held) == 10
    assert held[-1] - held[0] < 100_000, held
    assert max(peaks) - held[0] < 400_000, peaks
    names = [row["image"] for row in rows(out)]
    assert names == sorted(set(names))
    assert len(names) == count
