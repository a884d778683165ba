"""Several processes that train one model: what they must agree on before a step."""

import torch

from ..structures.labels import void_in
from ..structures.targets import Targets


def normalized(targets: Targets, num_queries: int | None = None) -> Targets:
    """Targets whose normalizers are the mean numbers over the processes, of targets and of pixels
    that count, each at least 1. Of an image's targets no more count than there are queries, as
    the others are never matched; None counts all.

    To be called by every process of the group, each with its part of the batch, before the step:
    the mean over processes of their gradients is then that of the joined batch. Nothing in a loss
    waits for another process, so one alone may compute a loss at any time.
    """
    count = targets.count
    counts = [(count if num_queries is None else count.clamp(max=num_queries)).sum()]
    if targets.semantic is not None:
        counts.append((targets.semantic.int() != void_in(targets.semantic)).sum())
    total = torch.stack(counts).double()  # exact for any number of pixels
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    total = total.clamp(min=1).float()
    names = ("normalizer", "pixel_normalizer")
    return targets._replace(**dict(zip(names, total.unbind())))
