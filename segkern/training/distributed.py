"""Several processes that train one model: what they must agree on before a step."""

import torch

from ..structures.targets import Targets


def normalized(targets: Targets) -> Targets:
    """Targets whose `normalizer` is the mean number of targets over the processes, at least 1.

    To be called by every process of the group, each with its part of the batch, before the step:
    the mean over processes of their gradients is then that of the joined batch. Nothing in a loss
    waits for another process, so one alone may compute a loss at any time.
    """
    total = targets.count.sum().float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return targets._replace(normalizer=total.clamp(min=1))
