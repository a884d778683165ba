"""Each test starts from one seed, with two threads, and sees NaN in memory left unwritten.

With `--device cuda` it also makes its tensors there, and what is about the CPU alone is left out.
Under TRITON_INTERPRET=1 the Triton kernels stand in for the C++ ones: `make interpret` runs the
tests of their ops a second time, in Triton's interpreter.
"""

import importlib
import os

# before the libraries are loaded
os.environ.setdefault("SEGKERN_POISON", "1")  # C++ scratch and outputs
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin starve a shared core

import pytest
import torch

from segkern.ops import _library
from support.cuda import everywhere, stubbed  # noqa: F401  (fixtures)

if os.environ.get("TRITON_INTERPRET") == "1":
    _interpreted = torch.library.Library("segkern", "IMPL")
    for _op, _module in _library.TRITON.items():
        _launcher = getattr(importlib.import_module(f"segkern.kernels.{_module}"), _op)
        _interpreted.impl(_op, _launcher, "CPU", allow_override=True)
    from segkern.kernels import segment_map as _maps

    # it takes as long for a tile of any size; few programs, so that each has several tiles
    _maps.TILE, _maps.PRODUCT, _maps.WORDS, _maps.PROGRAMS = (64, 128), (32, 128), 512, 3


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where tests make their tensors"
    )


def pytest_configure(config):
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


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(2)


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
