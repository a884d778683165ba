"""What every launcher asks of the device, and nothing else does."""

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

# The keys of tuning tables, by the shared memory that a block may have: RTX 30, 40 and 50, A10 and
# L4; A100; H100 and H200; B200, whose matrix units take their operands otherwise.
KINDS = ("99 KB", "163 KB", "227 KB", "227 KB, 10.x")
# of every launch: Triton 3.9 warns where it is not said, 3.10 turns it off
FUSED = {"enable_fp_fusion": True}


class Device(NamedTuple):
    kind: str  # of KINDS
    multiprocessors: int


# of tensors without a CUDA device: interpreted, or compiled ahead of time
ASSUMED = Device("227 KB", 132)


def on(tensor: Tensor):
    """Makes the tensor's CUDA device current, for Triton launches on the current one."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


def kind_of(shared_bytes: int, major: int) -> str:
    """The kind of a device.

    Args:
        shared_bytes: the most shared memory that a block may ask for.
        major: of the compute capability.
    """
    if shared_bytes < 163 * 1024:
        return "99 KB"
    if shared_bytes < 227 * 1024:
        return "163 KB"
    return "227 KB" if major < 10 else "227 KB, 10.x"


@functools.cache
def _device(device: torch.device) -> Device:
    has = torch.cuda.get_device_properties(device)
    kind = kind_of(has.shared_memory_per_block_optin, has.major)
    return Device(kind, has.multi_processor_count)


def device(tensor: Tensor) -> Device:
    """Of the tensor's device what tuning depends on."""
    return _device(tensor.device) if tensor.is_cuda else ASSUMED
