"""What a command asks of the process: Ctrl-C, and the device to run on."""

import signal
import threading

import torch

from .ops import _library


def usable_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda where there are kernels for it, else the CPU.

    Raises:
        ValueError: torch cannot use it, or segkern's kernels for it are missing.
    """
    if name == "auto":
        found = torch.cuda.is_available() and "cuda" not in _library.MISSING
        return torch.device("cuda" if found else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error
    if device.type in _library.MISSING and not _library.PURE:
        raise ValueError(f"device {name!r} has no kernels: {_library.MISSING[device.type]}")
    return device


def leave_interrupts_to_parent(_: int) -> None:
    """For a loader's workers: the process that started them ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Interrupt:
    """Inside, a first Ctrl-C only sets `asked`; a second one raises."""

    def __enter__(self):
        self.asked = False
        self.before = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt("stopped at once; the last checkpoint is whole")
        self.asked = True

    def __exit__(self, *error) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
