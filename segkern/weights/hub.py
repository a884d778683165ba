"""The Hugging Face hub, without waiting for it where it cannot be reached."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_session

_LOCK = threading.Lock()  # the library has one setting for all threads


@dataclass(frozen=True)
class Place:
    """Where on the hub files are, and how they are had.

    Attributes:
        revision: branch, tag or commit; None is the main branch.
        cache_dir: where downloads are kept; None is the hub's own place.
        token: True takes the one that is stored.
        local_files_only: nothing is downloaded.
        subfolder: of the repository, or of a folder here.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    subfolder: str = ""


@contextmanager
def downloads() -> Iterator[None]:
    """Inside, the hub's library takes what it has kept and fails at once for the rest, if the hub
    does not answer in five seconds; by itself it would try again for most of a minute.

    Raises:
        OSError: the library failed, where the hub does not answer.
    """
    with _LOCK:
        before = constants.HF_HUB_OFFLINE
        silent = not (before or _answers())
        constants.HF_HUB_OFFLINE = before or silent
        try:
            yield
        except (OSError, ValueError) as error:
            if not silent:
                raise
            raise OSError(f"{constants.ENDPOINT} does not answer") from error
        finally:
            constants.HF_HUB_OFFLINE = before


def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever library carries the request; any answer will do
        return False
    return True
