"""Two processes of one group, for tests of what several do together."""

import contextlib
import datetime
import queue
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(work: Callable[[int], object], folder: Path, patience: int = 150) -> dict:
    """What a function returns in each of two processes of a gloo group, by rank.

    Args:
        work: takes the rank; a module's own, as the processes import it. It returns plain types: a
            tensor's file would be gone with its process.
        folder: empty, where the two find each other.
        patience: seconds that it may take.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_member, args=(work, rank, folder / "store", results))
        for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    found, limit = {}, time.monotonic() + patience
    while len(found) < len(workers):
        with contextlib.suppress(queue.Empty):
            found |= dict([results.get(timeout=1)])
        assert not any(worker.exitcode for worker in workers), "a process failed"
        assert time.monotonic() < limit, "a process hangs"
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    return found


def _member(work, rank, file, results):
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{file}", timeout=wait, rank=rank, world_size=2)
    results.put((rank, work(rank)))
    dist.barrier()
    dist.destroy_process_group()
