"""Gives memory back to the system that the C library keeps: work on ever new sizes leaves its heap
full of holes, into which the next size does not fit."""

import ctypes
import threading
from collections.abc import Hashable

_RECENT = 8  # sizes whose work finds the blocks of the last time

_lock = threading.Lock()
_recent: dict[Hashable, None] = {}  # the last used at the end
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it


def note_size(size: Hashable) -> None:
    """Says that work on a size begins; what is free goes to the system where it is none of the
    last eight, which takes a few milliseconds.

    Args:
        size: equal for work that allocates the same blocks.
    """
    with _lock:
        known = size in _recent
        _recent.pop(size, None)
        _recent[size] = None
        if len(_recent) > _RECENT:
            del _recent[next(iter(_recent))]
    if not known and _trim is not None:
        _trim(0)
