"""`segkern train --processes 2`: it follows the run of one process, stops, goes on, and fails as
one process does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segkern.cli import main
from segkern.data import Order
from segkern.models import open_model
from segkern.runtime import processes
from segkern.runtime.processes import joined
from segkern.training import checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 50
ENDLESS = 100000  # steps of a run that a signal ends, however late it comes
SMALL = ["--data.size", "32", "32", "--data.scenes", "7", "--device", "cpu", "--sync-batch-norm"]
SMALL += ["--model.num-queries", "5", "--model.train-num-points", "32", "--no-tensorboard"]
SMALL += ["--model.decoder-layers", "1", "--batch-size", "4", "--log-every", "1"]
# What rounding moves must stay small for 50 steps on any machine: AdamW makes whole steps of
# gradients that are nothing but rounding, and points chosen by their loss change by a bit of it.
# A rate that stays makes a short run the beginning of a longer one.
SMALL += ["--optimizer", "sgd", "--model.importance-sample-ratio", "0", "--lr", "1e-4"]
SMALL += ["--warmup", "0", "--schedule", "poly", "--power", "0"]


def started(*arguments):
    """The command in two processes."""
    command = [sys.executable, "-m", "segkern", "train", "--processes", "2", *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    return subprocess.Popen(command, **kinds)


def ended(run, code=0):
    """What it printed."""
    out, errors = run.communicate(timeout=300)
    assert run.returncode == code, errors
    assert "Traceback" not in errors
    return out, errors


def lines(folder):
    """Of the log, as far as they are whole."""
    log = folder / "log.jsonl"
    text = log.read_text() if log.is_file() else ""
    return [json.loads(x) for x in text.splitlines(keepends=True) if x.endswith("\n")]


def until(run, folder, steps):
    """Waits for so many steps."""
    limit = time.monotonic() + 300
    while len(lines(folder)) < steps:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < limit, "training did not start"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The log of one process."""
    folder = tmp_path_factory.mktemp("alone")
    options = ["--processes", "1", "--output", str(folder), "--steps", str(STEPS)]
    assert main(["train", *SMALL, *options]) == 0
    return lines(folder)


def follows(log, alone):
    assert [x["step"] for x in log] == [*range(1, len(log) + 1)]
    for mine, other in zip(log, alone):
        assert mine["lr"] == other["lr"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4), mine["step"]
        assert mine["losses"] == pytest.approx(other["losses"], rel=1e-4), mine["step"]


@pytest.mark.slow
def test_two_processes_follow_one(alone, tmp_path):
    out, errors = ended(started(*SMALL, "--output", tmp_path, "--steps", STEPS))
    assert len(lines(tmp_path)) == len(alone) == STEPS
    follows(lines(tmp_path), alone)
    assert alone[-1]["loss"] < 0.97 * alone[0]["loss"]
    assert errors == ""
    assert out.count("trained 50 steps") == 1  # the first process alone speaks
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "log.jsonl", "model"]
    open_model(tmp_path / "model")


@pytest.mark.slow
def test_a_run_stops_after_one_step_goes_on_and_ends_with_the_first_that_does(alone, tmp_path):
    """Ctrl-C reaches the command alone, which hands it to its processes. Later one of them is
    killed, as by a machine without memory left, and all end."""
    run = started(*SMALL, "--output", tmp_path, "--steps", ENDLESS, "--parallel", "fsdp")
    until(run, tmp_path, 3)
    run.send_signal(signal.SIGINT)
    _, errors = ended(run, 130)
    step = checkpoint.load(tmp_path)["step"]
    assert step >= 3
    assert errors.count(f"stopped after step {step} of {ENDLESS}; go on with: segkern train") == 1
    assert lines(tmp_path)[-1]["step"] == step
    run = started("--resume", tmp_path)
    until(run, tmp_path, step + 3)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    found = []
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found += [child] if b"RANK=1" in variables else []
    (second,) = found
    os.kill(second, signal.SIGKILL)
    _, errors = ended(run, 1)
    assert errors.count("segkern: error: ") == 1
    assert "process 1 of 2 was ended by SIGKILL" in errors
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    follows(lines(tmp_path), alone)


def test_what_all_would_refuse_is_refused_once(tmp_path, capsys, monkeypatch):
    options = ["train", "--output", str(tmp_path), "--device", "cpu", "--processes"]
    for count, more, said in (
        ("3", ["--batch-size", "4"], "batch_size must be a multiple of the 3 processes that sha"),
        ("0", [], "processes must be at least 1, got 0"),
    ):
        assert main([*options, count, *more]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="WORLD_SIZE says 4 processes, and RANK, MASTER_ADDR, MA"):
        joined().__enter__()
    assert main([*options, "2"]) == 2
    assert (
        "start them with torchrun or --processes, or unset WORLD_SIZE" in capsys.readouterr().err
    )


def test_each_process_takes_its_part_of_a_batch():
    whole = [*Order(7, 6, 0, 0, 5, passes=True)]
    parts = [[*Order(7, 6, 0, 0, 5, True, rank, 3)] for rank in range(3)]
    assert whole == [[*a, *b, *c] for a, b, c in zip(*parts)]
    with pytest.raises(ValueError, match=r"multiple of the 4 processes .* got 6"):
        Order(7, 6, 0, 0, 5, False, 0, 4)


def test_one_process_agrees_with_itself():
    alone = processes.ALONE
    assert alone.first
    assert alone.any(True)
    assert not alone.any(False)
    assert alone.sums([1, 2]) == [1, 2]
    assert alone.from_first("x") == "x"
    assert processes.code_before(2) is None
    assert not processes.said_before("x")
    assert re.fullmatch("cpu|cuda", str(alone.device("auto")))
