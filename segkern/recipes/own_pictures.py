"""What recipes for one's own pictures with objects share: the data, the model to start from."""

from dataclasses import fields, replace
from pathlib import Path

from ..data import ClassMapsConfig, DataConfig, FolderConfig, build_dataset, find_format
from ..models import ModelConfig, open_model

_SMALL_RATIOS = (0.7, 1.4)  # of 64 pixels a tenth would show nothing


def with_objects(recipe: str, root: str | Path, task: str | None) -> tuple[DataConfig, object]:
    """The config of a folder with objects or maps of classes, each class of which is a segment
    then, and its training split.

    Args:
        recipe: for the message.
        root: folder of a data set, in one of the formats that `data.find_format` knows.
        task: where the folder holds several; None takes what it holds, panoptic first.

    Raises:
        ValueError: no data set is found, or it holds no objects or nothing for the task.
    """
    data, _ = find_format(root)
    if isinstance(data, FolderConfig):  # maps of classes: a segment each
        data = ClassMapsConfig(data.root, data.layout, data.seed, data.read)
    if task is not None and "task" in {field.name for field in fields(data)}:
        data = replace(data, task=task)
    if "masks" not in data.targets or task not in (None, data.task):
        raise ValueError(
            f"{recipe}: {root} must hold objects{f' for task {task}' if task else ''}, "
            f"got data of kind {data.kind}, {data.task}"
        )
    return data, build_dataset(data, "train")


def small_views(data: DataConfig, size: tuple[int, int]) -> DataConfig:
    """The same with views for models of small images."""
    small = {"size": size, "ratios": _SMALL_RATIOS, "short_sides": ()}
    return replace(data, views=replace(data.views, **small))


def config_of(kind: str, init: str | Path) -> ModelConfig:
    """The config of the model to start from.

    Raises:
        ValueError: of another kind.
    """
    config = open_model(init).config
    if config.kind != kind:
        raise ValueError(f"{kind}: init must be a {kind}, got a {config.kind}")
    return config
