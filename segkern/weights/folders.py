"""Folders of models, here or on the Hugging Face hub, and the JSON in them."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download


def find_folder(name_or_folder: str | Path) -> Path:
    """A folder as it is, or the files of a model on the hub, which are downloaded.

    Raises:
        ValueError: no such folder, or the hub does not give it.
    """
    folder = Path(name_or_folder).expanduser()
    name = str(name_or_folder)
    if folder.is_dir():
        return folder
    if isinstance(name_or_folder, Path) or name.count("/") > 1 or name[:1] in "./~":
        raise ValueError(f"from_pretrained: no such folder: {name}")
    try:
        files = ["config.json", "preprocessor_config.json", "model*.safetensors*"]
        folder = Path(snapshot_download(name, allow_patterns=files))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*files, "pytorch_model*"]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"from_pretrained: {name} is no folder here, and the hub does not give it: {error}"
        ) from error
    return folder


def read_json(path: Path) -> dict:
    """The object that a JSON file holds.

    Raises:
        ValueError: no such file, or another content.
    """
    if not path.is_file():
        raise ValueError(f"from_pretrained: {path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"from_pretrained: {path} must hold an object")
    return value


def model_type(name_or_folder: str | Path) -> str | None:
    """What config.json of a folder, or of a model on the hub, calls the model's kind.

    Raises:
        ValueError: no such folder or name, or no config.json.
    """
    folder = Path(name_or_folder)
    folder = folder.parent if folder.is_file() else find_folder(name_or_folder)
    return read_json(folder / "config.json").get("model_type")
