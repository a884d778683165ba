"""Micro-batches: one thread runs the model over pictures that may go together.

A picture waits until as many as a batch holds are there that share its model, task, options and
size, or until it has waited long enough; what came first goes first.
"""

import logging
import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from ...inference.segment import Input, find, size_in_model
from ...structures.segmentation import Segmentation
from ...structures.settings import Options, Views
from .models import Served
from .refused import Refused, full

logger = logging.getLogger("segkern.serve")
VIEWS = Views()


class Done(NamedTuple):
    """What became of a picture.

    Attributes:
        result: on its device.
        queued: seconds from its arrival to the start of its batch.
        ran: seconds that the batch took.
        together: pictures in the batch.
    """

    result: Segmentation
    queued: float
    ran: float
    together: int


@dataclass(eq=False)
class Job:
    """A picture that waits for the model.

    Attributes:
        served: the model that it came for.
        task, options: checked.
        picture: as the model takes it.
        future: of a `Done`.
        arrived: when it was put into the queue, on the clock of `time.monotonic`.
        key: equal for pictures that may go together.

    Raises:
        ValueError: the model cannot take a picture of that size.
    """

    served: Served
    task: str
    options: Options
    picture: Input
    future: Future = field(default_factory=Future)
    arrived: float = field(init=False)
    key: Hashable = field(init=False)

    def __post_init__(self):
        size = size_in_model(self.served.model, self.picture)
        self.key = self.served.generation, self.task, self.options, size


class Batches:
    """The queue and its thread.

    Args:
        batch: pictures that go together at most.
        wait: seconds that a picture waits for others while the model is idle.
        cuda_graphs: as of `segment`.
    """

    def __init__(self, batch: int, wait: float, cuda_graphs: bool = True):
        self.batch, self.wait, self.cuda_graphs = batch, wait, cuda_graphs
        self._waiting: list[Job] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="segkern-model", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Pictures that wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes pictures."""
        return self._thread.is_alive() and not self._closing

    def put(self, job: Job) -> Future:
        """Lets a picture wait, until its batch starts or it is given up.

        Raises:
            RuntimeError: the queue was closed.
        """
        with self._changed:
            if self._closing:
                raise RuntimeError("serve: the queue is closed")
            job.arrived = time.monotonic()
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def give_up(self, jobs: Sequence[Job]) -> None:
        """Cancels those that still wait, and holds their pictures no longer."""
        with self._changed:
            self._waiting = [job for job in self._waiting if job not in jobs]
        for job in jobs:
            job.future.cancel()

    def close(self) -> None:
        """Takes no more, and returns when all that waits is done."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next():
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if running:
                self._answer(running)
            del jobs, running  # pictures and results, while the thread waits for the next

    def _next(self) -> list[Job]:
        """The next batch; nothing when the queue is closed and empty."""
        with self._changed:
            while True:
                if not self._waiting and self._closing:
                    return []
                due, now = None, time.monotonic()
                groups: dict[Hashable, list[Job]] = {}
                for job in self._waiting:
                    groups.setdefault(job.key, []).append(job)
                for group in groups.values():  # in the order of their first
                    until = group[0].arrived + self.wait
                    if len(group) >= self.batch or until <= now or self._closing:
                        taken = group[: self.batch]
                        self._waiting = [job for job in self._waiting if job not in taken]
                        return taken
                    due = until if due is None else min(due, until)
                self._changed.wait(None if due is None else due - now)

    def _answer(self, jobs: list[Job]) -> None:
        """Runs pictures together; where that fails, each by itself, so that one which cannot be
        done fails alone."""
        start = time.monotonic()
        try:
            found = self._found(jobs)
        except Exception as error:
            if len(jobs) > 1:
                logger.warning("event=batch_failed pictures=%d error=%r", len(jobs), str(error))
                for job in jobs:
                    self._answer([job])
                return
            jobs[0].future.set_exception(error)
            return
        ran = time.monotonic() - start
        for job, result in zip(jobs, found, strict=True):
            job.future.set_result(Done(result, start - job.arrived, ran, len(jobs)))

    def _found(self, jobs: list[Job]) -> list[Segmentation]:
        model, (task, options) = jobs[0].served.model, (jobs[0].task, jobs[0].options)
        found: list = [None] * len(jobs)
        settings = VIEWS, model.config.labels.stuff, len(jobs), self.cuda_graphs
        for i, results in find(model, [j.picture for j in jobs], {task: options}, *settings):
            found[i] = results[task]
        for result in found:
            result.names = model.config.labels.names
        return found


class Places:
    """Room for so many pictures and pixels at once.

    Args:
        pictures, pixels: the most.
    """

    def __init__(self, pictures: int, pixels: int):
        self.most = {"pictures": pictures, "pixels": pixels}
        self.taken = dict.fromkeys(self.most, 0)
        self._lock = threading.Lock()

    @contextmanager
    def take(self, what: str, count: int):
        """Room for "pictures" or "pixels", until the block ends.

        Raises:
            Refused: there is none now, or there never is for so many.
        """
        if count > self.most[what]:
            raise Refused(
                413, f"a request must have at most {self.most[what]} {what}, got {count}"
            )
        with self._lock:
            if self.taken[what] + count > self.most[what]:
                raise full(what, self.taken[what])
            self.taken[what] += count
        try:
            yield
        finally:
            with self._lock:
                self.taken[what] -= count
