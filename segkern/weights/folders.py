"""Folders of models, here or on the Hugging Face hub, and the JSON in them."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download

from .hub import downloads

FILES = (  # each of which stands for the folder that it is in
    *("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    *("variant.yml", "checkpoint.pth", "last.pt"),
)
# of files: what ends in one is no folder and no name on the hub
SUFFIXES = (".pkl", ".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".json", ".yml", ".yaml")


def find_folder(name_or_folder: str | Path) -> Path:
    """The folder of a model.

    Args:
        name_or_folder: a model's folder, or one of its files; the folder of a training run, which
            has best/, the weights that measured best, or else model/, the newest; or a name on the
            hub, whose files are downloaded.

    Raises:
        ValueError: no such folder, another file, or the hub does not give it.
    """
    folder = Path(name_or_folder).expanduser()
    name = str(name_or_folder)
    if folder.is_file():
        if folder.name not in FILES:
            raise ValueError(
                f"from_pretrained: {name} is a file; give the folder of the model, or of these "
                f"files in it one: {', '.join(FILES)}"
            )
        folder = folder.parent
    if folder.is_dir():
        if is_model(folder):
            return folder
        inside = [folder / part for part in ("best", "model")]
        return next((part for part in inside if (part / "config.json").is_file()), folder)
    if folder.suffix in SUFFIXES:
        raise ValueError(f"from_pretrained: no such file: {name}")
    if isinstance(name_or_folder, Path) or name.count("/") > 1 or name[:1] in "./~":
        raise ValueError(f"from_pretrained: no such folder: {name}")
    try:
        files = ["config.json", "preprocessor_config.json", "model*.safetensors*"]
        with downloads():
            folder = Path(snapshot_download(name, allow_patterns=files))
            if not list(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(name, allow_patterns=[*files, "pytorch_model*"]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"from_pretrained: {name} is no folder here, and the hub does not give it: {error}"
        ) from error
    return folder


def is_model(folder: Path) -> bool:
    """Whether a folder has the settings of a model, by whichever format."""
    return any((folder / file).is_file() for file in ("config.json", "variant.yml"))


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


def write_json(path: Path, value: dict) -> None:
    """Writes an object as a JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def model_type(name_or_folder: str | Path) -> str | None:
    """What config.json of a folder, or of a model on the hub, calls the model's kind.

    Raises:
        ValueError: no such folder or name, or no config.json.
    """
    return read_json(find_folder(name_or_folder) / "config.json").get("model_type")
