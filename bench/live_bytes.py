"""The most bytes of an imaginary GPU that are in use at once: an upper bound, not measured.

A tensor is in use from the op that makes it to the end of its last reference, as on a GPU; what
autograd saves, until its node has run. Left out: the CUDA context and what cuBLAS, cuDNN and
attention take beside their arguments.
"""

import weakref
from functools import partial

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

BLOCK = 512  # the allocator gives multiples of it


class Live:
    """Counts the memory of all tensors that it is shown.

    Attributes:
        now, most: bytes in use, and the most so far.
    """

    def __init__(self):
        self.now = self.most = 0
        self._known: set[int] = set()

    def see(self, values) -> None:
        for x in tree_leaves(values):
            if not (isinstance(x, Tensor) and x.is_cuda):
                continue
            memory = x.untyped_storage()
            if memory._cdata not in self._known:
                self._known.add(memory._cdata)
                size = -(-memory.nbytes() // BLOCK) * BLOCK
                self.now += size
                weakref.finalize(memory, self._end, memory._cdata, size)
        self.most = max(self.most, self.now)

    def within(self, size: int) -> None:
        """Bytes that a kernel takes for itself while it runs."""
        self.most = max(self.most, self.now + size)

    def _end(self, memory: int, size: int) -> None:
        self._known.remove(memory)
        self.now -= size


class _Box:
    def __init__(self, value):
        self.value = value


_opened: list[_Box] = []


def _packed(pack, x: Tensor) -> _Box:
    return _Box(pack(x))


def _unpacked(unpack, box: _Box) -> Tensor:
    _opened.append(box)
    return unpack(box.value)


_init = saved_tensors_hooks.__init__


def boxed(hooks, pack, unpack) -> None:
    """In place of `saved_tensors_hooks.__init__`: what is saved, also by a checkpoint, can be
    freed by `release`."""
    _init(hooks, partial(_packed, pack), partial(_unpacked, unpack))


def release() -> None:
    """Frees what a node has read, as autograd's engine does once it has run."""
    for box in _opened:
        box.value = None
    _opened.clear()
