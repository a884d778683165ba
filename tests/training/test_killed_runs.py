"""Runs that are killed at any moment end with the weights of one that was never stopped."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_loop import same

from segkern.data import Digits
from segkern.training import checkpoint, loop, saver
from segkern.training.step import Step
from support.runs import light

ROOT = Path(__file__).parents[2]
EVERY = 2  # steps between checkpoints


def run(folder, processes, steps, budget=None, at_once=True, limit=300):
    """Trains in child processes, which go on with what is there.

    Args:
        budget: seconds of CPU time after the start of its first step (or of the process, where it
            is negative) at which the last of the processes kills itself; None lets all end.

    Returns:
        CPU seconds of the last process before and after that start, where all end.
    """
    children = []
    (folder / "store").unlink(missing_ok=True)
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            _child(folder, rank, processes, steps, budget, at_once)
        children.append(child)
    end, left = time.monotonic() + limit, set(children)
    while left:
        left = {child for child in left if not os.waitpid(child, os.WNOHANG)[0]}
        if time.monotonic() > end:
            for child in left:
                os.kill(child, signal.SIGKILL)
            raise AssertionError(f"{len(left)} processes hang")
        time.sleep(0.01)
    return json.loads((folder / "times").read_text()) if budget is None else None


def _child(folder, rank, processes, steps, budget, at_once):
    try:
        if not at_once:
            saver.LARGE = 0
        if processes > 1:
            store = f"file://{folder}/store"
            torch.distributed.init_process_group("gloo", store, rank=rank, world_size=processes)
        began, mine = [], rank == processes - 1

        def kills_itself(base):
            while time.process_time() - base < abs(budget):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

        if budget is not None and mine and budget < 0:
            threading.Thread(target=kills_itself, args=(0.0,), daemon=True).start()
        step = Step.__call__

        def first(self, *arguments):
            if not began:
                began.append(time.process_time())
                if budget is not None and mine and budget >= 0:
                    threading.Thread(target=kills_itself, args=(began[0],), daemon=True).start()
            return step(self, *arguments)

        Step.__call__ = first
        output = folder / "run"
        setting = light(output, steps=steps, checkpoint_every=EVERY, ema=0.9)
        found = checkpoint.held(output)
        loop.train(setting, resume=output if found else None, progress=False)
        if mine:
            times = [began[0], time.process_time() - began[0]]
            Path(folder, "times").write_text(json.dumps(times))
        os._exit(0)
    except BaseException as error:
        print(f"process {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def main(folder, processes, kills, at_once):
    """In a process that has imported all and started no thread, so that it may be forked."""
    torch.set_num_threads(1)
    importlib.import_module("segkern.training.shard_writer")
    _ = Digits(light(folder).data)[0]
    folder, steps, draw = Path(folder), 4 * kills, random.Random(kills)
    (folder / "whole").mkdir()
    start, work = run(folder / "whole", processes, steps, at_once=at_once)
    place, newest = folder / "killed", 0
    place.mkdir()
    for number in range(kills):
        before = number % 4 == 3  # some while it starts
        budget = -draw.uniform(0.1, start) if before else draw.uniform(0, 5 * work / steps)
        run(place, processes, steps, budget, at_once)
        found = checkpoint.held(place / "run")
        step = checkpoint.whole(found[-1])["step"] if found else 0
        log = place / "run/log.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        last = json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0
        written = last // EVERY * EVERY - (0 if at_once else EVERY)
        assert step >= max(newest, written), (step, newest, last)
        newest = step
        print("killed in step", last + 1, "of", steps, "with a checkpoint of", step, flush=True)
    run(place, processes, steps, at_once=at_once)


def killed(folder, processes, kills, at_once):
    call = f"main({str(folder)!r}, {processes}, {kills}, {at_once})"
    paths = [ROOT, ROOT / "tests", ROOT / "tests/training"]
    done = subprocess.run(
        [sys.executable, "-c", f"from test_killed_runs import main; {call}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout + done.stderr)
    assert done.stdout.count("killed in step") == kills
    one, other = (checkpoint.load(folder / name / "run") for name in ("whole", "killed"))
    assert one["step"] == other["step"] == 4 * kills
    same(one["tensors"], other["tensors"])
    logs = []
    for name in ("whole", "killed"):
        lines = (folder / name / "run/log.jsonl").read_text().splitlines()
        logs.append({json.loads(x)["step"]: json.loads(x)["loss"] for x in lines})
    assert logs[1].items() <= logs[0].items()
    assert not list((folder / "killed/run/checkpoints").glob(".*"))


def test_a_run_that_was_killed_in_its_first_checkpoint_starts_anew(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saver.Saver, "_write", stopped)
        with pytest.raises(KeyboardInterrupt):
            loop.train(light(tmp_path, steps=1), progress=False)
    assert (tmp_path / "model").is_dir()
    assert loop.train(light(tmp_path, steps=1), progress=False).steps == 1
    for path in checkpoint.held(tmp_path):
        shutil.rmtree(path)  # by hand: the model is all that is left of a run, and stays
    with pytest.raises(ValueError, match=r"holds a run \(model\): choose another --output"):
        loop.train(light(tmp_path, steps=1), progress=False)


@pytest.mark.slow
def test_a_killed_run(tmp_path):
    killed(tmp_path, 1, 3, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "at_once"),
    [pytest.param(1, False, id="one", marks=pytest.mark.long), pytest.param(2, True, id="two")],
)
def test_a_run_that_is_killed_ten_times(tmp_path, processes, at_once):
    killed(tmp_path, processes, 10, at_once)
