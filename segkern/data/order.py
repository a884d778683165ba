"""Which samples each training step takes."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor


class Order:
    """The samples of each training step, a function of seed and step alone.

    Every pass over the data is a new permutation; a batch may span two passes. Resuming at a step
    therefore needs no state. Serves as a DataLoader's batch_sampler.

    Args:
        length: samples of the data set, at least 1.
        batch_size: samples a step, of all ranks.
        seed: of the permutations.
        start, stop: steps to yield.
        passes: yield (sample, pass) for data sets that give another view in each pass.
        rank, ranks: of this process among those that share each batch, and their number; yielded
            is its part, which follows that of the rank before. Their parts are equal.

    Raises:
        ValueError: an empty data set, or a batch that ranks cannot share equally.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        passes: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ):
        if length < 1:
            raise ValueError("training: the data set is empty")
        if batch_size % ranks:
            raise ValueError(
                f"train: batch_size must be a multiple of the {ranks} processes that share the "
                f"images of a batch, got {batch_size}"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.stop, self.passes = start, stop, passes
        self.share = batch_size // ranks
        self.first = rank * self.share

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[int] | list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.first
            places = (divmod(i, self.length) for i in range(first, first + self.share))
            found = [
                (int(_permutation(self.length, self.seed, epoch)[i]), epoch) for epoch, i in places
            ]
            yield found if self.passes else [index for index, _ in found]


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(length, generator=generator)
