"""Folders in Hugging Face's format, as models of masks share them: how they are read, and what
those of Mask2Former's decoders have in config.json.

Plain functions on dicts: settings have the names of a model's config.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..nn.backbones.huggingface import read_backbone, write_backbone
from ..structures.labels import IMAGENET_MEAN, known_stuff
from ..weights import hf_folders as files
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


def read_decoders(config: dict, kind: str, same: dict, fixed: dict, name: str) -> dict:
    """Settings of a model that has Mask2Former's pixel and query decoder, from its config.json.

    Args:
        config: what the file holds; a field that is missing has Hugging Face's default.
        kind: what it must be of.
        same: fields that have one name and meaning there and here, and their defaults.
        fixed: fields that the architecture here does not leave open.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: another model, or an option that the model has not here.
    """
    files.check_type(config, kind, name)
    files.check_fixed(config, fixed, name)
    own = config.get("segkern") or {}
    labels = files.read_labels(config, name)
    settings = {field: config.get(field, default) for field, default in same.items()}
    settings |= {
        "decoder_layers": config.get("decoder_layers", 10) - 1,
        "num_labels": len(labels),
        "id2label": labels,
        "num_points_encoder": own.get("num_points_encoder", 4),
        "stuff": tuple(own["stuff"]) if "stuff" in own else known_stuff(labels),
    }
    return settings | read_backbone(config, name)


def write_decoders(settings: dict, kind: str, same: dict, fixed: dict) -> dict:
    """config.json of such a model; what Hugging Face has no field for is under "segkern"."""
    own = ("num_points_encoder", "backbone", "backbone_options", "drop_path_rate")
    return {
        "model_type": kind,
        "backbone_config": write_backbone(settings)
        | {"num_channels": len(settings.get("image_mean", IMAGENET_MEAN))},
        "decoder_layers": settings["decoder_layers"] + 1,
        **{field: settings[field] for field in same},
        **fixed,
        **files.write_labels(settings.get("id2label"), settings["num_labels"]),
        "segkern": {"stuff": list(settings.get("stuff", ()))} | {k: settings[k] for k in own},
    }


def family(settings: dict) -> str:
    """Which table of names the weights of a backbone follow."""
    return write_backbone(settings)["model_type"]
