"""Training in two processes against one: weak scaling.

Each process has one thread and as many images a step whatever their number, so that two make the
step of twice the batch; "one process" over "segkern" is the share of the time in which work is
done: 1.00 would be perfect. "two runs" are two processes that know nothing of each other: what
they cost each other anyhow. A step begins with reading its images, which all do at once.
"""

import os
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
from _measure import DEVICE, Work, pick
from _train_steps import CASES

IMPLS = {"segkern": (2, True), "one process": (1, True), "two runs": (2, False)}
SMALL, LARGE = CASES
STEPS = pick(  # case, images of a step in each process
    [(SMALL, 2)], [(SMALL, 8), (SMALL, 16), (SMALL, 32), (LARGE, 2), (LARGE, 8)], []
)
SCRIPT = Path(__file__).with_name("_train_steps.py")


class Processes:
    """So many processes that train together, or each alone; a call makes one step.

    Args:
        case: of _train_steps.py.
        images: of a step in each process.
        count: of processes.
        together: they train one model.
        variables: of their environment; OMP_NUM_THREADS is otherwise 1.
    """

    def __init__(self, case: str, images: int, count: int, together: bool, **variables: str):
        self.folder = tempfile.TemporaryDirectory(prefix="segkern-bench-")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        shared |= {"WORLD_SIZE": str(count if together else 1)} | variables
        command = [sys.executable, SCRIPT, case, str(images)]
        self.all = [
            subprocess.Popen(
                [*command, f"{self.folder.name}/{0 if together else rank}"],
                env=os.environ
                | shared
                | {name: str(rank if together else 0) for name in ("RANK", "LOCAL_RANK")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        self._wait()

    def _wait(self) -> None:
        for process in self.all:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a process that trains has ended")

    def __call__(self) -> None:
        for process in self.all:
            process.stdin.write("\n")
            process.stdin.flush()
        self._wait()

    def end(self) -> None:
        for process in self.all:
            process.kill()
            process.communicate()
        self.folder.cleanup()


@pytest.fixture(scope="module")
def started():
    """What `build` starts, which ends with this file."""
    found = []
    yield found
    for processes in found:
        processes.end()


def build(case, images, started):
    impls = {}
    while started:  # those of the case before
        started.pop().end()
    for name, (count, together) in IMPLS.items():
        impls[name] = Processes(case, images, count, together)
        started.append(impls[name])
        for _ in range(3):  # memory and moments are there then
            impls[name]()
    return Work(impls, threads=1)


@pytest.mark.skipif(DEVICE != "cpu", reason="made for two cores")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", STEPS, ids=lambda c: f"{c[0]} B={c[1]}")
def test_processes(case, impl, measured, started):
    case, images = case
    name = f"training step B={images} a process"
    measured(f"processes {case}", name, "float32", impl, partial(build, case, images, started))
