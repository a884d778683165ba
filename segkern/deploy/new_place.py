"""A folder or file that gets its name when all of it is there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_place(caller: str, target: Path) -> Iterator[Path]:
    """Gives a path of the same name in a temporary folder beside `target`, to write to; moves what
    is there when the block ends well.

    Args:
        caller: whose name begins messages.
        target: nothing, or an empty folder; its folder is made if it is not there.

    Yields:
        the path, in whose folder other temporary files may lie, too. If the block raises, nothing
        stays.

    Raises:
        ValueError: there is something at `target`, before or after.
        OSError: the folder cannot be written to.
    """
    check_free(caller, target)
    near = next(path for path in target.absolute().parents if path.exists())
    with tempfile.TemporaryDirectory(prefix=f".{caller}-", dir=near) as temporary:
        inside = Path(temporary) / target.name
        yield inside
        check_free(caller, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(inside, target)  # an empty folder gives way to a folder


def check_free(caller: str, target: Path) -> None:
    """Raises ValueError where there is something already."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{caller}: out must be a new file or folder, {target} is there already")
