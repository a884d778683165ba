"""`segkern predict` into shards: the command, several processes, a kill in the middle."""

import json
import os
import select
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from segkern import recipes
from segkern.cli import main
from segkern.inference import predict_files as files
from segkern.inference import predict_many as many
from segkern.inference.predict_files import predict_files
from segkern.inference.predict_many import predict_many
from segkern.models import Mask2Former
from segkern.runtime.processes import Processes
from support.models import Squares
from support.processes import in_processes

COUNT = 20  # pictures; a shard has two


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model that is not trained, and pictures of three sizes, one of which is cut off."""
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    settings = replace(recipes.digits().model, num_queries=5, decoder_layers=1)
    Mask2Former(settings).save_pretrained(folder / "model")
    (folder / "in").mkdir()
    for i in range(COUNT):
        size = ((48, 48, 3), (40, 64, 3), (64, 33, 3))[i % 3]
        pixels = np.random.default_rng(i).integers(0, 256, size, np.uint8)
        Image.fromarray(pixels).save(folder / f"in/{i:02d}.jpg")
    cut = folder / "in/07.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    names = sorted(path.name for path in (folder / "in").iterdir())
    (folder / "list.txt").write_text("".join(f"{folder / 'in' / name}\n" for name in names))
    return folder


def command(inputs, out, *more):
    given = ["predict", "--list", str(inputs / "list.txt"), "--model", str(inputs / "model")]
    return [
        *given,
        "--out",
        str(out),
        "--threshold",
        "0",
        "--format",
        "jsonl",
        "--shard-size",
        "2",
        *more,
    ]


def content(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


@pytest.fixture(scope="module")
def whole(inputs):
    """What one process writes that nothing stops; with a thread, as those that are launched."""
    torch.set_num_threads(1)
    assert main(command(inputs, inputs / "whole")) == 2
    return content(inputs / "whole")


def test_the_command_tells_what_failed_and_its_exit_code_says_so(inputs, whole, capsys, tmp_path):
    shards = [f"shard-{i:06d}.jsonl" for i in range(COUNT // 2)]
    others = ["job.json", "pictures.jsonl", "errors.jsonl", "errors-000003.jsonl"]
    assert sorted(whole) == sorted([*shards, *others])
    (failed,) = map(json.loads, whole["errors.jsonl"].splitlines())
    assert failed["image"] == str(inputs / "in/07.jpg")
    lines = [json.loads(line) for name in shards for line in whole[name].splitlines()]
    assert [line["number"] for line in lines] == [i for i in range(COUNT) if i != 7]
    assert any(line["segments"] for line in lines)
    assert main(command(inputs, inputs / "whole")) == 2  # again: all is there
    told = capsys.readouterr()
    assert told.out.count("2 pictures") == COUNT // 2
    assert told.out.count("as it was") == COUNT // 2
    assert f"1 of {COUNT} pictures have no result: {inputs / 'whole/errors.jsonl'}" in told.err
    assert content(inputs / "whole") == whole
    good = ["predict", str(inputs / "in/00.jpg"), "--model", str(inputs / "model")]
    assert main([*good, "--out", str(tmp_path / "out"), "--format", "parquet"]) == 0
    for bad, message in (
        (["--shard-size", "0"], "shard_size must be"),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
    ):
        assert main(command(inputs, tmp_path / "bad", *bad)) == 2
        assert message in capsys.readouterr().err


def test_every_process_says_what_became_of_its_pictures(inputs, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("segkern.cli.joined", lambda: nullcontext(Processes(rank=1, count=2)))
    given = ["predict", str(inputs / "in/00.jpg"), "--model", str(inputs / "model")]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith(f"{inputs / 'in/00.jpg'}: ")


def test_options_of_shards_are_for_shards(inputs, capsys):
    given = ["predict", str(inputs / "in"), "--model", str(inputs / "model")]
    for option in ("--shard-size", "--batch-size", "--threads", "--retry"):
        assert main([*given, option, *["2"] * (option != "--retry")]) == 2
        assert f"predict: {option} is for shards: give --format" in capsys.readouterr().err


def shared(rank):
    """Into one folder, given by the environment; what this process did."""
    folder, done = Path(os.environ["SEGKERN_TEST_FOLDER"]), []
    counted = [
        mock.patch.object(module, name, wraps=getattr(module, name))
        for module, name in ((many, "listed"), (many, "_digest"), (files, "listed"))
    ]
    given = Squares(), [folder / "in"]
    with ExitStack() as stack:
        calls = [stack.enter_context(one) for one in counted]
        told = predict_many(*given, folder / "three", shard_size=2, report=done.append)
        written, failed = predict_files(*given, folder / "files")
    did = [shard.path.name for shard in done], [p.name for p in written], len(failed)
    return told, *did, [one.call_count for one in calls]


@pytest.mark.slow
def test_three_processes_write_what_one_does(inputs, tmp_path, monkeypatch):
    (tmp_path / "in").symlink_to(inputs / "in")
    monkeypatch.setenv("SEGKERN_TEST_FOLDER", str(tmp_path))
    (tmp_path / "group").mkdir()
    found = in_processes(shared, tmp_path / "group", 3)
    one = predict_many(Squares(), [tmp_path / "in"], tmp_path / "one", shard_size=2)
    assert one == (COUNT, 1)
    assert [found[rank][0] for rank in range(3)] == [one] * 3
    for rank in range(3):
        mine = [f"shard-{i:06d}.jsonl" for i in range(rank, COUNT // 2, 3)]
        assert found[rank][1] == mine
    assert content(tmp_path / "three") == content(tmp_path / "one")
    names = sorted(name for rank in range(3) for name in found[rank][2])
    assert names == [f"{i:02d}.json" for i in range(COUNT) if i != 7]
    assert sum(found[rank][3] for rank in range(3)) == 1
    assert [found[rank][4] for rank in range(3)] == [[1, 1, 1], [0, 0, 0], [0, 0, 0]]


def reading(pipe, launcher):
    """The end of a pipe to write to, once another process has begun to read it."""
    until = time.monotonic() + 240
    while True:
        with suppress(OSError):  # ENXIO: nobody reads
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        assert launcher.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_processes_are_gone_on_with(inputs, whole, tmp_path):
    """Their launcher is killed, which cannot end them itself, while each of them waits for a
    picture: a pipe that nobody writes to."""
    out, shards = tmp_path / "out", (6, 7)
    pipes = [inputs / f"in/{2 * shard:02d}.jpg" for shard in shards]
    pictures = [pipe.rename(tmp_path / pipe.name) for pipe in pipes]
    start = [sys.executable, "-m", "segkern", *command(inputs, out, "--processes", "2")]
    env, none = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.DEVNULL
    ends = select.poll()
    try:
        for pipe in pipes:
            os.mkfifo(pipe)
        with (
            (tmp_path / "said").open("wb") as said,
            subprocess.Popen(start, env=env, stdout=said, stderr=none) as launcher,
        ):
            try:
                opened = [reading(pipe, launcher) for pipe in pipes]
            finally:
                launcher.kill()
        for end in opened:  # which says when the last that reads it has ended
            ends.register(end, 0)
            assert ends.poll(240_000)
            ends.unregister(end)
            os.close(end)
    finally:
        for pipe, picture in zip(pipes, pictures):
            picture.replace(pipe)
    done = sorted(path.name for path in out.glob("shard-*"))
    assert done == [f"shard-{i:06d}.jsonl" for i in range(6)]
    assert all(whole[name] == (out / name).read_bytes() for name in done)
    lines = sorted((tmp_path / "said").read_text().splitlines())
    assert [line.partition(": 2 pictures")[0] for line in lines] == [f"{out / x}" for x in done]
    torch.set_num_threads(1)
    assert main(command(inputs, out)) == 2
    assert content(out) == whole
