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
        have = opened(pixels.numpy())
        largest = {
            name: _difference(name, np.asarray(a), b.numpy(), path)
            for (name, b), a in zip(want.items(), have, strict=True)
        }
        found.append(Difference(tuple(pixels.shape), largest))
        worst = max(largest, key=largest.get)
        if not largest[worst] <= bound:
            raise ValueError(
                f"export: {path} must equal the model to {bound:g}, but {worst} differs by "
                f"{largest[worst]:.2g} for pixels {list(pixels.shape)}; nothing was written"
            )
    return tuple(found)


def _difference(name: str, have: np.ndarray, want: np.ndarray, path: Path) -> float:
    if have.shape != want.shape:
        raise ValueError(
            f"export: {path} must give {name} of shape {list(want.shape)}, got "
            f"{list(have.shape)}; nothing was written"
        )
    if want.size == 0:
        return 0.0
    if want.dtype.kind != "f":
        return float((have != want).mean())
    return float(np.abs(have.astype(np.float64) - want).max() / max(1.0, np.abs(want).max()))


def torch_run(module: torch.nn.Module) -> Run:
    """A module of torch as what `compared` takes."""

    def opened(pixels: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [t.numpy() for t in module(torch.from_numpy(pixels))]

    return opened
