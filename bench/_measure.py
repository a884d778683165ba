"""How every benchmark measures: implementations of one case in turn, one row of figures each.

Timing an implementation at a time would compare moments of a machine that is shared; here every
round times each of them once, A B C A B C ... pytest-benchmark, which cannot alternate, is shown
the times afterwards (`Recorded`). On a GPU a time is that of a CUDA graph's replay between two
events, or of eager launches where the work cannot be captured; the row says which.
"""

import csv
import datetime
import functools
import gc
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import torch

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = [
    *("date", "commit", "bench", "case", "dtype", "impl", "p20_ms", "p50_ms", "p80_ms", "runs"),
    *("ratio", "peak_mb", "device", "threads", "torch", "transformers", "how", "first_ms"),
    *("cold_ms", "bytes", "flops", "copy_gbs", "matmul_tflops", "roofline", "triton", "packages"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = SimpleNamespace(small=False, runs=None, compiled=False)  # set by conftest.py
PASSES = {"forward": "", "forward+backward": " forward+backward"}  # how a case is called
PACKAGES = ("scipy", "torch-linear-assignment", "openvino", "onnxruntime")
FLUSH_BYTES = 2**28  # twice the largest L2 cache
CACHED = 5e-3  # seconds: what takes longer leaves nothing in the cache for its next run


@dataclass
class Work:
    """What one case compares.

    Attributes:
        impls: the function to time of each implementation, "segkern" first; or, as a string, why
            a peer cannot be timed.
        bytes: the least that the algorithm reads and writes.
        flops: what it computes.
        rate: dtype of the matrix product that `flops` are compared with.
        peaks: peak memory in MB, where it was measured in processes of their own.
        threads: of the CPU, for this case; None leaves them.
        clock: gives seconds on the CPU; `time.process_time` those that the process computed, which
            also count where others use the machine.
    """

    impls: dict[str, Callable | str]
    bytes: float = 0
    flops: float = 0
    rate: torch.dtype = torch.float32
    peaks: dict[str, float] = field(default_factory=dict)
    threads: int | None = None
    clock: Callable[[], float] = time.perf_counter


@dataclass
class Figures:
    """What was measured of one implementation; times in seconds."""

    warm: list[float]
    cold: list[float]
    first: float
    peak_mb: float | None
    how: str


class Recorded:
    """A clock for pytest-benchmark on which times that were measured before pass again."""

    def __init__(self):
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def show(self, benchmark, times: list[float]) -> None:
        left = iter(times)

        def once():
            self.now += next(left)

        benchmark.pedantic(once, rounds=len(times), iterations=1)


def pick(small, cpu, cuda):
    """The cases of this run: of `--small`, of a CPU or of a CUDA device."""
    return small if OPTIONS.small else {"cpu": cpu, "cuda": cuda}[DEVICE]


def largest(batches: dict[int, float]) -> int:
    """Of batches and the GB of memory that each takes at most, as count_launches.py counts them,
    the largest that the device holds, or else the smallest. 2 GB are left for the CUDA context,
    for workspaces of libraries and for gaps."""
    room = float("inf")
    if DEVICE == "cuda":
        room = torch.cuda.get_device_properties().total_memory / 1e9 - 2
    return max((b for b, need in batches.items() if need <= room), default=min(batches))


def repeated(values: list, B: int) -> list:
    """Inputs of one image for B images; made on the CPU, a large batch would take seconds."""
    return [
        v.to(DEVICE).repeat(B, *[1] * (v.ndim - 1)) if isinstance(v, torch.Tensor) else v
        for v in values
    ]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def step(function: Callable, leaves: list, parameters: Sequence[torch.Tensor] = ()) -> Callable:
    """Forward and backward of `function(*leaves)`: the gradients of leaves and parameters, from
    random ones of its result (a tensor or several)."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    start = []

    def run():
        out = function(*leaves)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        if not start:
            start.extend(torch.randn_like(o) for o in out)
        torch.autograd.grad(out, [*leaves, *parameters], start, allow_unused=True)

    return run


def package(name: str) -> str:
    """The installed version of a package; empty where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _timed(
    function: Callable,
    repeat: int = 1,
    flush: torch.Tensor | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds a call: between two events of the device, or by a clock of the host."""
    if DEVICE == "cpu":
        start = clock()
        for _ in range(repeat):
            function()
        return (clock() - start) / repeat
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is not None:
        flush.zero_()
    start.record()
    for _ in range(repeat):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeat


def free_memory() -> None:
    """Gives back what the group before still holds."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


@functools.cache
def limits(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and FLOP a second of a product, measured."""
    n, side = pick((2**20, 64), (2**26, 1024), (2**30, 8192))
    source = torch.ones(n, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=DEVICE).to(dtype)
    out = torch.empty_like(a)
    speeds = []
    for work, function in ((2 * n, lambda: target.copy_(source)),) + (
        (2 * side**3, lambda: torch.mm(a, b, out=out)),
    ):
        times = [_timed(function) for _ in range(8)]
        speeds.append(work / statistics.median(times[3:]))
    return speeds[0], speeds[1]


def _replay(function: Callable) -> tuple[Callable, str]:
    """What to time and how: a captured "graph", "eager" with the reason, "cpu"."""
    if DEVICE == "cpu":
        return function, "cpu"
    try:
        # what synchronises is found here: a failed capture may leave generators unusable
        torch.cuda.set_sync_debug_mode("error")
        function()
        torch.cuda.set_sync_debug_mode("default")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except Exception as error:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        return function, f"eager: {_reason(error)}"
    return graph.replay, "graph"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]


def _peak_mb(function: Callable) -> float | None:
    """Megabytes of the device above what was allocated before; None on the CPU."""
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _prepare(function: Callable) -> tuple[Callable, Figures]:
    start = time.perf_counter()
    function()
    _synchronize()
    first = time.perf_counter() - start
    peak = _peak_mb(function)
    run, how = _replay(function)
    return run, Figures([], [], first, peak, how)


def measure(work: Work) -> tuple[dict[str, Figures], dict[str, str]]:
    """Times the implementations in turn.

    Returns:
        The figures of each implementation that ran, and why each of the others did not.

    Raises:
        Exception: what "segkern" raised; a peer that raises is only left out.
    """
    threads = torch.get_num_threads()
    if work.threads is not None:
        torch.set_num_threads(work.threads)
    runs, figures, missing = {}, {}, {}
    for name, function in work.impls.items():
        if isinstance(function, str):
            missing[name] = function
            continue
        try:
            runs[name], figures[name] = _prepare(function)
        except Exception as error:
            if name == "segkern":
                raise
            missing[name] = _reason(error)
            free_memory()
    for name, peak in work.peaks.items():
        if name in figures:
            figures[name].peak_mb = peak
    _alternate(runs, figures, work.clock)
    torch.set_num_threads(threads)
    return figures, missing


def _alternate(runs: dict[str, Callable], figures: dict[str, Figures], clock: Callable) -> None:
    once = {name: _timed(run) for name, run in runs.items()}
    # short work is repeated up to a millisecond, which events and clocks resolve well
    repeat = {name: min(50, max(1, math.ceil(1e-3 / max(t, 1e-9)))) for name, t in once.items()}
    flush = torch.empty(FLUSH_BYTES if DEVICE == "cuda" else 0, dtype=torch.uint8, device=DEVICE)
    rounds = OPTIONS.runs
    if rounds is None:
        a_round = sum(once[name] * (repeat[name] + 1) for name in runs)
        rounds = pick(2, 9, min(30, max(5, round(0.4 / a_round))))
    brief = {name: run for name, run in runs.items() if DEVICE == "cuda" and once[name] < CACHED}
    for _ in range(rounds):
        for name, run in runs.items():
            if name in brief:
                run()  # its inputs are in the cache where they fit
            figures[name].warm.append(_timed(run, repeat[name], clock=clock))
    for _ in range(rounds):
        for name, run in brief.items():
            figures[name].cold.append(_timed(run, 1, flush))


def rows(bench: str, case: str, dtype: str, work: Work, figures: dict[str, Figures]) -> list[dict]:
    """One row, column name to text, for each implementation; `ratio` is to segkern's median."""
    copy, product = limits(work.rate)
    floor = max(work.bytes / copy, work.flops / product)
    ours = statistics.median(figures["segkern"].warm)
    out = []
    for name, f in figures.items():
        quantiles = torch.tensor(f.warm).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        p50 = statistics.median(f.warm)
        against = statistics.median(f.cold) if f.cold else p50
        row = provenance() | {
            "bench": bench,
            "case": case,
            "dtype": dtype,
            "impl": name,
            "runs": len(f.warm),
            "ratio": f"{p50 / ours:.2f}",
            "peak_mb": "" if f.peak_mb is None else f"{f.peak_mb:.0f}",
            "threads": work.threads or torch.get_num_threads(),
            "how": "CPU time" if work.clock is time.process_time else f.how,
            "first_ms": f"{1e3 * f.first:.3f}",
            "cold_ms": f"{1e3 * against:.4f}" if f.cold else "",
            "bytes": f"{work.bytes:.0f}" if floor else "",
            "flops": f"{work.flops:.0f}" if floor else "",
            "copy_gbs": f"{copy / 1e9:.0f}",
            "matmul_tflops": f"{product / 1e12:.2f}",
            "roofline": f"{floor / against:.3f}" if floor else "",
        }
        digits = 3 if DEVICE == "cpu" else 4
        for column, value in zip(("p20_ms", "p50_ms", "p80_ms"), quantiles):
            row[column] = f"{1e3 * value:.{digits}f}"
        out.append({column: str(row[column]) for column in COLUMNS})
    return out


@functools.cache
def provenance() -> dict[str, str]:
    """Where and when, with which versions."""
    packages = ((name, package(name)) for name in PACKAGES)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("SEGKERN_COMMIT") or _commit(),
        "device": _device(),
        "torch": torch.__version__,
        "transformers": package("transformers"),
        "triton": package("triton"),
        "packages": " ".join(f"{name} {v}" for name, v in packages if v),
    }


def _commit() -> str:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=RESULTS.parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return ""
    return run.stdout.strip()


def _device() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()} {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor()


def append(new: list[dict], path: Path = RESULTS, columns: Sequence[str] = COLUMNS) -> None:
    """Appends rows to a CSV file; the header is written once."""
    fresh = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        if fresh:
            writer.writeheader()
        writer.writerows(new)
