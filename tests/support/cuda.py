"""torch.cuda on a machine without a GPU: graphs that note their ops and run them again."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


class Copies(TorchDispatchMode):
    """Gathers the ops that read a tensor on the CPU and write one elsewhere."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, written = (
            {
                t.device.type
                for t in pytree.tree_leaves(x)
                if isinstance(t, torch.Tensor) and t.ndim
            }
            for x in ((args, kwargs), out)
        )
        if "cpu" in read and written - {"cpu"}:
            self.seen.append(func)
        return out


class Graph(TorchDispatchMode):
    """As a CUDA graph on a CPU: notes every op that runs in the capture and runs them again, each
    from and to the memory that it had."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.notes.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.no_grad():
            for op, args, kwargs, out in self.notes:
                new = op(*args, **kwargs)
                for kept, value in zip(pytree.tree_leaves(out), pytree.tree_leaves(new)):
                    if isinstance(kept, torch.Tensor) and kept.data_ptr() != value.data_ptr():
                        kept.copy_(value)


@pytest.fixture
def stubbed(monkeypatch):
    """torch.cuda without a GPU, with such graphs; lists what was captured."""
    captured = []

    @contextlib.contextmanager
    def capture(graph, **options):
        graph.pool = options["pool"]
        captured.append(graph)
        with graph:
            yield

    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, other):
            pass

    default = Stream()
    for name, value in {
        "graph": capture,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": lambda *_: default,
        "default_stream": lambda *_: default,
        "stream": lambda s: contextlib.nullcontext(),
        "device": lambda d: contextlib.nullcontext(),
        "graph_pool_handle": object,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return captured


@pytest.fixture
def everywhere(stubbed, monkeypatch):
    """Every tensor says it is on a GPU."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    return stubbed


def alive(graphs_seen):
    """Gives how many of these graphs are still kept; the list is emptied."""
    refs = [weakref.ref(graph) for graph in graphs_seen]
    graphs_seen.clear()

    def count():
        gc.collect()
        return sum(ref() is not None for ref in refs)

    return count
