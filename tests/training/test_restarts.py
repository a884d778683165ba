"""A group that torchrun starts again goes on from what it has written itself."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_loop import PulledPlug

from segkern.data import build_dataset
from segkern.training import checkpoint
from segkern.training.loop import train
from segkern.training.saver import launch, restarted
from support.runs import light

ROOT = Path(__file__).parents[2]


def started(monkeypatch, name, count):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))


def test_only_a_restart_of_the_same_start_goes_on(tmp_path, monkeypatch):
    assert launch() is None
    setting = light(tmp_path, checkpoint_every=2, overwrite=True)
    data = build_dataset(setting.data, "train", setting.model)
    held_back = PulledPlug(data, 5 * setting.batch_size)
    started(monkeypatch, "one", 0)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(setting, dataset=held_back, progress=False)
    assert restarted(tmp_path) is None
    started(monkeypatch, "two", 1)  # of another start: what it finds was there before
    assert restarted(tmp_path) is None
    started(monkeypatch, "one", 1)
    assert restarted(tmp_path).name == "0000004"
    assert restarted(tmp_path / "other") is None
    rest = PulledPlug(data, 2 * setting.batch_size)  # for two steps, not for six
    assert train(setting, dataset=rest, progress=False).steps == 6
    steps = [json.loads(x)["step"] for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    started(monkeypatch, "one", 2)
    with pytest.raises(ValueError, match=r"has its 6 steps; --steps must be larger"):
        train(setting, dataset=data, progress=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as torchrun says where it was given none
    assert launch() == str(os.getppid())
    again = replace(setting, steps=7, overwrite=False)
    with pytest.raises(ValueError, match=r"holds a run \(checkpoints, model\)"):
        train(again, dataset=data, progress=False)


def test_the_first_decides_for_all_machines(tmp_path, monkeypatch):
    """Each of which counts its own failures: to one it is the first try, to another the second."""
    started(monkeypatch, "one", 0)
    light_run = light(tmp_path, steps=1)
    train(light_run, progress=False)
    assert restarted(tmp_path) is None
    told = {"count": 1, "first": True, "from_first": lambda found: found}
    others = SimpleNamespace(any=lambda again: not again, **told)  # the second try of another
    assert restarted(tmp_path, others).name == "0000001"
    shutil.rmtree(tmp_path / "checkpoints")
    assert restarted(tmp_path, others) is None


SCRIPT = """
import os, signal, sys
from segkern.training import loop
from segkern.training.step import Step
from support.runs import light
folder, rank = sys.argv[1], os.environ["RANK"]
first, made = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", []
step = Step.__call__

def counted(self, *arguments):
    made.append(1)
    if first and len(made) == 6 and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)

Step.__call__ = counted
loop.train(light(folder, steps=8, checkpoint_every=2), progress=False)
with open(f"{folder}/made-{rank}", "w") as file:  # what both print may come in one line
    file.write(str(len(made)))
"""


@pytest.mark.slow
def test_torchrun_starts_a_group_again_when_a_process_dies(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + ["--max-restarts", "1", str(tmp_path / "script.py"), str(tmp_path / "run")],
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert [(tmp_path / f"run/made-{rank}").read_text() for rank in (0, 1)] == ["4", "4"]
    assert checkpoint.whole(tmp_path / "run")["step"] == 8
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 9)]
