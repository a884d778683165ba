"""The data on which commands measure a model before and after: as `segkern evaluate` finds it."""

from typing import NamedTuple

from ..data import Digits, Folder, Pictures, Shards, Streets, build_dataset, find_format
from ..models import SegmentationModel
from ..recipes import DIGITS_THRESHOLD
from ..recipes.evaluate_run import data_of_run, source_of
from ..structures.settings import Options

_SCENES = 100


class Data(NamedTuple):
    """What a model is measured on.

    Attributes:
        source: the data set.
        title: of it.
        tasks: what the model can do on it.
        limit: images, None for all.
        options: thresholds.
    """

    source: object
    title: str
    tasks: tuple[str, ...]
    limit: int | None
    options: Options


def data_for(
    name: str, opened: SegmentationModel, data: str | None, limit: int | None, **given
) -> Data:
    """The folder that is given, what the run trained on, or scenes of digits.

    Args:
        name: of the model.
        opened: the model.
        data: folder of pictures or address of shards; None where none is given.
        limit: the first so many images; None for all, or 100 scenes.
        given: settings of scenes, such as their split.

    Raises:
        ValueError: see `recipes.evaluate_run.source_of`.
    """
    source, title = source_of(name, opened, data, None, None, given)
    scenes = isinstance(source, (Digits, Streets))
    tasks, threshold = tasks_on(opened, source), None
    if isinstance(source, Digits) and "panoptic" in tasks:
        threshold = DIGITS_THRESHOLD
    limit = _SCENES if limit is None and scenes else limit
    return Data(source, title, tasks, limit, Options(threshold))


def tasks_on(opened: SegmentationModel, source) -> tuple[str, ...]:
    """Of what a model can do, that for which a data set has the truth."""
    if isinstance(source, Folder):
        return ("semantic",)
    if isinstance(source, (Pictures, Shards)) and not source.semantic:
        return ("instance",)
    return opened.config.tasks


def training_data(name: str, data: str | None, source):
    """The training split of what a model is measured on, whole images; `source` itself where there
    is no such split.

    Args:
        name: of the model.
        data: as `data_for` takes it.
        source: what `data_for` found.
    """
    settings = find_format(data)[0] if data is not None else data_of_run(name, False)
    settings = settings or getattr(source, "config", None)
    return source if settings is None else build_dataset(settings, "train")
