"""Batches and processes that make one step together: what they must agree on before it."""

from collections.abc import Sequence

import torch

from ..structures.labels import void_in
from ..structures.targets import Targets


def normalized(targets: Targets, num_queries: int | None = None) -> Targets:
    """`together` of one batch a process."""
    return together([targets], num_queries)[0]


def together(
    parts: Sequence[Targets], num_queries: int | None = None, group=None
) -> list[Targets]:
    """Targets whose normalizers are the mean numbers over batches and processes, of targets and of
    pixels that count, each in all at least 1. Of an image's targets no more count than there are
    queries, as the others are never matched.

    To be called by every process of the group, each with its part of the batch, before the step:
    the mean over batches and processes of their gradients is then that of the joined batch.
    Nothing in a loss waits for another process, so one alone may compute a loss at any time.

    Args:
        parts: of the step, of as many images each.
        num_queries: of the model; None, for a model without queries, counts all targets.
        group: of the processes; None for the default group.
    """
    found = [part.count for part in parts]
    if num_queries is not None:
        found = [count.clamp(max=num_queries) for count in found]
    counts = [sum(count.sum() for count in found)]
    pixels = parts[0].semantic is not None
    if pixels:
        counts.append(sum((part.semantic.int() != void_in(part.semantic)).sum() for part in parts))
    total, shares = torch.stack(counts).double(), len(parts)  # exact for any number of pixels
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total, group=group)
        shares *= torch.distributed.get_world_size(group)
    means = (total.clamp(min=1) / shares).float().unbind()
    agreed = {"normalizer": means[0]}
    if pixels:
        agreed["pixel_normalizer"] = means[-1]
    if num_queries is not None and shares > 1:  # one batch alone knows it without
        agreed["matched"] = (total[0] / shares).float()
    return [part._replace(**agreed) for part in parts]
