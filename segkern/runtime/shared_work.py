"""Work that the processes of a group share: what all of them gather in the first, and an error of
one that ends the work of all. They wait for the slowest; one that died is noticed at once."""

import ctypes
import itertools
import pickle
import signal
import sys
from collections.abc import Callable

import torch.distributed as dist

from .processes import Processes

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux' prctl
_stretches = itertools.count()


def end_with_launcher() -> None:
    """Lets this process end with the one that started it, where the system can (Linux): one that
    is killed cannot end the others."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)


class Together:
    """Work of which each process does its part: an error of one is raised by all, and nobody waits
    for one that failed. All enter, in the same order; one that is alone notices nothing.

        with Together(processes) as work:
            for part in mine:
                if work.failed():
                    break
                ...

    Args:
        processes: of `of_group`.
    """

    def __init__(self, processes: Processes):
        self.processes, self._store = processes, None
        if processes.count > 1:
            self._key = f"segkern/failed/{next(_stretches)}"
            self._store = dist.distributed_c10d._get_default_store()

    def __enter__(self):
        return self

    def failed(self) -> bool:
        """Whether another failed, so that there is no use in going on."""
        return self._store is not None and self._store.check([self._key])

    def __exit__(self, kind, error, trace) -> None:
        if self._store is None or (error is not None and not isinstance(error, Exception)):
            return
        if error is not None:
            self._store.set(self._key, b"1")
        errors = [None] * self.processes.count
        dist.all_gather_object(errors, _portable(error), self.processes.patient)
        first = next((i for i, found in enumerate(errors) if found is not None), None)
        if first is not None and (error is None or first != self.processes.rank):
            raise errors[first] from error


def _portable(error: Exception | None) -> Exception | None:
    """The error, or one with its text where it cannot be handed to another process."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever its class does there
        return RuntimeError(f"{type(error).__name__}: {error}")


def gathered(processes: Processes, value) -> list | None:
    """The values of all processes by rank, in the first one; None in the others."""
    if processes.count == 1:
        return [value]
    values = [None] * processes.count if processes.first else None
    dist.gather_object(value, values, 0, processes.patient)
    return values


def by_first(processes: Processes, work: Callable):
    """What a function returns, called in the first process alone; its error is raised by all."""
    with Together(processes):
        value = work() if processes.first else None
    return processes.from_first(value)
