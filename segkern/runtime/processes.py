"""Several processes of one command, as torchrun starts them: their number, their errors, and how a
command starts them by itself."""

import contextlib
import ctypes
import itertools
import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

_WAIT = timedelta(days=1)  # for the slowest; one that died is noticed at once
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl
_TOLD = "segkern/told"
_stretches = itertools.count()
_ours = []  # the group that `join` made


def count() -> int:
    """Processes of the group; 1 without one."""
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    """Number of this process in the group, from 0; 0 without one."""
    return dist.get_rank() if _grouped() else 0


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def started() -> bool:
    """Whether torchrun, or `launch`, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def join(backend: str = "gloo") -> None:
    """Makes the group of the processes that were started together; nothing where this is the only
    one. A GPU each is theirs in turn, and all but the first print nothing on the standard output.

    Args:
        backend: of `torch.distributed.init_process_group`.
    """
    if not started() or _grouped():
        return
    if sys.platform == "linux":  # or a launcher that is killed leaves its processes at work
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=_WAIT)
    _ours.append(dist.group.WORLD)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)


def leave() -> None:
    """Ends the group that `join` made, if it did."""
    if _ours:
        _ours.clear()
        dist.barrier()
        dist.destroy_process_group()


def first_to_tell() -> bool:
    """Whether this process is the first of its group to ask, so that what ends all of them is said
    once."""
    if count() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(_TOLD, 1) == 1
    except RuntimeError:  # whoever kept the store is gone
        return rank() == 0


class Together:
    """Work that the processes of a group share: an error of one is raised by all, and nobody waits
    for one that failed. All enter in the same order; without a group it does nothing.

        with Together() as group:
            for part in mine:
                if group.failed():
                    break
                ...
    """

    def __enter__(self):
        self._store = None
        if count() > 1:
            self._key = f"segkern/failed/{next(_stretches)}"
            self._store = dist.distributed_c10d._get_default_store()
        return self

    def failed(self) -> bool:
        """Whether the work of another failed, so that there is no use in going on."""
        return self._store is not None and self._store.check([self._key])

    def __exit__(self, kind, error, trace) -> None:
        if self._store is None or (error is not None and not isinstance(error, Exception)):
            return
        if error is not None:
            self._store.set(self._key, b"1")
        errors = [None] * count()
        dist.all_gather_object(errors, _portable(error))
        first = next((i for i, found in enumerate(errors) if found is not None), None)
        if first is not None and (error is None or first != rank()):
            raise errors[first] from error


def _portable(error: Exception | None) -> Exception | None:
    """The error, or one with its text where it cannot be handed to another process."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever its class does there
        return RuntimeError(f"{type(error).__name__}: {error}")


def gathered(value) -> list | None:
    """The values of all processes by rank, in the first one; None in the others."""
    if count() == 1:
        return [value]
    values = [None] * count() if rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


def from_first(work: Callable):
    """What a function returns, called in the first process alone; its error is raised by all."""
    with Together():
        value = work() if rank() == 0 else None
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs `segkern` with these arguments in several processes of this machine, and waits for
    them. What they print goes where this process prints; Ctrl-C goes on to them.

    Args:
        processes: how many. Each gets its share of the CPU's cores for threads, unless
            OMP_NUM_THREADS says how many.
        arguments: of the command line.

    Returns:
        the exit code of the process that failed first, or 0; 130 for Ctrl-C.

    Raises:
        RuntimeError: a process was ended by a signal.
    """
    from torch.distributed import run  # here, because it takes long to import
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    module = ["--module", "segkern", *arguments]
    given = run.parse_args(["--standalone", "--nproc-per-node", str(processes), *module])
    try:
        with _threads(processes), _silent("torch.distributed"):
            run.run(given)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        raise RuntimeError(f"process {number} of {processes} was ended by {name}") from error
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


@contextlib.contextmanager
def _threads(processes: int):
    """Shares the cores out, in the environment that processes inherit."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    os.environ[name] = str(max(1, cores // processes))
    try:
        yield
    finally:
        os.environ.pop(name, None)


@contextlib.contextmanager
def _silent(package: str):
    """Without a package's log: its processes say themselves what was wrong."""
    known = logging.root.manager.loggerDict
    loggers = [x for n, x in known.items() if n.startswith(package) and hasattr(x, "setLevel")]
    before = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for x, level in zip(loggers, before):
            x.setLevel(level)
