"""The processes of one run: which of them this is, what they agree on, and which of them speaks.

A launcher, such as torchrun or `segkern train --processes`, starts them with RANK, LOCAL_RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT. What they agree on goes over the CPU: no device waits.
"""

import contextlib
import hashlib
import os
import platform
import time
import uuid
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
_POLL = 0.02  # seconds
_HEAD_START = 0.5  # seconds by which the first process is heard where all of them fail
_LAST = 5.0  # and by which those are heard that fail by themselves
# of what gloo, NCCL and stores say where another has ended or does not answer: what else they say
# is this process's own fault, such as an address in use
_LOST = (
    "closed by peer",
    "closed by remote peer",
    "reset by peer",
    "Broken pipe",
    "likely closed",
    "imed out",
    "imeout",
    "remote process exit",
    "ncclRemoteError",
    "was aborted",
)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, or the one that is alone.

    Attributes:
        rank: of this process, from 0.
        count: of all, at least 1.
        local_rank: of this process among those of its machine.
        local_count: of those.
        group: what all agree over on the CPU; None where this process is alone.
        patient: the same, which waits for days.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
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
            ValueError: torch cannot use it, there are no kernels for it, there are more processes
                on this machine than GPUs, or it is one GPU of several that all would take.
        """
        device = usable_device(name)
        if self.count == 1 or device.type != "cuda":
            return device
        gpus = torch.cuda.device_count()
        if device.index is not None:
            if min(self.local_count, gpus) > 1:
                raise ValueError(
                    f"device must be cuda, without a number, where {self.local_count} processes "
                    f"of a machine take a GPU each, got {name!r}"
                )
            return device
        if self.local_rank >= gpus:
            raise ValueError(
                f"processes on a machine must be no more than its GPUs ({gpus}), got one with "
                f"LOCAL_RANK {self.local_rank}"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)


ALONE = Processes()


class _Known:
    """The group of all processes, and those of it as `of_group` found them."""

    world: "dist.ProcessGroup | None" = None
    processes = ALONE


def of_group() -> Processes:
    """The processes of torch.distributed's group; `ALONE` where there is none, or one of one.

    All call it together the first time; what it returns then is kept while the group is there.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    if _Known.world is not dist.group.WORLD:
        groups = [dist.new_group(backend="gloo", timeout=wait) for wait in (TIMEOUT, _PATIENCE)]
        rank, machines = dist.get_rank(), [""] * dist.get_world_size()
        dist.all_gather_object(machines, platform.node(), group=groups[0])
        local = os.environ.get("LOCAL_RANK") or machines[:rank].count(machines[rank])
        together = os.environ.get("LOCAL_WORLD_SIZE") or machines.count(machines[rank])
        found = Processes(rank, len(machines), int(local), int(together), *groups)
        _Known.world, _Known.processes = dist.group.WORLD, found
    return _Known.processes


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
    failed = True
    try:
        yield of_group()
        failed = False
    finally:
        # NCCL may wait in vain for processes that have failed; they end with it
        if own and not (failed and torch.cuda.is_available()):
            dist.destroy_process_group()
            _Known.world, _Known.processes = None, ALONE


def _join() -> None:
    """Makes the group of all processes; over NCCL for tensors on GPUs."""
    lacking = [name for name in _NEEDED if not os.environ.get(name)]
    if lacking:
        raise ValueError(
            f"WORLD_SIZE says {started()} processes, and {', '.join(lacking)} of their launcher "
            "must be set, too: start them with torchrun or --processes, or unset WORLD_SIZE"
        )
    store, rank, count = next(rendezvous("env://", timeout=TIMEOUT))
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        store = apart(store, rank, count)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    _Ends.store, _Ends.process = dist.PrefixStore(NAMES, store), os.getpid()


def apart(store: "dist.Store", rank: int, count: int) -> "dist.Store":
    """A part of a store that only those know who call this together. A group that torchrun starts
    again may find the store of the last one, with the addresses of its processes, and no count of
    restarts tells them apart: torchrun counts on each machine what failed there.

    Each leaves a word of its own; the first answers each word with the name of the part, also
    those left by the last group, until all have said that they heard it.

    Raises:
        RuntimeError: not all came in time.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"{NAMES}/came/{rank}", own)
        store.wait([f"{NAMES}/answer/{own}"], TIMEOUT)
        name = store.get(f"{NAMES}/answer/{own}").decode()
        store.set(f"{NAMES}/heard/{name}/{rank}", "yes")
        return dist.PrefixStore(name, store)
    missing, limit = set(range(1, count)), time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{NAMES}/came/{other}"]):
                word = store.get(f"{NAMES}/came/{other}").decode()
                store.set(f"{NAMES}/answer/{word}", own)
            if store.check([f"{NAMES}/heard/{own}/{other}"]):
                missing.remove(other)
        if time.monotonic() > limit:
            raise RuntimeError(
                f"the processes of the run must come within {TIMEOUT}: timed out waiting for "
                f"{', '.join(map(str, sorted(missing)))} of {count}"
            )
        time.sleep(_POLL)
    return dist.PrefixStore(own, store)


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
    told = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
    )
    return told and any(sign in text for sign in _LOST)


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
