"""CUDA graphs: work that reads nothing back is captured once for each set of sizes, then replayed.

A replay starts all kernels with one call of the host. Written for GPUs and not yet run on one.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor


class Replay:
    """A function of tensors whose CUDA work is captured for each set of input sizes.

    The first calls of a set run eagerly, on a stream of their own: they fill what is kept
    (position embeddings, the optimizer's state) and choose algorithms. Then the work is captured,
    and every later call copies its inputs to those of the capture and replays it. On a CPU the
    function runs.

    What is captured: shapes, dtypes, and every value that is no tensor. Weights that are written
    in place, such as those of an optimizer's step, are followed; a module that switches between
    training and evaluation needs a `Replay` for each.

    Args:
        function: takes tensors, returns a tensor or nested tuples, lists and dicts of tensors. It
            must not read values on the host, and draws random numbers on the device only.
        warmup: eager calls before a capture, at least 1.
        keep: captured sets; the one unused for longest is dropped for a new one.

    Raises:
        RuntimeError: at the capture, when the function synchronises with the host.
    """

    def __init__(self, function: Callable, warmup: int = 3, keep: int = 16):
        if warmup < 1 or keep < 1:
            raise ValueError(f"Replay: warmup and keep must be >= 1, got {warmup} and {keep}")
        self.function, self.warmup, self.keep = function, warmup, keep
        self._calls: dict[tuple, int] = {}
        self._captured: OrderedDict[tuple, tuple] = OrderedDict()
        self._pool = None  # shared: one graph runs at a time, and outputs are copied

    def __call__(self, *inputs: Tensor):
        if not inputs or not inputs[0].is_cuda:
            return self.function(*inputs)
        key = tuple((t.shape, t.dtype, t.device) for t in inputs)
        if key not in self._captured:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= self.warmup:
                return self._aside(inputs)
            self._capture(key, inputs)
        self._captured.move_to_end(key)
        graph, fixed, outputs = self._captured[key]
        for kept, given in zip(fixed, inputs):
            kept.copy_(given, non_blocking=True)
        graph.replay()
        return _copied(outputs)

    def _aside(self, inputs: tuple[Tensor, ...]):
        """An eager call on another stream, as must come before a capture."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outputs = self.function(*inputs)
        current.wait_stream(side)
        return outputs

    def _capture(self, key: tuple, inputs: tuple[Tensor, ...]) -> None:
        while len(self._captured) >= self.keep:
            self._captured.popitem(last=False)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        fixed = [t.clone() for t in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = self.function(*fixed)
        except RuntimeError as error:
            raise RuntimeError(
                f"Replay: the work on {[list(t.shape) for t in inputs]} cannot be captured in a "
                f"CUDA graph; run it eagerly instead ({error})"
            ) from error
        self._captured[key] = graph, fixed, outputs


def _copied(outputs):
    """The outputs, in memory that the next replay does not write to."""
    if isinstance(outputs, Tensor):
        return outputs.detach().clone()
    if isinstance(outputs, dict):
        return {name: _copied(value) for name, value in outputs.items()}
    return type(outputs)(map(_copied, outputs))
