"""A model that predicts what its input says, and scenes whose input says it."""

import numpy as np
import torch
from torch import nn

from segkern.evaluation.evaluate import evaluate
from segkern.ops.segment_map import TASKS
from segkern.structures.logits import QueryLogits

from .models import model_config

K, STUFF = 5, (3, 4)
BIG = 12.0


class Painted(nn.Module):
    """Predicts what its input's channels say: query of the pixel + 1, label, doubt."""

    def __init__(self, queries=8, labels=K):
        super().__init__()
        self.config = model_config(labels, divisor=8)
        self.queries, self.weight = queries, nn.Parameter(torch.zeros(()))

    def inputs(self, task, batch):
        return ()

    def predict(self, pixel_values):
        assert not self.training
        ids = torch.arange(1, self.queries + 1)[None, :, None, None]
        masks = pixel_values[:, :1] == ids
        label = (pixel_values[:, 1:2] * masks).amax((2, 3)).long()
        label[~masks.any(-1).any(-1)] = self.config.num_labels
        classes = nn.functional.one_hot(label, self.config.num_labels + 1)
        # later queries are less sure, so that AP has an order
        doubt = 0.2 * torch.arange(self.queries) + pixel_values[:, 2].amax((1, 2))[:, None]
        sure = 6 - doubt[..., None]
        return QueryLogits(classes * sure, (2.0 * masks - 1) * BIG)


class Scenes:
    """Samples whose input is the prediction that the model shall make."""

    classes = ("ant", "bee", "cat", "sky", "sea")
    stuff = STUFF
    things = (0, 1, 2)

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


def sample(true, t_labels, predicted, p_labels):
    """Maps [H, W] with 0 for void and i for the i-th segment, and the labels of the segments."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    t_labels, p_labels = np.asarray(t_labels, np.int64), np.asarray(p_labels, np.int64)
    semantic = np.append(255, t_labels)[true].astype(np.uint8)
    label = np.append(0, p_labels)[predicted]
    doubt = np.full(true.shape, predicted.mean() / 9)  # of each image another: no ties in AP
    pixels = np.stack((predicted, label, doubt)).astype(np.float32)
    masks = (true == np.arange(1, len(t_labels) + 1)[:, None, None]).astype(np.uint8)
    return {"pixel_values": pixels, "masks": masks, "labels": t_labels, "semantic": semantic}


def blocks(rng, n, size):
    """[H, W] map of ids 0 to n: cells around random centres."""
    centres = rng.random((n + 1, 2)) * size
    at = np.stack(np.meshgrid(*(np.arange(s) for s in size), indexing="ij"), -1)
    return ((at[:, :, None] - centres) ** 2).sum(-1).argmin(-1)


def random_scenes(count, seed=0, void=True):
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        n = int(rng.integers(1, 7))
        size = tuple(rng.integers(12, 25, 2))
        true = blocks(rng, n, size)
        labels = rng.integers(0, K, n)
        predicted = np.roll(true, rng.integers(0, 3, 2), (0, 1))
        p_labels = np.where(rng.random(n) < 0.7, labels, rng.integers(0, K, n))
        if void:
            predicted = np.where(predicted == rng.integers(0, n + 1), 0, predicted)
        else:
            true, predicted = true.clip(1), predicted.clip(1)
        out.append(sample(true, labels, predicted, p_labels))
    return Scenes(out)


def run(scenes, **options):
    overlap = {"overlap_threshold": 0.0} if "panoptic" in options.get("tasks", TASKS) else {}
    return evaluate(Painted(), scenes, progress=False, **overlap, **options)
