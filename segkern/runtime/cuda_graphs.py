"""CUDA graphs: work that reads nothing back is captured once for each set of sizes, then replayed.

A replay starts all kernels with one call of the host. Written for GPUs and not yet run on one.
"""

import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import cache
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .constants import recording
from .modes import evaluated

# by arithmetic, not yet measured: more pixels keep a GPU busy for longer than their launches take
_PIXELS = 2**21
_RECENT = 32


class CaptureError(RuntimeError):
    """The work cannot be captured in a CUDA graph."""


class Replay:
    """A function of tensors whose CUDA work is captured for each set of input sizes.

    The first calls of a set run eagerly, on a stream of their own: they fill what is kept
    (position embeddings, the optimizer's state) and choose algorithms. Then the work is captured,
    and every later call copies its inputs to those of the capture and replays it. On a CPU the
    function runs.

    What is captured: shapes, dtypes, and every value that is no tensor. Weights that are written
    in place, such as those of an optimizer's step, are followed; a module that switches between
    training and evaluation, or whose weights move, needs a new `Replay`. Autocast, inference mode,
    gradients, float32 precision and determinism are told apart, as sizes are.

    Args:
        function: takes and returns tensors, or nested tuples, lists and dicts of tensors, in
            which other values may stand (for inputs: those that can be compared). It must not
            read values on the host, and draws random numbers on the device only.
        warmup: eager calls before a capture, at least 1.
        keep: captured sets; the one unused for longest is dropped for a new one.

    Raises:
        CaptureError: a RuntimeError, at the capture, when the function synchronises with the host.
    """

    def __init__(self, function: Callable, warmup: int = 3, keep: int = 16):
        if warmup < 1 or keep < 1:
            raise ValueError(f"Replay: warmup and keep must be >= 1, got {warmup} and {keep}")
        self.function, self.warmup, self.keep = function, warmup, keep
        self._calls: dict[tuple, int] = {}
        self._captured: OrderedDict[tuple, tuple] = OrderedDict()
        self._pool = None  # of memory, shared: one graph runs at a time, and outputs are copied

    def __call__(self, *inputs):
        leaves, nesting = pytree.tree_flatten(inputs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if not tensors or not tensors[0].is_cuda:
            return self.function(*inputs)
        with torch.cuda.device(tensors[0].device):
            sizes = tuple(
                (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves
            )
            key = sizes, str(nesting), _settings(tensors[0].device.type)
            if key not in self._captured:
                if not self._due(key):
                    return self._aside(inputs)
                self._capture(key, inputs)
            self._captured.move_to_end(key)
            graph, fixed, outputs, _ = self._captured[key]
            for kept, given in zip(pytree.tree_leaves(fixed), leaves):
                if isinstance(given, Tensor):
                    kept.copy_(given, non_blocking=True)
            graph.replay()
            return _copied(outputs)

    def _due(self, key: tuple) -> bool:
        """Whether this call, of a set that is not captured, is to be captured."""
        self._calls[key] = self._calls.get(key, 0) + 1
        return self._calls[key] > self.warmup

    def _aside(self, inputs: tuple):
        """An eager call on another stream, as must come before a capture."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outputs = self.function(*inputs)
        current.wait_stream(side)
        return outputs

    def _capture(self, key: tuple, inputs: tuple) -> None:
        while len(self._captured) >= self.keep:
            self._captured.popitem(last=False)
        if not self._captured:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        fixed = pytree.tree_map_only(Tensor, torch.clone, inputs)
        tensors = [x for x in pytree.tree_leaves(fixed) if isinstance(x, Tensor)]
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # casts kept until autocast ends would be read after it
        try:
            # the outer block gives the stream back where the end of a capture raises
            with torch.cuda.stream(torch.cuda.current_stream()), recording() as read:
                options = {
                    "pool": self._pool,
                    "stream": _capture_stream(tensors[0].device),
                    "capture_error_mode": "thread_local",  # other threads may allocate meanwhile
                }
                with torch.cuda.graph(graph, **options):
                    outputs = self.function(*fixed)
        except RuntimeError as error:
            raise CaptureError(
                f"Replay: the work on {[list(t.shape) for t in tensors]} cannot be captured in a "
                f"CUDA graph; run it eagerly instead ({error})"
            ) from error
        finally:
            torch.clear_autocast_cache()  # and those of the graph have no values before a replay
        self._captured[key] = graph, fixed, outputs, read


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream()


def _settings(device: str) -> tuple:
    """What the work of a function depends on besides its inputs."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )


def _copied(outputs):
    """The outputs, in memory that the next replay does not write to."""
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), outputs)


class _Inference(Replay):
    """The graphs of a model, which it does not keep alive.

    A call gives what follows (`then` of `replayed`, or None) and the inputs.

    Args:
        function, model: of `replayed`.
        state: what the graphs were captured with; when another comes, they are wrong.
    """

    def __init__(self, function: Callable, model: nn.Module, state: tuple):
        alive = weakref.ref(model)

        def run(then, inputs: tuple):
            outputs = function(evaluated(alive()), *inputs)
            return outputs if then is None else then(outputs)

        super().__init__(run, warmup=2, keep=4)
        self.state = state
        # with what follows and without
        self._recent = [deque(maxlen=_RECENT), deque(maxlen=_RECENT)]
        self._fails = False

    def _due(self, key: tuple) -> bool:
        (then, *_), *_ = key
        recent = self._recent[then is None]
        recent.append(key)
        return recent.count(key) > self.warmup and not self._fails

    def _aside(self, inputs: tuple):
        then, given = inputs
        if then is None:
            return self.function(None, given)  # without gradients no stream is kept
        return then(super().__call__(None, given))  # the model alone may come again

    def __call__(self, then, inputs: tuple):
        try:
            return super().__call__(then, inputs)
        except CaptureError as error:
            warnings.warn(f"segkern: the model runs without CUDA graphs: {error}", stacklevel=4)
            self._fails = True
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
        self._captured.clear()
        return self.function(then, inputs)


_LOCK = threading.Lock()  # the inputs of a capture are shared, and captures come one at a time
_INFERENCES: weakref.WeakKeyDictionary[nn.Module, _Inference] = weakref.WeakKeyDictionary()


def replayed(
    function: Callable,
    model: nn.Module,
    *inputs: Tensor,
    then: Callable | None = None,
    enabled: bool = True,
):
    """`function(model, *inputs)` in eval mode, from a CUDA graph where that is safe and pays.

    Captured are inferences of models without hooks, of up to 2**21 pixels, on the default
    stream, at the third call of a size among the last 32 that were not replayed: pictures of ever
    new sizes stay eager. Four sizes are kept with a model, until it ends or its weights move or
    change their dtype; weights that are written in place, as by `load_state_dict`, are followed.
    Where a capture fails, a warning says so and the model goes on eagerly; where memory runs out,
    the graphs are freed.

    Args:
        function: of the model and the inputs, such as its class's `predict`; returns a tensor or
            tuple of tensors, and reads no value on the host.
        model: in whatever mode, which stays: the function gets it in eval mode (see `modes`). What
            its work depends on besides weights and input (settings of a module, say) must not
            change unless `enabled` is False once.
        inputs: the first [B, C, H, W] floating.
        then: what becomes of the outputs, which is returned in their place: a hashable value with
            `__call__`, that reads nothing on the host. Where it comes again with the size, by
            `==`, it is part of the graph; else it runs after the model's.
        enabled: False runs the function and frees the model's graphs.
    """
    if not (enabled and inputs[0].is_cuda):
        _INFERENCES.pop(model, None)
    elif _suits(model, inputs[0]):
        with _LOCK:
            state, inference = (function, _weights(model)), _INFERENCES.get(model)
            if inference is None or inference.state != state:
                inference = _INFERENCES[model] = _Inference(function, model, state)
            return inference(then, inputs)
    outputs = function(evaluated(model), *inputs)
    return outputs if then is None else then(outputs)


def _suits(model: nn.Module, x: Tensor) -> bool:
    """Whether a graph would pay, and nobody else's code could be left out by it."""
    if x[:, 0].numel() > _PIXELS:
        return False
    if torch.is_grad_enabled():
        return False
    if torch.cuda.current_stream(x.device) != torch.cuda.default_stream(x.device):
        return False
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._compiled_call_impl for m in model.modules()
    )


def _weights(model: nn.Module) -> tuple:
    """Where the weights lie and how: while this stays, a graph reads the right ones."""
    tensors = chain(model.parameters(), model.buffers())
    return tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)
