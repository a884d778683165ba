"""Counts the objects that no query of a model can match, to say once how many a data set has."""

from collections.abc import Sequence

from ..data.collate import Batch
from ..runtime.processes import ALONE, Processes


class Unmatched:
    """The count over the first pass of a run.

    Args:
        queries: of the model, each of which finds one object; None where it has none.
        images: of the pass.
        processes: that share it.
    """

    def __init__(self, queries: int | None, images: int, processes: Processes = ALONE):
        self.queries, self.left, self.processes = queries, images, processes
        self.objects = self.lost = self.images = 0

    def __call__(self, parts: Sequence[Batch], last: bool = False) -> str | None:
        """Counts batches on the CPU, in the first pass alone; called by all processes.

        Args:
            parts: batches of a step.
            last: no more come.

        Returns:
            at the end of the pass a line that says what is lost, if anything is.
        """
        if self.queries is None or self.left <= 0:
            return None
        for part in parts:
            count = part.targets.count
            over = (count - self.queries).clamp(min=0)
            self.left -= len(count) * self.processes.count
            self.objects += int(count.sum())
            self.lost += int(over.sum())
            self.images += int((over > 0).sum())
        if self.left > 0 and not last:
            return None
        lost, objects, images = self.processes.sums([self.lost, self.objects, self.images])
        if not lost:
            return None
        return (
            f"{lost} of {objects} objects cannot be matched: {images} images have "
            f"more than the {self.queries} queries of the model (--model.num-queries)"
        )
