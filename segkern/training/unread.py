"""Counts pictures that could not be read, to say at the end of each pass how many they were."""

from collections.abc import Sequence

import torch.distributed as dist

from ..data.collate import Batch
from ..runtime.processes import ALONE, Processes

_NAMED = 3  # reasons that are told


class Unread:
    """The count of a run, pass by pass.

    Args:
        images: of a pass.
        batch: images of a step, of all processes together.
        start: steps of the run before it begins here.
        most: share of a pass above which it is an error.
        processes: that share each batch.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        start: int = 0,
        most: float = 1.0,
        processes: Processes = ALONE,
    ):
        self.most, self.processes = most, processes
        self.images, self.batch, self.place = images, batch, start * batch % images
        self.seen, self.lost, self.reasons = 0, 0, []

    def __call__(self, parts: Sequence[Batch], last: bool = False) -> str | None:
        """Counts batches; called by all processes.

        Args:
            parts: batches of a step, of this process.
            last: no more come.

        Returns:
            at the end of a pass a line that says what was lost, if anything was.

        Raises:
            ValueError: more of a pass than may be could not be read.
        """
        self.place += self.batch
        for part in parts:
            self.seen += len(part.targets.count)
            self.lost += len(part.unread)
            self.reasons = list(dict.fromkeys([*self.reasons, *part.unread]))[:_NAMED]
        if self.place >= self.images or last:
            seen, lost, reasons = self._of_all()
            self.place %= self.images
            self.seen, self.lost, self.reasons = 0, 0, []
        elif self.lost > self.most * self.images:  # however the pass would go on
            seen, lost, reasons = self.seen, self.lost, self.reasons
        else:
            return None
        if not lost:
            return None
        named = "; ".join(reasons) + ("; ..." if lost > len(reasons) else "")
        text = f"{lost} of {seen} pictures of the pass could not be read: {named}"
        if lost > self.most * seen:
            raise ValueError(f"{text}: more than {self.most:.0%}; checkpoints are kept")
        return text

    def _of_all(self) -> tuple[int, int, list[str]]:
        """Pictures seen and lost by all processes, and some reasons."""
        seen, lost = self.processes.sums([self.seen, self.lost])
        if self.processes.count == 1 or not lost:
            return seen, lost, self.reasons
        parts = [None] * self.processes.count
        dist.all_gather_object(parts, self.reasons, self.processes.group)
        return seen, lost, list(dict.fromkeys(x for part in parts for x in part))[:_NAMED]
