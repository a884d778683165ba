"""Samples for models that learn the three tasks together: each time that of a task by chance.

    panoptic: all segments      instance: those of things      semantic: one of each class

Source: OneFormer (Jain et al., CVPR 2023), section 3.1: all targets come from those of panoptic
segmentation, and the task is drawn anew for a sample each time.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..structures.targets import TASKS
from .sample import IdMaps, Sample, generator_of

EVEN = (1.0,) * len(TASKS)  # shares of the tasks
_STREAM = 7  # of the draws, apart from that of the views


class JointTasks:
    """A data set whose samples are those of another for a task that is drawn by seed, pass and
    sample alone.

    Args:
        dataset: with segments of things, and of stuff where there is any.
        stuff: labels without instances.
        seed: of the draws.
        shares: how often each task of `TASKS` is drawn, in proportion; 0 for never.

    Attributes:
        classes: of the data set.
        passes: samples differ from pass to pass.
        shuffled, most_unread: of the data set, where it has them.
    """

    passes = True

    def __init__(self, dataset, stuff: Sequence[int], seed: int, shares: Sequence[float] = EVEN):
        self.dataset, self.stuff, self.seed = dataset, tuple(stuff), seed
        self.shares = torch.tensor(shares, dtype=torch.float64)
        self.classes = dataset.classes
        self.shuffled = getattr(dataset, "shuffled", None)
        self.most_unread = getattr(dataset, "most_unread", 1.0)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        return self._drawn(self.dataset[self._inner(place)], place)

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[Sample]:
        inner = [self._inner(place) for place in places]
        if hasattr(self.dataset, "__getitems__"):
            samples = self.dataset.__getitems__(inner)
        else:
            samples = [self.dataset[place] for place in inner]
        return [self._drawn(sample, place) for sample, place in zip(samples, places)]

    def _inner(self, place: tuple[int, int]) -> int | tuple[int, int]:
        return place if getattr(self.dataset, "passes", False) else place[0]

    def _drawn(self, sample: Sample, place: tuple[int, int]) -> Sample:
        index, epoch = place
        generator = generator_of(self.seed + _STREAM, epoch, index)
        task = int(torch.multinomial(self.shares, 1, generator=generator))
        return of_task(sample, TASKS[task], self.stuff)


def of_task(sample: Sample, task: str, stuff: Sequence[int]) -> Sample:
    """A panoptic sample as one of a task, which it then names.

    Args:
        sample: with masks, labels and, if any, crowd.
        task: one of `TASKS`.
        stuff: labels without instances.
    """
    labels = np.asarray(sample["labels"], np.int64)  # twice a label must fit, too
    crowd = np.asarray(sample.get("crowd", np.zeros(len(labels))), bool)
    changed = {"task": TASKS.index(task)}
    if task == "instance":
        things = ~np.isin(labels, stuff)
        changed |= {
            "masks": _chosen(sample["masks"], things),
            "labels": labels[things],
            "crowd": crowd[things],
        }
    elif task == "semantic" and len(labels):
        # crowds stay apart: they are left out, and not part of a class that others show
        known, group = np.unique(2 * labels + crowd, return_inverse=True)
        changed |= {
            "masks": _merged(sample["masks"], group),
            "labels": known // 2,
            "crowd": known % 2 > 0,
        }
    return Sample(**(sample | changed))


def _chosen(masks: np.ndarray | Tensor | IdMaps, keep: np.ndarray):
    if isinstance(masks, IdMaps):
        return masks.chosen(keep)
    return masks[torch.from_numpy(keep) if isinstance(masks, Tensor) else keep]


def _merged(masks: np.ndarray | Tensor | IdMaps, group: np.ndarray):
    if isinstance(masks, IdMaps):
        return masks.merged(group)
    masks = np.asarray(masks)
    groups = range(int(group.max()) + 1)
    return np.stack([masks[group == g].any(0) for g in groups]).astype(np.uint8)
