"""Whether a file computes what its model does: both run, and every result compared.

Letters: B image, h w size of the picture as the model takes it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .graph import Graph, run

BOUND = 1e-3
Run = Callable[[np.ndarray], Sequence[np.ndarray]]  # pixels to the results, in their order


class Difference(NamedTuple):
    """Of one input.

    Attributes:
        shape: (B, C, h, w) of the input.
        largest: by name of a result the largest difference as a share of the result's largest
            magnitude, at least 1; of integers and masks the share of values that differ.
    """

    shape: tuple[int, ...]
    largest: dict[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:.1e}" for name, value in self.largest.items())
        return f"{list(self.shape)}: {parts}"


def compared(
    graph: Graph, opened: Run, inputs: Sequence[Tensor], bound: float, path: Path
) -> tuple[Difference, ...]:
    """The differences of a file to its model.

    Args:
        graph: what the file was made of.
        opened: runs the file.
        inputs: [B, C, h, w] each.
        bound: the most that any may be.
        path: of the file, for the message.

    Raises:
        ValueError: a result of another shape or dtype, or that differs by more than the bound.
    """
    found = []
    for pixels in inputs:
        want = run(graph, pixels)
        want = {name: value.numpy() for name, value in want.items()}
        have = map(np.asarray, opened(pixels.numpy()))
        have = dict(zip(want, have, strict=True))
        for name in want:
            _expect_shape(name, have[name], want[name], path)
        if graph.form.post == "instance":
            _order(have, want, bound)
        largest = {name: _difference(have[name], want[name]) for name in want}
        found.append(Difference(tuple(pixels.shape), largest))
        missed = {name: value for name, value in largest.items() if not value <= bound}  # or NaN
        for name, value in missed.items():
            raise ValueError(
                f"export: {path} must equal the model to {bound:g}, but {name} differs by "
                f"{value:.2g} for pixels {list(pixels.shape)}; nothing was written"
            )
    return tuple(found)


def _expect_shape(name: str, have: np.ndarray, want: np.ndarray, path: Path) -> None:
    if have.shape != want.shape or have.dtype != want.dtype:
        raise ValueError(
            f"export: {path} must give {name} of shape {list(want.shape)} {want.dtype}, got "
            f"{list(have.shape)} {have.dtype}; nothing was written"
        )


def _difference(have: np.ndarray, want: np.ndarray) -> float:
    if want.size == 0:
        return 0.0
    if want.dtype.kind != "f":
        return float((have != want).mean())
    return float(np.abs(have.astype(np.float64) - want).max() / max(1.0, np.abs(want).max()))


def _order(have: dict[str, np.ndarray], want: dict[str, np.ndarray], bound: float) -> None:
    """Brings rows [B, N] of masks that were found into the order of those that are wanted, where
    scores are so near that rounding decides. Of the last it decides which are there: they are
    taken as they should be."""
    for b, scores in enumerate(want["scores"]):
        rows, left = {k: v[b] for k, v in have.items()}, [*range(len(scores))]
        order = []
        for i, score in enumerate(scores):
            near = [j for j in left if abs(rows["scores"][j] - score) <= bound]
            alike = [j for j in near if rows["labels"][j] == want["labels"][b, i]] or left[:1]
            apart = [(rows["masks"][j] != want["masks"][b, i]).sum() for j in alike]
            order.append(alike[int(np.argmin(apart))])
            left.remove(order[-1])
        cut = (np.abs(scores - scores[-1]) <= bound) & (want["labels"][b, -1] >= 0)
        for name, found in rows.items():
            have[name] = have[name].copy()
            have[name][b] = found[order]
            have[name][b, cut] = want[name][b, cut]


def torch_run(module: torch.nn.Module) -> Run:
    """A module of torch as what `compared` takes."""

    def opened(pixels: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [t.numpy() for t in module(torch.from_numpy(pixels))]

    return opened
