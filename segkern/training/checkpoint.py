"""Checkpoints of a training run: one file, whole or not there, checked before it is used."""

from pathlib import Path

import torch

from ..io.atomic_files import atomic
from ..weights import unpickling

FORMAT = 2  # 1: settings without `kind`, which `TrainConfig.from_dict` knows
FILE = "last.pt"
_PARTS = {
    "config": dict,
    "step": int,
    "seconds": float,
    "model": dict,
    "optimizer": dict,
    "random": dict,
}


def save(folder: str | Path, state: dict) -> None:
    """Writes `folder`/last.pt; a stop in the middle leaves the file that was there before."""
    with atomic(Path(folder) / FILE) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def folder_of(path: str | Path) -> Path:
    """The folder of a checkpoint that is named by its file or by its folder."""
    path = Path(path)
    return path if path.is_dir() else path.parent


def load(path: str | Path) -> dict:
    """Reads a checkpoint to the CPU.

    Args:
        path: of the file, or of its folder.

    Raises:
        ValueError: no such file, cut short, or no checkpoint of segkern.
    """
    path = folder_of(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        state = unpickling.load(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(state, dict) or state.get("format") not in range(1, FORMAT + 1):
        raise ValueError(f"{path}: not a checkpoint of segkern train")
    lacking = [name for name, kind in _PARTS.items() if not isinstance(state.get(name), kind)]
    if lacking:
        raise ValueError(f"{path}: not a checkpoint of segkern train (no {', '.join(lacking)})")
    return state


def differences(stored: dict, wanted: dict, free: tuple[str, ...] = (), prefix="") -> list[str]:
    """What differs between two nested dicts of settings.

    Args:
        stored, wanted: settings by name.
        free: names that may differ, such as "steps" or "data.root".
        prefix: put before the names.

    Returns:
        lines such as "model.num_queries is 8 there, 10 here".
    """
    out = []
    for key in sorted(stored.keys() | wanted.keys()):
        there, here, name = stored.get(key), wanted.get(key), f"{prefix}{key}"
        if name in free:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            out += differences(there, here, free, f"{name}.")
        elif there != here:
            out.append(f"{name} is {there} there, {here} here")
    return out
