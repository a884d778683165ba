"""Folders in Hugging Face's format, as models of masks share them: how they are read.

Plain functions on dicts: settings have the names of a model's config.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..structures.labels import IMAGENET_MEAN
from ..weights.folders import find_folder, read_json
from ..weights.hf_folders import read_weights
from .preprocessor import find_preprocessor, is_old, read_preprocessor


def read_folder(
    name_or_folder: str | Path,
    num_labels: int | None,
    read_config: Callable[[dict, str], dict],
    read_names: Callable[[dict[str, Tensor], dict], dict[str, Tensor]],
    head: str,
    preprocessor: Callable[[dict, dict, str, bool], dict] | None = None,
) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a model in Hugging Face's format.

    Args:
        name_or_folder: a folder, or a name on the hub, which is downloaded.
        num_labels: K that the caller wants; then config.json may name another number of labels
            than the weights have, and the settings say what the weights have.
        read_config: settings of config.json's fields and the checkpoint's name, for messages.
        read_names: the weights under our names, of those in the files and the settings.
        head: our name of the class head's bias, [K + 1].
        preprocessor: settings of preprocessor_config.json's fields, the settings so far, the
            begin of a message, and what `is_old` says of it; None takes `read_preprocessor` for
            Mask2Former's image processor.

    Returns:
        settings under the names of the model's config, and weights under our names; weights that
        have no name here keep theirs.

    Raises:
        ValueError: no such folder or name, a file that is missing or broken, an option that the
            model has not here, or a number of labels that does not fit the weights.
    """
    folder = find_folder(name_or_folder)
    config = read_json(folder / "config.json")
    settings = read_config(config, str(name_or_folder))
    if found := find_preprocessor(folder):
        given = f"from_pretrained: {name_or_folder}", is_old(config)
        if preprocessor is None:
            settings |= read_preprocessor(found, "Mask2FormerImageProcessor", *given)
        else:
            settings |= preprocessor(found, settings, *given)
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
