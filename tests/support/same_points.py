"""The same random points on both sides of a comparison with transformers' criterion."""

import torch

from segkern.ops import random_points
from segkern.ops.point_sample import MATCHING


class SamePoints:
    """Stands in for a reference's torch.rand: gives it our points, in the order it asks.

    The reference treats the last prediction first, then the others; for each it matches image by
    image, then draws the candidates and the random rest of all matched pairs, image by image.

    Args:
        monkeypatch: of the test.
        module: of transformers, with the criterion.
        matcher: its class that assigns targets.
        seed, ids: of our points, and of the images.
        predictions: how many.
        points: of a mask.
    """

    def __init__(self, monkeypatch, module, matcher, seed, ids, predictions, points):
        self.seed, self.ids, self.points = seed, ids, points
        self.order = iter([predictions - 1, *range(predictions - 1)])
        self.matched, self.calls = None, 0
        match = matcher.forward

        def recorded(*args):
            self.calls, self.prediction = 0, next(self.order)
            self.matched = match(*args)
            return self.matched

        monkeypatch.setattr(matcher, "forward", recorded)
        monkeypatch.setattr(module.torch, "rand", self)

    def __call__(self, n, points, two, device=None):
        call, self.calls = self.calls, self.calls + 1
        if call < len(self.ids):
            slots = [(self.ids[call], self.prediction, MATCHING)]
        else:
            slots = [
                (self.ids[b], self.prediction, t)
                for b, (_, targets) in enumerate(self.matched)
                for t in targets.tolist()
            ]
        assert n == len(slots)
        slots = torch.tensor(slots, dtype=torch.int64).view(-1, 3)
        candidates = int(self.points * 3.0)
        if call <= len(self.ids):
            return random_points(self.seed, slots, points).double()
        return random_points(self.seed, slots, candidates + points)[:, candidates:].double()
