"""Starts a command in several processes of this machine, as torchrun does, and ends with them.

torchrun kills what has not stopped half a minute after Ctrl-C; a step and its checkpoint may take
longer. Here every Ctrl-C goes to every process once, and the exit code is that of the process that
failed first.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from .processes import NAMES, claimed

_HANDED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # to processes that no terminal reaches
_POLL = 0.05  # seconds
_GRACE = 10.0  # seconds that the others have to end by themselves when one has failed
_END = 30.0  # and then before they are killed


def launch(arguments: Sequence[str], processes: int) -> int:
    """Runs `python -m segkern` with arguments in so many processes, and waits for them.

    Args:
        arguments: of the command line, without the number of processes.
        processes: at least 2.

    Returns:
        the exit code of the first that failed, 130 after Ctrl-C, or 0.
    """
    # port 0: the system chooses a free one, and keeps it for this store
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process keeps the store, rank 0 does not
    }
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    workers: list[subprocess.Popen] = []
    before = {}
    try:
        for number in _HANDED:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # of nohup
                before[number] = signal.signal(number, lambda n, _: _send(workers, n))
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # in a session of its own, or a terminal's Ctrl-C would come twice
            worker = subprocess.Popen(
                [sys.executable, "-m", "segkern", *arguments],
                env=threads | os.environ | shared | own,
                start_new_session=True,
            )
            workers.append(worker)
        return _code(workers, store)
    finally:
        _end(workers)
        for number, handler in before.items():
            signal.signal(number, handler)


def _code(workers: list[subprocess.Popen], store: dist.Store) -> int:
    """The exit code of the run, when all have ended."""
    store, failed, limit = dist.PrefixStore(NAMES, store), None, math.inf
    code = 0
    while failed is None or any(worker.poll() is None for worker in workers):
        if failed is None and (failed := _first_failed(workers)) is not None:
            limit = time.monotonic() + _GRACE
            code = _told(failed, workers, store)
        if failed is None and all(worker.poll() == 0 for worker in workers):
            break
        if time.monotonic() > limit:
            _end(workers)
        time.sleep(_POLL)
    return code


def _told(failed: int, workers: list[subprocess.Popen], store: dist.Store) -> int:
    """The exit code of the first process that failed, for which is said here what it could not
    say: that it was killed."""
    code = workers[failed].returncode
    if code > 0:
        said = store.check(["code"])
        return int(store.get("code")) if said else code
    number = signal.Signals(-code)
    code = 128 + number if number in _HANDED else 1
    if (before := claimed(store, code)) is not None:
        return before
    why = ", which may be for want of memory" if number == signal.SIGKILL else ""
    print(
        f"segkern: error: process {failed} of {len(workers)} was ended by {number.name}{why}",
        file=sys.stderr,
    )
    return code


def _first_failed(workers: list[subprocess.Popen]) -> int | None:
    return next((i for i, worker in enumerate(workers) if worker.poll()), None)


def _send(workers: list[subprocess.Popen], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _end(workers: list[subprocess.Popen]) -> None:
    """Ends those that run: they are asked first, and killed with all that they started then."""
    _send(workers, signal.SIGTERM)
    limit = time.monotonic() + _END
    for worker in workers:
        try:
            worker.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
