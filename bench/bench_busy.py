"""A training step on all cores while other processes keep one of them busy, or all.

Threads that are done wait for the others by spinning, which takes time from the very thread that
they wait for. "segkern" is a process as the commands of segkern start it (GOMP_SPINCOUNT=2000),
"OpenMP's default" one that leaves the matter to OpenMP, "alone" either of them without the other
processes. On two cores a fair share would be 1.33 of "alone" beside one process, 2 beside two.
"""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import partial

import pytest
from _measure import DEVICE, Work, pick
from _train_steps import CASES
from bench_processes import Processes

CORES = str(len(os.sched_getaffinity(0)))
SHORT = {"GOMP_SPINCOUNT": "2000"}
IMPLS = {  # variables of the process, whether others are busy
    "segkern": (SHORT, True),
    "OpenMP's default": ({}, True),
    "segkern, alone": (SHORT, False),
    "OpenMP's default, alone": ({}, False),
}
STEPS = pick(  # case, images, other processes
    [(CASES[0], 2, 1)], [(CASES[0], 8, n) for n in sorted({1, int(CORES)})], []
)


@pytest.fixture(scope="module")
def running():
    """What ends the processes of this file."""
    with ExitStack() as stack:
        yield stack


def build(case, images, count, running):
    others = []
    for _ in range(count):
        others.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        others[-1].send_signal(signal.SIGSTOP)
        running.callback(others[-1].kill)

    def step(processes: Processes, busy: bool) -> None:
        for other in others * busy:
            other.send_signal(signal.SIGCONT)
        processes()
        for other in others:
            other.send_signal(signal.SIGSTOP)

    impls = {}
    for name, (variables, busy) in IMPLS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("GOMP_SPINCOUNT", raising=False)
            processes = Processes(case, images, 1, False, OMP_NUM_THREADS=CORES, **variables)
        running.callback(processes.end)
        for _ in range(3):  # memory and moments are there then
            processes()
        impls[name] = partial(step, processes, busy)
    return Work(impls)


@pytest.mark.skipif(DEVICE != "cpu", reason="about cores of a CPU")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", STEPS, ids=lambda c: f"{c[0]} B={c[1]} beside {c[2]}")
def test_busy(case, impl, measured, running):
    case, images, count = case
    name = f"training step B={images}, {CORES} threads, beside {count} busy processes"
    work = partial(build, case, images, count, running)
    measured(f"busy {case}", name, "float32", impl, work)
