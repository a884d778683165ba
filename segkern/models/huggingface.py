"""Folders in Hugging Face's format, as models of masks share them: config.json, the weights, and
preprocessor_config.json.

Plain functions on dicts: settings have the names of a model's config.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..structures.labels import IMAGENET_MEAN
from ..weights import unpickling
from ..weights.folders import find_folder, read_json
from ..weights.state_dicts import misfits, on_disk, with_new_head

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order of preference


def read_folder(
    name_or_folder: str | Path,
    num_labels: int | None,
    read_config: Callable[[dict, str], dict],
    read_names: Callable[[dict[str, Tensor], dict], dict[str, Tensor]],
    head: str,
) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a model in Hugging Face's format.

    Args:
        name_or_folder: a folder, or a name on the hub, which is downloaded.
        num_labels: K that the caller wants; then config.json may name another number of labels
            than the weights have, and the settings say what the weights have.
        read_config: settings of config.json's fields and the checkpoint's name, for messages.
        read_names: the weights under our names, of those in the files and the settings.
        head: our name of the class head's bias, [K + 1].

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
        settings |= read_preprocessor(read_json(folder / "preprocessor_config.json"))
    channels = (config.get("backbone_config") or {}).get("num_channels", 3)
    if channels != len(settings.get("image_mean", IMAGENET_MEAN)):
        raise ValueError(
            f"from_pretrained: {name_or_folder}: image_mean of preprocessor_config.json must have "
            f"num_channels ({channels}) numbers, got {settings.get('image_mean')}"
        )
    weights = read_names(_read_weights(folder), settings)
    if head in weights and len(weights[head]) - 1 != settings["num_labels"]:
        has = len(weights[head]) - 1
        if num_labels is None:
            raise ValueError(
                f"from_pretrained: {name_or_folder}: config.json names {settings['num_labels']} "
                f"classes, the weights have {has}; num_labels=... starts the class head anew"
            )
        settings |= {"num_labels": has, "id2label": None, "stuff": ()}
    return settings, weights


def build(
    name: str | Path,
    kind: type[nn.Module],
    config: type,
    settings: dict,
    weights: dict[str, Tensor],
    num_labels: int | None,
) -> nn.Module:
    """The model of settings and weights, as `read_folder` gives them, in eval mode.

    Args:
        name: of the checkpoint, for messages.
        kind: class of the model.
        config: class of its settings, which takes those that it knows.
        num_labels: K of the new task; where it differs from the settings', the class head starts
            anew.

    Raises:
        ValueError: the weights are not those of the configured model (names the keys).
    """
    known = {f.name for f in fields(config)}
    made = config(**{k: v for k, v in settings.items() if k in known})
    made.backbone_pretrained = False
    fresh = num_labels is not None and num_labels != made.num_labels
    if fresh:
        made = replace(made, num_labels=num_labels, id2label=None, stuff=())
    model = kind(made)
    own = model.state_dict()
    if fresh:
        weights = with_new_head(weights, own, kind.class_head)
    # of the loss, which no other's files have
    weights = {k: v for k, v in own.items() if k == "criterion.seed"} | weights
    if faults := misfits(weights, own):
        raise ValueError(f"{kind.__name__}: {name} does not fit the model; {'; '.join(faults)}")
    model.load_state_dict(weights)
    return model.eval()


def write_folder(
    folder: str | Path, config: dict, preprocessor: dict, state: dict[str, Tensor]
) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors.

    All is written beside its place and renamed in the end, one file after the other, so each file
    is whole at any time. What fails before the renames leaves an earlier save as it was; what is
    killed between them leaves new weights beside old settings.

    Args:
        folder: is made if it is not there; other files in it stay, other weights go.
        config, preprocessor: what the two files hold.
        state: the weights under the names that they have there.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = on_disk(state)
    floats = {str(v.dtype).removeprefix("torch.") for v in state.values() if v.is_floating_point()}
    config = config | {"dtype": min(floats, default="float32")}
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        save_file(state, temporary / _WEIGHTS[0], metadata={"format": "pt"})
        _write_json(temporary / "preprocessor_config.json", preprocessor)
        _write_json(temporary / "config.json", config)
        mode = (temporary / "config.json").stat().st_mode  # safetensors' own is private
        (temporary / _WEIGHTS[0]).chmod(mode)
        # config.json last: a folder without it is refused, so half of a first save never opens
        for name in (_WEIGHTS[0], "preprocessor_config.json", "config.json"):
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for pattern in ("model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*"):
        for old in folder.glob(pattern):
            old.unlink()


def read_labels(config: dict, name: str) -> dict[int, str]:
    """The names of the labels, with Hugging Face's default.

    Raises:
        ValueError: labels that are not 0, 1, 2, ...
    """
    labels = config.get("id2label") or {i: f"LABEL_{i}" for i in range(2)}
    labels = {int(i): str(label) for i, label in labels.items()}
    if sorted(labels) != list(range(len(labels))):
        raise ValueError(f"from_pretrained: {name}: id2label must name labels 0, 1, 2, ...")
    return labels


def write_labels(settings: dict) -> dict[str, dict]:
    """id2label and label2id."""
    count = settings["num_labels"]
    labels = settings.get("id2label") or {i: f"LABEL_{i}" for i in range(count)}
    return {
        "id2label": {str(i): label for i, label in labels.items()},
        "label2id": {label: i for i, label in labels.items()},
    }


def check_type(config: dict, wanted: str, name: str) -> None:
    """Raises ValueError where config.json is of another kind of model."""
    if config.get("model_type") != wanted:
        raise ValueError(
            f"from_pretrained: {name}: model_type must be {wanted}, got {config.get('model_type')}"
        )


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


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return _read_tensors(folder / name)
        if (folder / f"{name}.index.json").is_file():
            shards = read_json(folder / f"{name}.index.json").get("weight_map", {})
            state = {}
            for shard in sorted(set(shards.values())):
                state |= _read_tensors(folder / shard)
            return state
    raise ValueError(f"from_pretrained: {folder} has neither {' nor '.join(_WEIGHTS)}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else unpickling.load(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"from_pretrained: {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"from_pretrained: {path} must hold a dict of tensors")
    return state
