"""Files and folders that are whole or not there: written under a temporary name, then renamed."""

import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LEFT = re.compile(r"\.[0-9a-f]{32}(\.\w+)?")  # the temporary names of `atomic`


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; renames it when the block ends well.

    Args:
        path: the file to make or to replace; its folder is made if it is not there.

    Yields:
        a path with the same suffix in the same folder. If the block raises, that file is removed
        and whatever stood at `path` stays.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{uuid.uuid4().hex}{path.suffix}"
    )  # mkstemp: only the owner reads
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # or a crash may leave the name without the content
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def new_place(argument: str, target: str | Path) -> Iterator[Path]:
    """Gives a path of the same name in a temporary folder beside `target`, to write a file or a
    folder to; moves what is there when the block ends well.

    Args:
        argument: what `target` is called in messages, such as "convert: target".
        target: nothing, or an empty folder; its folder is made if it is not there.

    Yields:
        the path, in whose folder other temporary files may lie, too. If the block raises, nothing
        stays.

    Raises:
        ValueError: there is something at `target`, before or after.
        OSError: the folder cannot be written to.
    """
    target = Path(target)
    expect_free(argument, target)
    near = next(path for path in target.absolute().parents if path.exists())
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=near) as temporary:
        inside = Path(temporary) / target.name
        yield inside
        expect_free(argument, target, inside.is_dir())
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(inside, target)  # an empty folder gives way to a folder


def expect_free(argument: str, path: Path, folder: bool = True) -> None:
    """Raises ValueError where there is something; an empty folder gives way to another, and to
    nothing else."""
    gives_way = folder and path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if os.path.lexists(path) and not gives_way:
        raise ValueError(f"{argument} must not be there yet, got {path}")


def remove_left(folder: str | Path) -> None:
    """Removes what `atomic` leaves in a folder where it is killed; nobody may write there now."""
    for path in Path(folder).iterdir():
        if _LEFT.fullmatch(path.name):
            path.unlink()


def write_json(path: str | Path, value) -> None:
    """Writes `value` as JSON, whole or not at all.

    Raises:
        ValueError: it holds NaN or infinity, which JSON does not have.
        OSError: the folder cannot be written to.
    """
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def writable_folder(folder: str | Path) -> Path:
    """Makes the folder and tries to write to it, before work is done whose result would go there.

    Raises:
        OSError: it cannot be made or written to; the message names it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write into folder {folder}: {error.strerror or error}") from error
    return folder


def name_folder(written: str | Path, folder: str | Path) -> None:
    """Gives a folder whose files are on the disk its name, which stays if the machine stops.

    Args:
        written: beside `folder`.
        folder: is not there.

    Raises:
        OSError: it cannot be renamed.
    """
    _sync_folder(Path(written))
    os.rename(written, folder)
    _sync_folder(Path(folder).parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # where a folder cannot be opened
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
