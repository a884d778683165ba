"""Our own checkpoints: config.json, with the model's kind, and model.safetensors."""

import json
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..io.atomic_files import atomic, write_json
from ..weights.folders import find_folder
from ..weights.state_dicts import unwrapped, write_tensors


def write(folder: str | Path, kind: str, settings: dict, weights: dict[str, Tensor]) -> None:
    """Writes a model, each file whole or not at all, the settings last.

    Args:
        folder: is made if it is not there.
        kind: the model's.
        settings: plain values by name.
        weights: by name.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    with atomic(folder / "model.safetensors") as temporary:
        write_tensors(temporary, weights)
    write_json(folder / "config.json", {"model_type": kind, **settings})


def read(folder: Path, kind: str, name: str) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights by name; lists are tuples again, and label numbers integers.

    Args:
        folder: of the model.
        kind: that it must have.
        name: of the model's class, for messages.

    Raises:
        ValueError: a file is missing or is not what it should be.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{name}: {folder} cannot be read: {error}") from error
    if not isinstance(settings, dict) or settings.pop("model_type", None) != kind:
        raise ValueError(f"{name}: {folder / 'config.json'} is not of a {name}")
    if names := settings.get("id2label"):
        settings["id2label"] = {int(k): v for k, v in names.items()}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return settings, unwrapped(weights)


def save(model: nn.Module, folder: str | Path) -> None:
    """Writes a model whose config is a dataclass of plain values."""
    write(folder, model.config.kind, asdict(model.config), model.state_dict())


def read_known(cls: type[nn.Module], source: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of what `save` wrote.

    Args:
        cls: class of the model, whose `config_class` must know all settings.
        source: as `find_folder` takes it.

    Raises:
        ValueError: a file is missing or is not what it should be, or settings that are not known.
    """
    name, config, folder = cls.__name__, cls.config_class, find_folder(source)
    settings, weights = read(folder, config.kind, name)
    if unknown := sorted(settings.keys() - {f.name for f in fields(config)}):
        raise ValueError(f"{name}: {folder} has unknown settings: {', '.join(unknown)}")
    return settings, weights
