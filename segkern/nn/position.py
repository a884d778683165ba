"""What depends on the sizes of the feature maps alone: sine position embedding, reference points.

Letters: C channel, L level, S pixels of all levels, h w size of a level.

Both are computed once per (sizes, device, dtype) and kept, the last few of them; under
`torch.compile` and `torch.export` they are part of the graph instead, because a traced graph must
not depend on what an earlier call left behind. What is recorded to be replayed (`recording`) reads
them where they lie and keeps them itself.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_KEPT = 8  # sizes; training at many scales must not pile up maps of 20 MB
_LOCK = threading.Lock()
_read: ContextVar[list[Tensor] | None] = ContextVar("read by a recording", default=None)


@contextmanager
def recording() -> Iterator[list[Tensor]]:
    """Inside, work is recorded that is replayed later, at the same addresses.

    Yields:
        the kept tensors that the work reads; they must live as long as the record.
    """
    token = _read.set([])
    try:
        yield _read.get()
    finally:
        _read.reset(token)


def is_recording() -> bool:
    """Whether `recording` is underway: nothing may then be kept, or read without keeping it."""
    return _read.get() is not None


def _constant(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    kept: dict[tuple, Tensor] = {}  # the last used at the end

    @functools.wraps(build)
    def call(*args):
        if torch.compiler.is_compiling():
            return build(*args)
        # an inference tensor could not be used in a later training step
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            found = kept.pop(args, None)
            if found is None and is_recording():
                return build(*args)  # part of the record: it has no values before a replay
            kept[args] = build(*args) if found is None else found
            if len(kept) > _KEPT:
                del kept[next(iter(kept))]
            if is_recording():
                _read.get().append(kept[args])
            return kept[args]

    return call


@_constant
def sine_position(
    shapes: tuple[tuple[int, int], ...], channels: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Sine embedding of the pixel centres of all levels.

    The first half of the channels encodes y, the second x; within a half, sine and cosine
    alternate with wavelengths from 2 pi to 2 pi * 10000. Coordinates are the row or column counted
    from 1, divided by the level's size and times 2 pi.

    Args:
        shapes: (h, w) of each level.
        channels: C, a multiple of 4.
        device: device of the result.
        dtype: dtype of the result; computed in float32 at least.

    Returns:
        [S, C], levels one after the other, rows before columns. Shared: do not write to it.

    Source: DETR (Carion et al., ECCV 2020), as in Mask2Former (Cheng et al., CVPR 2022).
    """
    half = channels // 2
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    pair = torch.arange(half // 2, device=device, dtype=exact)
    wavelength = 10000.0 ** (2 * pair / half)  # [C/4]

    def encode(n: int) -> Tensor:  # [n, C/2]
        at = torch.arange(1, n + 1, device=device, dtype=exact) / (n + 1e-6) * (2 * math.pi)
        angle = at[:, None] / wavelength
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)

    levels = []
    for h, w in shapes:
        y = encode(h)[:, None].expand(h, w, half)
        x = encode(w)[None].expand(h, w, half)
        levels.append(torch.cat((y, x), -1).flatten(0, 1))
    return torch.cat(levels).to(dtype)


@_constant
def pixel_centres(
    shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Centres of the pixels of all levels, x then y, as fractions of the level's size.

    Args:
        shapes: (h, w) of each level.
        device: device of the result.
        dtype: float32 or float64.

    Returns:
        [1, S, 1, 2] in (0, 1), levels one after the other, rows before columns. Shared: do not
        write to it.
    """
    levels = []
    for h, w in shapes:
        y = (torch.arange(h, device=device, dtype=dtype) + 0.5) / h
        x = (torch.arange(w, device=device, dtype=dtype) + 0.5) / w
        levels.append(torch.stack((x.expand(h, w), y[:, None].expand(h, w)), -1).flatten(0, 1))
    return torch.cat(levels)[None, :, None]
