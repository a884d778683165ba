"""What a run is fed: data sets that fit its model, and their batches in the order of the steps."""

import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch.utils.data import DataLoader

from ..data import Folder, JointTasks, Order, build_dataset, collate
from ..evaluation.evaluate import check_dataset, some_of
from ..evaluation.shares import check_loader
from ..runtime.interrupt import leave_interrupts_to_parent
from ..runtime.processes import ALONE, Processes
from .config import TrainConfig


def data_sets(
    config: TrainConfig, dataset, val_dataset, progress: bool, processes: Processes = ALONE
) -> tuple:
    """The data sets for training and, where there are evaluations, for those, else None; of a
    folder the first process reads every map.

    Args:
        config: of the run.
        dataset, val_dataset: as `train` takes them.
        progress: show a bar.
        processes: of the run.

    Raises:
        ValueError: their classes are not the model's, one is missing, a map is bad, or a loader
            has batches that several processes cannot share.
    """
    data = build_dataset(config.data, "train", config.model) if dataset is None else dataset
    held_out = val_dataset
    if val_dataset is not None and not config.evaluate_every:
        raise ValueError("train: evaluate_every must be at least 1 where val_dataset is given")
    if config.evaluate_every and held_out is None:
        if dataset is not None:
            raise ValueError(
                "train: val_dataset must be given where dataset is and evaluate_every is not 0, "
                "got None"
            )
        held_out = build_dataset(config.data, "val")
    for name, part in (("dataset", data), ("val_dataset", held_out)):
        if part is None:
            continue
        if name == "val_dataset":
            if isinstance(part, DataLoader):
                if processes.count > 1:
                    check_loader(part, processes.count, "train: val_dataset")
                part = part.dataset
            check_dataset(part, config.model, (config.task,), "train: val_dataset")
        elif (classes := getattr(part, "classes", None)) is None:
            raise ValueError("train: dataset must have `classes`, the names of its labels")
        elif len(classes) != config.model.num_labels:
            raise ValueError(
                f"train: model.num_labels must be {len(classes)}, the classes of the data, "
                f"got {config.model.num_labels}"
            )
        reads = processes.first and isinstance(part, Folder)
        if reads and (absent := part.check(progress)):
            split = "training" if name == "dataset" else "val"
            warnings.warn(
                f"train: {len(absent)} of {len(part.classes)} classes occur in no map of the "
                f"{split} split (255 or 65535 stands for no class): {some_of(absent)}",
                stacklevel=4,  # the caller of train
            )
    if getattr(config.model, "joint_tasks", False):
        stuff = getattr(data, "stuff", config.model.labels.stuff)
        data = JointTasks(data, stuff, config.seed, config.task_shares)
    return data, held_out


def batches(data, config: TrainConfig, start: int, processes: Processes = ALONE) -> Iterator:
    """This process's parts of the batches from step `start` to the last; those of a step follow
    each other."""
    passes = getattr(data, "passes", False)
    first, last = start * config.accumulate, config.steps * config.accumulate
    shuffled = getattr(data, "shuffled", None)
    own = processes.rank, processes.count
    order = Order(len(data), config.batch_size, config.seed, first, last, passes, *own, shuffled)
    pack = partial(
        collate,
        num_labels=config.model.num_labels,
        divisor=config.model.input.divisor,
        void=config.void,
    )
    loader = DataLoader(
        data,
        batch_sampler=order,
        collate_fn=pack,
        num_workers=config.workers,
        worker_init_fn=leave_interrupts_to_parent,
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    return iter(loader)
