"""Folders in Hugging Face's format, as models of masks share them: how they are read, and what
their preprocessor_config.json holds.

Plain functions on dicts: settings have the names of a model's config.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..structures.labels import IMAGENET_MEAN
from ..weights.folders import find_folder, read_json
from ..weights.hf_folders import read_weights


def read_folder(
    name_or_folder: str | Path,
    num_labels: int | None,
    read_config: Callable[[dict, str], dict],
    read_names: Callable[[dict[str, Tensor], dict], dict[str, Tensor]],
    head: str,
    preprocessor: Callable[[dict, dict, str], dict] | None = None,
) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a model in Hugging Face's format.

    Args:
        name_or_folder: a folder, or a name on the hub, which is downloaded.
        num_labels: K that the caller wants; then config.json may name another number of labels
            than the weights have, and the settings say what the weights have.
        read_config: settings of config.json's fields and the checkpoint's name, for messages.
        read_names: the weights under our names, of those in the files and the settings.
        head: our name of the class head's bias, [K + 1].
        preprocessor: settings of preprocessor_config.json's fields, the settings so far and the
            checkpoint's name; None takes `read_preprocessor`.

    Returns:
        settings under the names of the model's config (with "do_reduce_labels" and "ignore_index"
        of the preprocessor), and weights under our names; weights that have no name here keep
        theirs.

    Raises:
        ValueError: no such folder or name, a file that is missing or broken, an option that the
            model has not here, or a number of labels that does not fit the weights.
    """
    folder = find_folder(name_or_folder)
    config = read_json(folder / "config.json")
    settings = read_config(config, str(name_or_folder))
    if (folder / "preprocessor_config.json").is_file():
        found = read_json(folder / "preprocessor_config.json")
        if preprocessor is None:
            settings |= read_preprocessor(found)
        else:
            settings |= preprocessor(found, settings, str(name_or_folder))
    channels = (config.get("backbone_config") or config).get("num_channels", 3)
    if channels != len(settings.get("image_mean", IMAGENET_MEAN)):
        raise ValueError(
            f"from_pretrained: {name_or_folder}: image_mean of preprocessor_config.json must have "
            f"num_channels ({channels}) numbers, got {settings.get('image_mean')}"
        )
    weights = read_names(read_weights(folder), settings)
    if head in weights and len(weights[head]) - 1 != settings["num_labels"]:
        has = len(weights[head]) - 1
        if num_labels is None:
            raise ValueError(
                f"from_pretrained: {name_or_folder}: config.json names {settings['num_labels']} "
                f"classes, the weights have {has}; num_labels=... starts the class head anew"
            )
        settings |= {"num_labels": has, "id2label": None, "stuff": (), "prompts": ()}
    return settings, weights


def read_preprocessor(config: dict) -> dict:
    """Settings from a preprocessor_config.json."""
    settings = {}
    for field in ("image_mean", "image_std"):
        if config.get(field):
            settings[field] = tuple(config[field])
    size = config.get("size")
    if isinstance(size, int):  # files of before 2023
        size = {"shortest_edge": size, "longest_edge": config.get("max_size", size)}
    if size and "height" in size:
        size = {"shortest_edge": min(size.values()), "longest_edge": max(size.values())}
    if size and "shortest_edge" in size:
        settings["shortest_edge"] = size["shortest_edge"]
        settings["longest_edge"] = size.get("longest_edge") or 2 * size["shortest_edge"]
    if config.get("size_divisor", config.get("size_divisibility")):
        settings["size_divisor"] = config.get("size_divisor", config.get("size_divisibility"))
    settings["ignore_index"] = config.get("ignore_index")
    settings["do_reduce_labels"] = config.get(
        "do_reduce_labels", config.get("reduce_labels", False)
    )
    return settings


def write_preprocessor(settings: dict, kind: str) -> dict:
    """preprocessor_config.json of Hugging Face from settings, for an image processor of a kind."""
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {k: settings[k] for k in ("shortest_edge", "longest_edge")},
        "size_divisor": settings["size_divisor"],
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings["image_mean"]),
        "image_std": list(settings["image_std"]),
        "ignore_index": settings.get("ignore_index"),
        "do_reduce_labels": settings.get("do_reduce_labels", False),
        "num_labels": settings["num_labels"],
    }
