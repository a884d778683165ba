"""What is known of a run that is evaluated: its folder, the data it trained on, its report."""

from dataclasses import asdict, replace
from pathlib import Path

from ..data import (
    DataConfig,
    DigitsConfig,
    Folder,
    FolderConfig,
    StreetsConfig,
    build_dataset,
    find_format,
)
from ..evaluation.page import write_page
from ..models import SegmentationModel
from ..structures.settings import Options, Views
from ..training import checkpoint
from ..training.log import FILE as LOG
from ..training.state import stored_config
from ..training.validation import BEST


def data_of_run(name: str, digits: bool) -> DataConfig | None:
    """The data set that a run was trained on; None where the name is not that of a run.

    Args:
        name: of a model.
        digits: whether options say that it is to be measured on scenes of digits.

    Raises:
        ValueError: the run trained on a data set that its settings do not describe, or that is
            not here.
    """
    folder = run_folder(name)
    if folder is None:
        return None
    state = checkpoint.settings(folder)
    config = stored_config(folder, state)
    if state.get("own_data"):
        if digits:
            return None
        raise ValueError(
            f"evaluate: {name} was trained on a data set that its settings do not describe; name "
            "one with --data, or call segkern.evaluate(model, dataset)"
        )
    if isinstance(config.data, FolderConfig) and not config.data.root.is_dir():
        raise ValueError(
            f"evaluate: {config.data.root}, the data of {name}, is no folder here: give --data"
        )
    return config.data


def source_of(
    name: str,
    opened: SegmentationModel,
    data: str | Path | None,
    layout: str | None,
    max_pixels: int | None,
    given: dict,
) -> tuple:
    """What a model is measured on, and its title: the folder that is given, what the run trained
    on, or scenes of digits.

    Args:
        name: of the model.
        opened: the model.
        data, layout: a folder of pictures or an address of shards; None where none is given.
        max_pixels: that a picture in it may have.
        given: settings of scenes, and their split.

    Raises:
        ValueError: settings of a folder for scenes or the other way round, or see `data_of_run`.
    """
    if layout is not None and data is None:
        raise ValueError(f"evaluate: --layout is for the folder of --data, got {layout} alone")
    if layout is not None:
        settings = FolderConfig(data, layout)
    elif data is not None:
        settings, line = find_format(data)
        print(line)
    else:
        settings = data_of_run(name, bool(given.keys() - {"split"}))
    if settings is None or isinstance(settings, (DigitsConfig, StreetsConfig)):
        if max_pixels is not None:
            raise ValueError("evaluate: --max-pixels is for images in folders, not for digits")
        split = given.pop("split", "test")
        task = "panoptic" if opened.config.num_labels == 11 else "instance"
        settings = settings or DigitsConfig(size=(64, 64), level="easy", task=task)
        if "level" in given and isinstance(settings, StreetsConfig):
            raise ValueError("evaluate: --level is for scenes of digits, and the data is streets")
        settings = replace(settings, **given)
        scenes = f"{settings.level} scenes" if isinstance(settings, DigitsConfig) else "streets"
        return build_dataset(settings, split), scenes
    if given:
        raise ValueError(
            f"evaluate: --{next(iter(given))} is for scenes of digits, and the data is the folder "
            f"{settings.root}"
        )
    limit = {} if max_pixels is None else {"max_pixels": max_pixels}
    if isinstance(settings, FolderConfig):
        source = Folder(replace(settings, **limit), "val")
        source.check()
    else:
        settings = replace(settings, read=replace(settings.read, **limit))
        source = build_dataset(settings, "val")
    return source, str(settings.root)


def run_folder(name: str) -> Path | None:
    """The folder of a run that is named by itself, by model/ or best/ in it, or by a file in one
    of these; None of another model."""
    folder = Path(name).parent if Path(name).is_file() else Path(name)
    if folder.name in ("model", BEST) and not checkpoint.held(folder):
        folder = folder.parent
    return folder if checkpoint.held(folder) else None


def write_report(
    out: Path,
    name: str,
    title: str,
    value: dict,
    model: SegmentationModel,
    dataset,
    options: Options,
    views: Views,
    about: dict[str, dict],
    cuda_graphs: bool = True,
) -> Path:
    """Writes the page of an evaluation beside its figures.

    Args:
        out: JSON file of the figures.
        name: of the model; of a run its curves and settings are in the page, too.
        title: of the data.
        value: the figures.
        model, dataset, options, views, cuda_graphs: as `evaluate` had them.
        about: more settings to list, by the name of the group.

    Returns:
        the page.
    """
    run = run_folder(name)
    measured = {"model": name, "kind": model.config.kind, **asdict(options), **asdict(views)}
    settings = {"data": {"measured on": title, "images": value["images"]}, "evaluation": measured}
    if run is not None:
        settings["training"] = stored_config(run).to_dict()
    page, *_ = write_page(
        out.with_suffix(".html"),
        value,
        model,
        dataset,
        f"{Path(name).resolve().name} on {title}",
        options,
        views,
        log=None if run is None else run / LOG,
        settings=settings | about,
        cuda_graphs=cuda_graphs,
    )
    return page
