"""Tensors that depend on sizes alone, computed once and kept; and what CUDA graphs need of them.

A `constant` is kept per arguments (sizes, device, dtype), the last few of them; under
`torch.compile`, `torch.export` and `torch.jit.trace` it is part of the graph instead, because a
traced graph must not depend on what an earlier call left behind. What is recorded to be replayed
(`recording`) reads constants where they lie and keeps them itself.
"""

import functools
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


def constant(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps what a function builds; the module says for how long.

    Args:
        build: of hashable arguments a tensor that nobody changes, without gradient.
    """
    kept: dict[tuple, Tensor] = {}  # the last used at the end

    @functools.wraps(build)
    def call(*args):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
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
