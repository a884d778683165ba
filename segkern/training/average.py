"""A moving average of the weights of a model in training; it often measures better than they do.

    average += (1 - d) (weights - average)  after every step t,  d = min(decay, (1 + t) / (10 + t))

The second bound lets the average follow in the first steps, where it would else remember the
start; with it a run of any length may have a decay near 1.
"""

from copy import deepcopy

import torch
from torch import nn

from .parallel import own_part


class Average:
    """The average as a model of its own, in eval mode.

    Args:
        model: whose weights; buffers, such as statistics of norms, are copied as they are.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.source, self.model = model, deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the weights after `step` steps in."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        own, new = ([own_part(p) for p in m.parameters()] for m in (self.model, self.source))
        torch._foreach_lerp_(own, new, share)
        for mine, theirs in zip(self.model.buffers(), self.source.buffers()):
            mine.copy_(theirs)
