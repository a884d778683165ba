"""The Hugging Face hub, without waiting for it where it cannot be reached."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session

_LOCK = threading.Lock()  # the library has one setting for all threads


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
