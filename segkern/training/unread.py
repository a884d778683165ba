"""Counts pictures that could not be read, to say at the end of each pass how many they were."""

from collections.abc import Sequence

from ..data.collate import Batch

_NAMED = 3  # reasons that are told


class Unread:
    """The count of a run, pass by pass.

    Args:
        images: of a pass.
        batch: images of a step, of all processes together.
        start: steps of the run before it begins here.
        most: share of a pass above which it is an error.
    """

    def __init__(self, images: int, batch: int, start: int = 0, most: float = 1.0):
        self.most = most
        self.images, self.batch, self.place = images, batch, start * batch % images
        self.seen, self.lost, self.reasons = 0, 0, []

    def __call__(self, parts: Sequence[Batch], last: bool = False) -> str | None:
        """Counts batches.

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
        ended = self.place >= self.images or last
        if not self.lost or not (ended or self.lost > self.most * self.images):
            self._end(ended)
            return None
        named = "; ".join(self.reasons) + ("; ..." if self.lost > len(self.reasons) else "")
        text = f"{self.lost} of {self.seen} pictures of the pass could not be read: {named}"
        if self.lost > self.most * self.seen:
            raise ValueError(f"{text}: more than {self.most:.0%}; checkpoints are kept")
        self._end(ended)
        return text

    def _end(self, ended: bool) -> None:
        if ended:
            self.place %= self.images
            self.seen, self.lost, self.reasons = 0, 0, []
