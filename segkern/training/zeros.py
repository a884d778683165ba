"""Weights that pruning made 0 stay 0 while a model trains."""

import torch
from torch import nn

from ..models.smaller import weights_of_layers
from ..runtime.processes import ALONE, Processes
from .parallel import own_part


class Zeros:
    """The zeros in the weights of linear layers and convolutions, by a mask each.

    Args:
        model: with its weights as they are at the start, whole or in parts; of the sensitive
            parts, which pruning leaves alone, no zeros are kept.
        processes: that train it together; all call this.

    Raises:
        ValueError: no such weight is 0 in any of them.
    """

    def __init__(self, model: nn.Module, processes: Processes = ALONE):
        weights = [w for w in weights_of_layers(model).values() if w.requires_grad]
        masks = [own_part(weight.detach()) == 0 for weight in weights]
        self.parts = [(weight, mask) for weight, mask in zip(weights, masks) if mask.any()]
        if not processes.any(bool(self.parts)):
            raise ValueError(
                "train: keep_zeros must be False for a model that starts without weights that are "
                "0, got True"
            )

    @torch.no_grad()
    def __call__(self) -> None:
        """Makes them 0 again, after a step of the optimizer."""
        for weight, mask in self.parts:
            own_part(weight).masked_fill_(mask, 0)
