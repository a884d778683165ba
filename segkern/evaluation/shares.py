"""A data set's batches, which the processes of a group share, and what they counted put together.

The batches are those of one process, and each is measured whole by one of them: so every sample is
measured once, in the company that it has there, and the figures are the same to the last bit.
"""

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ..runtime.processes import Processes
from ..runtime.shared_work import by_first, gathered


class Shares:
    """The batches of this process: those whose number leaves its rank when divided by the number
    of processes.

    Args:
        processes: of the group.
        dataset: samples by index, or a DataLoader over one that yields lists of samples.
        total: samples to measure, the first ones.
        batch_size, num_workers: for a data set.

    Raises:
        ValueError: a loader whose batches cannot be shared.
    """

    def __init__(
        self, processes: Processes, dataset, total: int, batch_size: int, num_workers: int
    ):
        if isinstance(dataset, DataLoader):
            check_loader(dataset, processes.count)
            source, num_workers = dataset.dataset, dataset.num_workers
            # each process might shuffle in an order of its own
            batches = by_first(processes, lambda: [list(b) for b in dataset.batch_sampler])
            collate, start = dataset.collate_fn, dataset.worker_init_fn
        else:
            source, collate, start = dataset, as_list, None
            batches = [range(i, i + batch_size) for i in range(0, total, batch_size)]
        places = [0, *accumulate(map(len, batches))]
        batches = [
            batch[: total - place] for batch, place in zip(batches, places) if place < total
        ]
        self.turns = range(processes.rank, len(batches), processes.count)
        self.places = [places[turn] for turn in self.turns]
        mine = [batches[turn] for turn in self.turns]
        self.samples = sum(map(len, mine))
        self.loader = DataLoader(
            source,
            batch_sampler=mine,
            num_workers=num_workers,
            collate_fn=collate,
            worker_init_fn=start,
        )

    def __iter__(self) -> Iterator[tuple[int, int, list[dict]]]:
        """Number of a batch, place of its first sample, and its samples."""
        return zip(self.turns, self.places, self.loader)


def as_list(samples: list[dict]) -> list[dict]:
    """A batch as its samples."""
    return samples


def check_loader(loader: DataLoader, count: int, name: str = "evaluate: dataset") -> None:
    """Raises ValueError where processes cannot share the batches of a loader.

    Args:
        loader: of the caller.
        count: of the processes, at least 2.
        name: of the argument, which begins the message.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise ValueError(
            f"{name} must be samples by index, or a DataLoader over such in batches, "
            f"where {count} processes share them, got a DataLoader over a "
            f"{type(loader.dataset).__name__} (batch_size {loader.batch_size})"
        )
    samplers = loader.sampler, getattr(loader.batch_sampler, "sampler", None)
    if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
        raise ValueError(
            f"{name} must be a DataLoader without DistributedSampler, which repeats "
            "samples: the batches are shared out here"
        )


def put_together(
    processes: Processes, meters: dict, turns: list[int], worst: list
) -> tuple[list[int], list]:
    """Puts what all processes counted into the first one's meters.

    Args:
        processes: of the group.
        meters: of each task; they name in `counted` what adds up, and in `listed` the lists with
            an entry an image.
        turns: of each image that was counted, in that order, the number of its batch.
        worst: entries of this process.

    Returns:
        turns and entries of all processes, in the first one.
    """
    counts = {
        task: {name: getattr(meter, name) for name in (*meter.counted, *meter.listed)}
        for task, meter in meters.items()
    }
    parts = gathered(processes, (counts, turns, worst))
    if parts is None:
        return turns, worst
    turns = [turn for _, turns, _ in parts for turn in turns]
    order = np.argsort(turns, kind="stable")
    for task, meter in meters.items():
        for name in meter.counted:
            setattr(meter, name, sum(counts[task][name] for counts, *_ in parts))
        for name in meter.listed:
            entries = [one for counts, *_ in parts for one in counts[task][name]]
            setattr(meter, name, [entries[i] for i in order.tolist()])
    return turns, [entry for *_, entries in parts for entry in entries]
