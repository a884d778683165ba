"""The model that is served, and how another takes its place while requests run."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ...inference.segment import segment
from ...models.protocol import SegmentationModel

_SIDES = 120, 160  # of the picture that proves a model, pixels

logger = logging.getLogger("segkern.serve")


@dataclass(frozen=True, eq=False)
class Served:
    """A model that takes requests.

    Attributes:
        model: in eval mode, on its device.
        generation: 1 for the first, and one more for each that followed.
        since: when it was opened, seconds since 1970.
    """

    model: SegmentationModel
    generation: int
    since: float = field(default_factory=time.time)


class Models:
    """Holds the model that new requests get; those that came before keep theirs.

    Args:
        opened: opens the model anew.

    Attributes:
        current: None until there is one.
        stale: set where a reload was asked for while the first was opened, before an application
            takes care of it.
    """

    def __init__(self, opened: Callable[[], SegmentationModel]):
        self._opened, self._lock = opened, threading.Lock()
        self.current: Served | None = None
        self.stale = False

    def load(self) -> Served:
        """Opens the model and puts it in place of the last, once it has segmented a picture.

        One at a time; a second call waits for the first. Where it fails, the last stays.

        Raises:
            whatever opening and running a model raises.
        """
        with self._lock:
            start, self.stale = time.perf_counter(), False
            model = self._opened()
            prove(model)
            generation = self.current.generation + 1 if self.current else 1
            self.current = Served(model, generation)
            logger.info(
                "event=model generation=%d kind=%s seconds=%.1f",
                *(generation, model.config.kind, time.perf_counter() - start),
            )
            return self.current


def prove(model: SegmentationModel) -> None:
    """Segments a grey picture in every task of the model, which also imports what the first
    picture needs.

    Raises:
        ValueError: it gives no finite logits, or whatever else it raises.
    """
    grey = torch.full((model.config.input.channels, *_SIDES), 128, dtype=torch.uint8)
    for task in model.config.tasks:
        segment(model, grey, task, cuda_graphs=False).to_json()
