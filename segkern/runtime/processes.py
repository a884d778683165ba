"""The processes of one run: which of them this is, what they agree on, and which of them speaks.

A launcher, such as torchrun or `segkern train --processes`, starts them with RANK, LOCAL_RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT. What they agree on goes over the CPU: no device waits.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .device import usable_device

TIMEOUT = timedelta(minutes=10)  # after which a process that waits for another gives up
_PATIENCE = timedelta(days=7)  # where the first process has work of its own, such as an evaluation
NAMES = "segkern"  # before all names in the launcher's store
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_HEAD_START = 0.5  # seconds by which the first process is heard where all of them fail
_LAST = 5.0  # and by which those are heard that fail by themselves
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "imed out", "imeout", "NCCL")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, or the one that is alone.

    Attributes:
        rank: of this process, from 0.
        count: of all, at least 1.
        local_rank: of this process among those of its machine.
        group: what all agree over on the CPU; None where this process is alone.
        patient: the same, which waits for days.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    group: "dist.ProcessGroup | None" = None
    patient: "dist.ProcessGroup | None" = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and shows."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is true of one of them; called by all."""
        if self.count == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return bool(found)

    def sums(self, numbers: list[int]) -> list[int]:
        """Of the numbers of all; called by all."""
        if self.count == 1:
            return numbers
        found = torch.tensor(numbers)
        dist.all_reduce(found, group=self.group)
        return found.tolist()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Of the values of all, on any device; called by all."""
        if self.count == 1:
            return value
        found = value.cpu()
        dist.all_reduce(found, group=self.group)
        return found / self.count

    def from_first(self, value=None):
        """What the first has, however long it takes; called by all."""
        if self.count == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, 0, self.patient)
        return found[0]

    def device(self, name: str) -> torch.device:
        """The device of that name, of several GPUs this process's own.

        Raises:
            ValueError: torch cannot use it, there are no kernels for it, or there are more
                processes on this machine than GPUs.
        """
        device = usable_device(name)
        if self.count == 1 or device.type != "cuda" or device.index is not None:
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                "processes on a machine must be no more than its GPUs "
                f"({torch.cuda.device_count()}), got one with LOCAL_RANK {self.local_rank}"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)


ALONE = Processes()


def started() -> int:
    """How many processes the launcher has started, or 1."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal() or not int(text):
        raise ValueError(f"WORLD_SIZE must be a number of processes, got {text!r}")
    return int(text)


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes that were started together, which wait for each other here; a context.

    One that has joined already, here or by a group of its own, stays joined.

    Raises:
        ValueError: WORLD_SIZE says several, and the other variables of a launcher are missing.
        RuntimeError: not all came.
    """
    own = not (dist.is_available() and dist.is_initialized())
    if own and started() == 1:
        yield ALONE
        return
    if own:
        _join()
    rank, count = dist.get_rank(), dist.get_world_size()
    if count == 1:
        yield ALONE
        return
    local = int(os.environ.get("LOCAL_RANK") or rank % max(torch.cuda.device_count(), 1))
    groups = [dist.new_group(backend="gloo", timeout=wait) for wait in (TIMEOUT, _PATIENCE)]
    failed = True
    try:
        yield Processes(rank, count, local, *groups)
        failed = False
    finally:
        # NCCL may wait in vain for processes that have failed; they end with it
        if own and not (failed and torch.cuda.is_available()):
            dist.destroy_process_group()


def _join() -> None:
    """Makes the group of all processes; over NCCL for tensors on GPUs."""
    lacking = [name for name in _NEEDED if not os.environ.get(name)]
    if lacking:
        raise ValueError(
            f"WORLD_SIZE says {started()} processes, and {', '.join(lacking)} of their launcher "
            "must be set, too: start them with torchrun or --processes, or unset WORLD_SIZE"
        )
    store, rank, count = next(rendezvous("env://", timeout=TIMEOUT))
    if (again := os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0":
        # the store may be that of the last group, with the addresses of its processes
        store = dist.PrefixStore(f"start {again}", store)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    _Ends.store, _Ends.process = dist.PrefixStore(NAMES, store), os.getpid()


class _Ends:
    """Where processes that end write that they do; a loader's workers must leave it alone."""

    store: "dist.Store | None" = None
    process = 0


def _shared() -> "dist.Store | None":
    return _Ends.store if _Ends.process == os.getpid() else None


def said_before(text: str) -> bool:
    """Whether another process has said it; this one may say it where not."""
    store = _shared()
    if store is None:
        return False
    try:
        return store.add(hashlib.sha256(text.encode()).hexdigest(), 1) > 1
    except RuntimeError:  # the process that kept the store has ended
        return False


def lost_another(error: BaseException) -> bool:
    """Whether an error only says that another process has ended or does not answer."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and ("gloo" in text or "NCCL" in text)
        and any(sign in text for sign in _LOST)
    )


def code_before(code: int, error: BaseException | None = None) -> int | None:
    """The exit code of the process that failed first, where it was another; None where it is this
    one, which may say why.

    Args:
        code: this one's own.
        error: why it ends.
    """
    store = _shared()
    if store is None:
        return None
    lost = error is not None and lost_another(error)
    time.sleep(_LAST if lost else _HEAD_START if os.environ.get("RANK", "0") != "0" else 0)
    try:
        return claimed(store, code)
    except RuntimeError:  # the process that kept the store was the first
        return code


def claimed(store: "dist.Store", code: int) -> int | None:
    """As `code_before`, by a store of the run, without waiting."""
    if store.add("ended", 1) == 1:
        store.set("code", str(code))
        return None
    store.wait(["code"], timedelta(seconds=5))
    return int(store.get("code"))
