"""Folders of models, here or on the Hugging Face hub, and the JSON in them."""

import json
from contextlib import nullcontext
from pathlib import Path

from huggingface_hub import snapshot_download

from .hub import Place, downloads

FILES = (  # each of which stands for the folder that it is in
    *("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    *("variant.yml", "checkpoint.pth", "last.pt"),
)
# of files: what ends in one is no folder and no name on the hub
SUFFIXES = (".pkl", ".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".json", ".yml", ".yaml")
SINGLE = (".pkl", ".pth", ".bin", ".ckpt")  # suffixes of checkpoints that are one file


def is_single_file(path: str | Path) -> bool:
    """Whether a path names a checkpoint that is one file, and not a part of a folder."""
    path = Path(path)
    return path.suffix in SINGLE and not (path.name in FILES and is_model(path.parent))


def find_folder(
    name_or_folder: str | Path, place: Place | None = None, weights: bool = True
) -> Path:
    """The folder of a model.

    Args:
        name_or_folder: a model's folder, or one of its files; the folder of a training run, which
            has best/, the weights that measured best, or else model/, the newest; or a name on the
            hub, whose files are downloaded.
        place: of a name on the hub; of a folder here its `subfolder` alone.
        weights: False downloads the settings alone.

    Raises:
        ValueError: no such folder, another file, or the hub does not give it.
    """
    folder, place = Path(name_or_folder).expanduser(), place or Place()
    name = str(name_or_folder)
    if folder.is_file():
        if folder.name not in FILES:
            raise ValueError(
                f"from_pretrained: {name} is a file; give the folder of the model, or of these "
                f"files in it one: {', '.join(FILES)}"
            )
        folder = folder.parent
    if folder.is_dir():
        folder = folder / place.subfolder
        if not folder.is_dir():
            raise ValueError(f"from_pretrained: no such folder: {folder}")
        if is_model(folder):
            return folder
        inside = [folder / part for part in ("best", "model")]
        return next((part for part in inside if (part / "config.json").is_file()), folder)
    if folder.suffix in SUFFIXES:
        raise ValueError(f"from_pretrained: no such file: {name}")
    if isinstance(name_or_folder, Path) or name.count("/") > 1 or name[:1] in "./~":
        raise ValueError(f"from_pretrained: no such folder: {name}")
    try:
        files = ["config.json", "*processor_config.json"]
        files += ["model*.safetensors*"] if weights else []
        with nullcontext() if place.local_files_only else downloads():
            folder = _snapshot(name, place, files)
            if weights and not list(folder.glob("*.safetensors")):
                folder = _snapshot(name, place, [*files, "pytorch_model*"])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"from_pretrained: {name} is no folder here, and the hub does not give it: {error}"
        ) from error
    return folder


def _snapshot(name: str, place: Place, files: list[str]) -> Path:
    """Where files of a repository on the hub are, once they are downloaded."""
    inside = f"{place.subfolder.strip('/')}/" if place.subfolder else ""
    folder = snapshot_download(
        name,
        revision=place.revision,
        cache_dir=place.cache_dir,
        token=place.token,
        local_files_only=place.local_files_only,
        allow_patterns=[inside + file for file in files],
    )
    return Path(folder) / inside


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
