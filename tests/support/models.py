"""Models that tests make up, and their settings."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from segkern.structures.labels import Labels
from segkern.structures.logits import QueryLogits
from segkern.structures.settings import InputConfig


def model_config(num_labels=2, names=None, stuff=(), logits=QueryLogits, **settings):
    """A `ModelConfig`; settings are those of `InputConfig`, by default of images kept as they
    are."""
    settings = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)} | settings
    return SimpleNamespace(
        kind="made up",
        tasks=("panoptic", "instance", "semantic") if logits is QueryLogits else ("semantic",),
        logits=logits,
        num_labels=num_labels,
        backbone_pretrained=False,
        labels=Labels(names, tuple(stuff)),
        input=InputConfig(**settings),
    )


BIG = 12.0


class Squares(nn.Module):
    """Finds the bright part of the picture (label 1) and the rest (label 0); keeps its input."""

    def __init__(self, **settings):
        super().__init__()
        names = {0: "ground", 1: "square"}
        self.config = model_config(names=names, stuff=(0,), divisor=16, **settings)
        self.weight = nn.Parameter(torch.ones(()))
        self.inner = nn.BatchNorm2d(3)
        self.seen = []

    def inputs(self, task, batch):
        return ()

    def predict(self, pixel_values):
        assert not self.training
        assert not self.inner.training
        assert not torch.is_grad_enabled()
        self.seen.append(pixel_values)
        bright = self.weight * pixel_values.mean(1) * BIG
        masks = torch.stack((-bright, bright), 1)[..., ::2, ::2]
        classes = torch.full((len(masks), 2, 3), -BIG)
        classes[:, 0, 0] = classes[:, 1, 1] = BIG
        return QueryLogits(classes, masks)


def half_bright(h=40, w=60):
    image = np.zeros((h, w, 3), np.uint8)
    image[:, : w // 2] = 255
    return image
