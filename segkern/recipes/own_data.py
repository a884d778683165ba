"""What recipes share for data of one's own: maps of classes for models that classify pixels,
objects for models that find them."""

from dataclasses import fields, replace
from pathlib import Path

from ..data import (
    Ade20kConfig,
    ClassMapsConfig,
    DataConfig,
    FolderConfig,
    ShardsConfig,
    ade20k_views,
    build_dataset,
    find_format,
)
from ..data.folder import class_names
from ..data.shard_files import has_index
from ..io.sources import is_url
from ..models import Config, open_model
from ..structures.logits import PixelLogits
from ..training.config import TrainConfig

_RATIOS = (0.5, 2.0)  # of a picture over that of its view, in training
SMALL = 256  # pixels of the short side, below which a model is for small images
_SMALL_RATIOS = (0.7, 1.4)  # of 64 pixels a tenth would show nothing


def start_of(
    recipe: str, kind: type, init: str | Path | None, preset: str | None
) -> Config | None:
    """The config of the model that a run starts from; None where it starts from none.

    Args:
        recipe: whose name begins messages.
        kind: class of the config.
        init: the model, or None.
        preset: that was asked for, which init leaves no room for.

    Raises:
        ValueError: there is both, or init is of another kind.
    """
    if init is None:
        return None
    if preset is not None:
        raise ValueError(
            f"{recipe}: preset must be left out where init gives the model, got {preset!r}"
        )
    config = open_model(init).config
    if not isinstance(config, kind):
        raise ValueError(f"{recipe}: init must be a {kind.kind}, got a {config.kind}")
    return config


def with_objects(recipe: str, root: str | Path, task: str | None) -> tuple[DataConfig, object]:
    """The config of a folder with objects or maps of classes, each class of which is a segment
    then, and its training split.

    Args:
        recipe: whose name begins messages.
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
        if isinstance(data, Ade20kConfig):
            data = replace(data, views=ade20k_views(task))
    if "masks" not in data.targets or task not in (None, data.task):
        raise ValueError(
            f"{recipe}: {root} must hold objects{f' for task {task}' if task else ''}, "
            f"got data of kind {data.kind}, {data.task}"
        )
    return data, build_dataset(data, "train")


def maps_of_classes(
    root: str | Path | None, layout: str, named: bool
) -> tuple[FolderConfig | ShardsConfig, list[str] | None]:
    """The config of maps of classes for models of pixels, and the names of the classes.

    Args:
        root: folder of the images, or of shards with maps of classes; None for the one to be set.
        layout: of a folder (`FolderConfig`); shards are looked for where it is "plain".
        named: the layout alone tells the names; else they are None without a root.

    Raises:
        ValueError: the shards have no maps of classes, or see `class_names`.
    """
    if root and layout == "plain" and (is_url(root) or has_index(Path(root))):
        data = find_format(root)[0]
        if data.task == "instance":
            raise ValueError(f"{root}: must hold maps of classes, got shards of the instance task")
        data = replace(data, task="semantic")
        return data, build_dataset(data, "train").classes
    data = FolderConfig(root or ".", layout)
    return data, class_names(data) if root or named else None


def small_views(data: DataConfig, size: tuple[int, int]) -> DataConfig:
    """The same with views for models of small images."""
    small = {"size": size, "ratios": _SMALL_RATIOS, "short_sides": ()}
    return replace(data, views=replace(data.views, **small))


def on_own_data(
    recipe: str,
    model: Config,
    root: str | Path,
    layout: str | None,
    init: str | Path | None,
    epochs: int,
    settings: dict,
) -> TrainConfig:
    """A run on a folder of one's own, for so many passes, at least 1,000 steps.

    Args:
        recipe: whose name begins messages, and is that of the run's folder.
        model: its labels are replaced by those of the data.
        root: folder of the data.
        layout: of a folder of maps of classes (`FolderConfig`); None finds the format.
        init: as `TrainConfig.init`.
        epochs: passes over the data.
        settings: further ones of `TrainConfig`, with its batch_size.

    Raises:
        ValueError: no data set is found, or it does not hold what the model trains on.
    """
    data = FolderConfig(root, layout) if layout else find_format(root)[0]
    pixels = model.logits is PixelLogits
    if not pixels and isinstance(data, FolderConfig):  # maps of classes: a segment each
        data = ClassMapsConfig(data.root, data.layout, data.seed, data.read)
    needs = "semantic" if pixels else "masks"
    if needs not in data.targets:
        raise ValueError(
            f"{recipe}: {root} must hold {'maps of classes' if pixels else 'objects'} for a model "
            f"with task_head {model.task_head!r}, got data of kind {data.kind}"
        )
    if hasattr(data, "views"):
        views = replace(data.views, size=model.image_size, ratios=_RATIOS, short_sides=())
        data = replace(data, views=views)
    pictures = build_dataset(data, "train")
    names = dict(enumerate(pictures.classes))
    labels = {"num_labels": len(names), "id2label": names}
    if not pixels:
        labels["stuff"] = tuple(pictures.stuff)
    steps = max(1000, epochs * len(pictures) // settings["batch_size"])
    return TrainConfig(
        output=Path("runs") / recipe,
        init=init,
        steps=steps,
        checkpoint_every=min(5000, steps // 10),
        evaluate_every=steps // 10,
        backbone_lr_factor=1.0,
        data=data,
        model=replace(model, **labels),
        **settings,
    )
