"""Reads pickled checkpoints without executing anything that they hold."""

from pathlib import Path

import torch


def load(path: str | Path):
    """What torch.save wrote, on the CPU: tensors and plain types only.

    Raises:
        ValueError: damaged, cut short, or holds other things; says why in one line.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign or cut file makes the unpickler raise anything
        reason = str(error).splitlines()[0][:120] if str(error) else ""
        raise ValueError(f"{type(error).__name__}: {reason}".rstrip(": ")) from error
