"""Processes of one group, for tests of what several do together."""

import contextlib
import datetime
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(work: Callable[[int], object], folder: Path, patience: int = 150) -> dict:
    """What a function returns in each of two processes of a gloo group, by rank; as
    `in_processes`."""
    return in_processes(work, folder, 2, patience)


def in_processes(
    work: Callable[[int], object], folder: Path, count: int, patience: int = 300
) -> dict:
    """What a function returns in each of several processes of a gloo group, by rank.

    Args:
        work: takes the rank; a module's own, as the processes import it. It returns plain types: a
            tensor's file would be gone with its process.
        folder: empty, where they find each other.
        count: of processes.
        patience: seconds that it may take.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_member, args=(work, rank, count, folder / "store", results))
        for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    found, limit = {}, time.monotonic() + patience
    try:
        while len(found) < count:
            with contextlib.suppress(queue.Empty):
                rank, value, fault = results.get(timeout=1)
                assert fault is None, f"process {rank}: {fault}"
                found[rank] = value
            dead = [rank for rank, worker in enumerate(workers) if worker.exitcode]
            assert not dead, f"process {dead[0]} ended with {workers[dead[0]].exitcode}"
            assert time.monotonic() < limit, "a process hangs"
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    for worker in workers:
        worker.join(150)
        assert worker.exitcode == 0
    return found


def _member(work, rank, count, file, results):
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{file}", timeout=wait, rank=rank, world_size=count)
    try:
        results.put((rank, work(rank), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    dist.barrier()
    dist.destroy_process_group()
