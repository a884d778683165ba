"""`pytest bench`: each implementation of a case is one benchmark of the case's group.

The first benchmark of a group measures all of it, in turn (_measure.py); each then shows its own
times to pytest-benchmark and adds its row, which the JSON holds as `extra_info`.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import _measure
import pytest

_started = time.monotonic()
_clock = _measure.Recorded()
_group = {}  # the last one measured: its key, rows, times, and why the others have none
_saved = []


def pytest_addoption(parser):
    group = parser.getgroup("segkern's benchmarks")
    group.addoption("--small", action="store_true", help="one tiny case each: does it run?")
    group.addoption("--runs", type=int, help="rounds of each group (default 9, on a GPU 5 to 50)")
    group.addoption("--seconds", type=float, help="no group is started later than this")
    group.addoption("--save", action="store_true", help="append the rows to bench/results.csv")
    group.addoption("--compiled", action="store_true", help="compiled models too: takes minutes")


def pytest_configure(config):
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("bench: needs pytest-benchmark (pip install pytest-benchmark)")
    for name in vars(_measure.OPTIONS):
        setattr(_measure.OPTIONS, name, config.getoption(name))


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_clock.time))


@pytest.fixture
def measured(benchmark, pytestconfig):
    """measured(bench, case, dtype, impl, build): the benchmark of one implementation.

    `build()` gives the case's `Work`; it is called once a group.
    """

    def run(bench, case, dtype, impl, build):
        key = (bench, case, dtype)
        if _group.get("key") != key:
            limit = pytestconfig.getoption("--seconds")
            if limit is not None and time.monotonic() - _started > limit:
                pytest.skip(f"no time left after {limit:.0f} seconds")
            _group.clear()
            _group.update(key=key, rows={}, figures={}, missing={})
            _measure.free_memory()
            _measure_group(*key, build)
        if impl not in _group["rows"]:
            pytest.skip(f"{impl}: {_group['missing'].get(impl, 'segkern failed in this group')}")
        benchmark.group = " | ".join(key)
        benchmark.extra_info.update(_group["rows"][impl])
        _clock.show(benchmark, _group["figures"][impl].warm)

    return run


def _measure_group(bench, case, dtype, build):
    work = build()
    _group["figures"], _group["missing"] = _measure.measure(work)
    rows = _measure.rows(bench, case, dtype, work, _group["figures"])
    _group["rows"] = {row["impl"]: row for row in rows}
    _saved.extend(rows)


def pytest_sessionfinish(session):
    if session.config.getoption("--save"):
        _measure.append(_saved)
