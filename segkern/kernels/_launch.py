"""What every launcher asks of the device, and nothing else does."""

import contextlib
import functools

import torch
from torch import Tensor

ARCHITECTURES = (80, 90, 100)  # the keys of tuning tables: A100, H100 and H200, B200
ASSUMED = 90  # of tensors without a CUDA device: interpreted, or compiled ahead of time
# of every launch: Triton 3.9 warns where it is not said, 3.10 turns it off
FUSED = {"enable_fp_fusion": True}


def on(tensor: Tensor):
    """Makes the tensor's CUDA device current, for Triton launches on the current one."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    known = [a for a in ARCHITECTURES if a <= 10 * major + minor]
    return max(known, default=ARCHITECTURES[0])


def architecture(tensor: Tensor) -> int:
    """80, 90 or 100: the nearest of ARCHITECTURES that is not above the tensor's device."""
    return _capability(tensor.device) if tensor.is_cuda else ASSUMED
