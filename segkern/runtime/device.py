"""Picks the device that a command runs on, and says why one cannot be used."""

import torch

from ..ops import _library


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
        why = f"{_library.MISSING[device.type]}; {_library.REMEDY}"
        raise ValueError(f"device {name!r} has no kernels: {why}")
    return device
