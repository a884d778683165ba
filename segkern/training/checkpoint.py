"""Checkpoints of a training run: where they lie, what they say, and whether they are whole.

    OUTPUT/checkpoints/0000500/    of step 500; a folder that has its name is whole
        state.json                 settings, steps, scale, the optimizer's numbers; sums of files
        .metadata, *.distcp        tensors, as torch.distributed.checkpoint writes them
    OUTPUT/last.pt                 one file, as earlier versions wrote it

Nothing in them is executed: .metadata and last.pt are pickles that may name no code.
"""

import json
import os
import re
import zlib
from pathlib import Path

import torch

from ..weights import unpickling

FORMAT = 3  # 1: settings without `kind`, which `TrainConfig.from_dict` knows; up to 2: one file
FILE = "last.pt"
FOLDER = "checkpoints"
ABOUT = "state.json"
_SETTINGS = {"config": dict, "step": int, "seconds": float}
_PARTS = {
    FILE: _SETTINGS | {"model": dict, "optimizer": dict, "random": dict},
    ABOUT: _SETTINGS | {"groups": list, "files": dict},
}


def name_of(step: int) -> str:
    """The folder of a checkpoint in checkpoints/."""
    return f"{step:07d}"


def unnamed(folder: str | Path, step: int) -> Path:
    """Where a checkpoint is written, before it is whole and has its name."""
    return Path(folder) / FOLDER / f".{name_of(step)}"


def begun(folder: str | Path) -> bool:
    """Whether a first checkpoint was begun in the folder of a run, and none is whole: what lies
    beside it is of a run that was stopped then."""
    return not held(folder) and any((Path(folder) / FOLDER).glob(".*"))


def held(folder: str | Path) -> list[Path]:
    """Whole checkpoints of a run, the oldest first; last.pt is older than any in checkpoints/."""
    found = [p for p in (Path(folder) / FOLDER).glob("*") if re.fullmatch(r"\d{7,}", p.name)]
    file = Path(folder) / FILE
    return [*([file] if file.is_file() else []), *sorted(found, key=lambda p: int(p.name))]


def find(path: str | Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of the run in a folder.

    Raises:
        ValueError: no such checkpoint.
    """
    path = Path(path)
    if path.is_file():
        return path.parent if path.name == ABOUT else path
    if (path / ABOUT).is_file():
        return path
    if found := held(path):  # before its own name is looked at, which may be a number
        return found[-1]
    place = Path(os.path.abspath(path))  # of "0000500" inside checkpoints/, too
    if re.fullmatch(r"\d{7,}", place.name) and place.parent.name == FOLDER and place.is_dir():
        return path  # spoilt, as it does not say what it is
    if place.name == FOLDER and (found := held(place.parent)):
        return found[-1]
    raise ValueError(f"{path}: no such checkpoint")


def folder_of(path: str | Path) -> Path:
    """The folder of the run whose checkpoint `find` gives."""
    path = Path(path)
    try:
        path = find(path)
    except ValueError:
        return path if path.is_dir() else path.parent
    if path.is_file() or path.parent.name == FOLDER:
        return path.parent if path.is_file() else path.parent.parent
    place = Path(os.path.abspath(path))
    return place.parent.parent if place.parent.name == FOLDER else path.parent


def settings(path: str | Path) -> dict:
    """What a checkpoint says, without its tensors.

    Args:
        path: as `find` takes it.

    Returns:
        "config" (a dict), "step", "seconds" and what else was said; of last.pt all that it holds.

    Raises:
        ValueError: no such checkpoint, cut short, or none of segkern.
    """
    path = find(path)
    name = FILE if path.is_file() else ABOUT
    try:
        state = unpickling.load(path) if name == FILE else _read_plain(path / ABOUT)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    formats = range(1, FORMAT) if name == FILE else (FORMAT,)
    if not isinstance(state, dict) or state.get("format") not in formats:
        raise ValueError(f"{path}: not a checkpoint of segkern train")
    parts = _PARTS[name]
    lacking = [name for name, kind in parts.items() if not isinstance(state.get(name), kind)]
    if lacking:
        raise ValueError(f"{path}: not a checkpoint of segkern train (no {', '.join(lacking)})")
    return state


def whole(path: str | Path) -> dict:
    """The `settings` of a checkpoint all of whose files are as they were written; where there are
    several processes, all call it and each reads a part.

    Raises:
        ValueError: as `settings`; a file is missing, cut or spoilt. It names the newest of the
            run's other checkpoints that is whole.
    """
    path = find(path)
    try:
        state = settings(path)
        if path.is_dir() and (found := _fault(path, state["files"])):
            raise ValueError(f"{path}: not a whole checkpoint ({found})")
    except ValueError as error:
        other = _other(path)
        remedy = f"; go on from an earlier one with --resume {other}" if other else ""
        raise ValueError(f"{error}{remedy}") from error
    return state


def load(path: str | Path) -> dict:
    """A whole checkpoint on the CPU, in one process.

    Args:
        path: as `find` takes it.

    Returns:
        `settings`, and "tensors" by name: model.WEIGHT, average.WEIGHT, optimizer.WEIGHT.MOMENT,
        random.DEVICE; of last.pt all that it holds.

    Raises:
        ValueError: as `whole`.
    """
    path = find(path)
    state = whole(path)
    if path.is_dir():
        from ..weights import shards  # takes a third as long to import as torch itself

        tensors = shards.empty_tensors(path)
        shards.read(tensors, path, alone=True)
        state["tensors"] = tensors
    return state


def write_plain(path: Path, about: dict) -> None:
    """Writes what a checkpoint says as JSON, from which `settings` gives it back as it was; it is
    on the disk then."""
    plain = _plain({"format": FORMAT} | about)
    with path.open("w", encoding="utf-8") as file:
        json.dump(plain | {"sum": _sum(plain)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read_plain(path: Path) -> dict:
    """What `write_plain` wrote.

    Raises:
        ValueError: not there, cut or changed.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict) or plain.pop("sum", None) != _sum(plain):
            raise ValueError("its checksum is another")
        return _whole(plain)
    except FileNotFoundError as error:
        raise ValueError(f"not a whole checkpoint ({ABOUT} is missing)") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not a whole checkpoint ({ABOUT}: {error})") from error


def _sum(plain: dict) -> int:
    return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def _plain(x):
    if isinstance(x, dict):
        if any(not isinstance(key, str) or key in ("tuple", "items") for key in x):
            return {"items": [[_plain(key), _plain(value)] for key, value in x.items()]}
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        values = [_plain(value) for value in x]
        return values if isinstance(x, list) else {"tuple": values}
    return x


def _whole(x):
    if isinstance(x, dict):
        if x.keys() == {"tuple"}:
            return tuple(map(_whole, x["tuple"]))
        if x.keys() == {"items"}:
            return {_whole(key): _whole(value) for key, value in x["items"]}
        return {key: _whole(value) for key, value in x.items()}
    return list(map(_whole, x)) if isinstance(x, list) else x


def _fault(path: Path, files: dict[str, list[int]]) -> str | None:
    """What is wrong with the tensors' files; the same in all processes."""
    from ..weights import shards

    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if together else 0
    count = torch.distributed.get_world_size() if together else 1
    found = None
    if rank == 0:
        try:
            places = shards.read_metadata(path).storage_data.values()
            unknown = {place.relative_path for place in places} - files.keys()
            found = f"{ABOUT} does not know {min(unknown)}" if unknown else None
        except ValueError as error:
            found = str(error)
    found = found or shards.fault(path, files, sorted(files)[rank::count])
    if not together:
        return found
    all_found = [None] * count
    torch.distributed.all_gather_object(all_found, found)
    return next(filter(None, all_found), None)


def _other(path: Path) -> Path | None:
    """The newest whole checkpoint beside a spoilt one."""
    from ..weights import shards

    for other in reversed(held(folder_of(path))):
        try:
            state = settings(other)
        except ValueError:
            continue
        files = state.get("files", {})
        if other != path and not (files and shards.fault(other, files, files)):
            return other
    return None


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
