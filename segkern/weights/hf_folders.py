"""Folders in Hugging Face's format, of any model: the weights in one file or in shards, labels."""

import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import unpickling
from .folders import read_json, write_json
from .state_dicts import unwrapped, write_tensors

SIZES_TOLD = "sizes_in_preprocessor"  # under "segkern" in config.json: the other file says them
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order of preference


def check_type(config: dict, wanted: str, name: str) -> None:
    """Raises ValueError where config.json is of another kind of model."""
    if config.get("model_type") != wanted:
        raise ValueError(
            f"from_pretrained: {name}: model_type must be {wanted}, got {config.get('model_type')}"
        )


def check_fixed(config: dict, fixed: dict, name: str) -> None:
    """Raises ValueError where a config has another value than the one that a model has here."""
    for field, value in fixed.items():
        if config.get(field, value) != value:
            raise ValueError(
                f"from_pretrained: {name}: {field} must be {value}, got {config[field]}"
            )


def read_labels(config: dict, name: str) -> dict[int, str]:
    """The names of the labels that config.json holds.

    Raises:
        ValueError: they are not 0, 1, 2, ...
    """
    labels = config.get("id2label") or {i: f"LABEL_{i}" for i in range(2)}
    labels = {int(i): str(label) for i, label in labels.items()}
    if sorted(labels) != list(range(len(labels))):
        raise ValueError(f"from_pretrained: {name}: id2label must name labels 0, 1, 2, ...")
    return labels


def write_labels(names: dict[int, str] | None, count: int) -> dict:
    """The same for config.json."""
    names = names or {i: f"LABEL_{i}" for i in range(count)}
    return {
        "id2label": {str(i): label for i, label in names.items()},
        "label2id": {label: i for i, label in names.items()},
    }


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Weights of a folder under the names in its file, or in its shards.

    Raises:
        ValueError: there is no such file, or one is broken.
    """
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


def write_folder(
    folder: str | Path, weights: dict[str, Tensor], config: dict, preprocessor: dict
) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors.

    All is written beside its place and renamed in the end, one file after the other, so each file
    is whole at any time. What fails before the renames leaves an earlier save as it was; what is
    killed between them leaves new weights beside old settings.

    Args:
        folder: is made if it is not there; other files in it stay, other weights go.
        weights: under Hugging Face's names.
        config: for config.json, which gets the weights' dtype.
        preprocessor: for preprocessor_config.json.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    floats = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    config = config | {"dtype": min(floats, default="float32")}
    config["segkern"] = config.get("segkern", {}) | {SIZES_TOLD: True}
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        write_tensors(temporary / _WEIGHTS[0], weights)
        write_json(temporary / "preprocessor_config.json", preprocessor)
        write_json(temporary / "config.json", config)
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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else unpickling.load(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"from_pretrained: {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"from_pretrained: {path} must hold a dict of tensors")
    return unwrapped(state)
