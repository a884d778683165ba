"""Each test starts from one seed and sees NaN in memory left unwritten.

`--seed` draws other inputs. After the tests stands, for each file, the largest share that an error
had of what tests/support/comparison.py allows: how near the next machine may come to a failure.
With `--device cuda` it also makes its tensors there, and what is about the CPU alone is left out.
Under TRITON_INTERPRET=1 the Triton kernels stand in for the C++ ones: `make interpret` runs the
tests of their ops a second time, in Triton's interpreter.
"""

import importlib
import itertools
import os

# before the libraries are loaded
os.environ.setdefault("SEGKERN_POISON", "1")  # C++ scratch and outputs
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin starve a shared core

import pytest
import torch

from segkern.ops import _library
from support import comparison, inputs
from support.cuda import everywhere, stubbed  # noqa: F401  (fixtures)

if os.environ.get("TRITON_INTERPRET") == "1":
    _interpreted = torch.library.Library("segkern", "IMPL")
    for _op, _module in _library.TRITON.items():
        _launcher = getattr(importlib.import_module(f"segkern.kernels.{_module}"), _op)
        _interpreted.impl(_op, _launcher, "CPU", allow_override=True)
    import numpy as np
    from triton.runtime import interpreter

    from segkern.kernels import _launch
    from segkern.kernels import neighborhood_attn as _near
    from segkern.kernels import segment_map as _maps
    from segkern.kernels import window_attn as _windows

    def _product(self, a, b, d, *_):
        """Rounded once: numpy rounds the same sums in tiles of other shapes otherwise."""
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = _product

    # few programs, so that each has several windows
    _windows.device = _near.device = lambda tensor: _launch.Device("227 KB", 4)

    # it takes as long for a tile of any size; few programs, so that each has several tiles
    _launch.ASSUMED = _launch.ASSUMED._replace(multiprocessors=2)
    _maps.TILE, _maps.PRODUCT, _maps.WORDS, _maps.PROGRAMS = (64, 128), (32, 128), 512, 3


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where tests make their tensors"
    )

    parser.addoption("--seed", type=int, default=0, help="of the inputs that tests draw")


def pytest_configure(config):
    inputs.SEED = config.getoption("--seed")
    with torch.device("cpu"):
        torch.empty(0)  # torch lists its constructors now, before a test patches one of them


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") != "cpu":
        alone = [item for item in items if item.get_closest_marker("cpu_only")]
        config.hook.pytest_deselected(items=alone)
        items[:] = [item for item in items if item not in alone]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device (run by `make gpu`)"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before fixtures of any scope: kernels are seen to share their work out; elsewhere threads of
    tests that run side by side would wait for each other."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    torch.set_num_threads(2 if alone or item.path.parent.name == "ops" else 1)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(inputs.SEED)


@pytest.fixture(autouse=True)
def _largest_share(request, record_property):
    comparison.shares.clear()
    yield
    if comparison.shares:
        record_property("share", max(comparison.shares))


def pytest_terminal_summary(terminalreporter):
    largest = {}
    for report in itertools.chain(*terminalreporter.stats.values()):
        name, _, test = getattr(report, "nodeid", "").partition("::")
        for key, share in getattr(report, "user_properties", ()):
            if key == "share" and share >= largest.get(name, (0.0, ""))[0]:
                largest[name] = share, test
    if largest:
        terminalreporter.write_line("largest share of the error that rounding allows:")
    for name, (share, test) in sorted(largest.items()):
        terminalreporter.write_line(f"  {share:.2f}  {name}  {test}")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """What is remembered of maps stays out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _device(request):
    device = request.config.getoption("--device")
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch):
    """torch.empty and its kin give NaN when segkern's Python calls them."""
    import sys

    def poisoned(function):
        def wrapper(*args, **kwargs):
            out = function(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("segkern") and out.is_floating_point():
                out.fill_(float("nan"))
            return out

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
