"""Times implementations in turn, in one process, and appends the rows to bench/results.csv.

A row is one implementation of one case: p20/p50/p80 in milliseconds over alternating runs, the
ratio of its median to segkern's in the same run, peak memory where measured, where and when.
"""

import argparse
import csv
import datetime
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = [
    "date",
    "commit",
    "bench",
    "case",
    "dtype",
    "impl",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "runs",
    "ratio",
    "peak_mb",
    "device",
    "threads",
    "torch",
    "transformers",
]


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
    )
    return run.stdout.strip()


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()} {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor()


def _once(function: Callable) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(
    bench: str,
    case: str,
    dtype: str,
    impls: dict[str, Callable],
    runs: int = 9,
    peak_mb: dict[str, float] | None = None,
) -> list[dict]:
    """Times `impls` in turn, A B C A B C ..., after one warm-up each; the first is segkern.

    Returns:
        One row (column name to value) an implementation; `ratio` is its median over segkern's.
    """
    for function in impls.values():
        function()
    times = {name: [] for name in impls}
    for _ in range(runs):
        for name, function in impls.items():
            times[name].append(_once(function))
    ours = torch.tensor(next(iter(times.values()))).median().item()
    rows = []
    for name, values in times.items():
        p20, p50, p80 = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "commit": _commit(),
                "bench": bench,
                "case": case,
                "dtype": dtype,
                "impl": name,
                "p20_ms": f"{p20:.3f}",
                "p50_ms": f"{p50:.3f}",
                "p80_ms": f"{p80:.3f}",
                "runs": runs,
                "ratio": f"{p50 / ours:.2f}",
                "peak_mb": f"{peak_mb[name]:.0f}" if peak_mb else "",
                "device": _device(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": _version("transformers"),
            }
        )
        print(
            f"{bench:22} {case:34} {dtype:9} {name:24} {p50:10.3f} ms  x{p50 / ours:.2f}",
            flush=True,
        )
    return rows


def append(rows: list[dict], path: Path = RESULTS) -> None:
    """Appends rows to the CSV file; the header is written once."""
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main(run: Callable[[int], list[dict]], description: str) -> None:
    """The command line of every benchmark: `python bench/bench_NAME.py [--runs N] [--save]`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each implementation")
    parser.add_argument("--save", action="store_true", help="append the rows to results.csv")
    options = parser.parse_args()
    rows = run(options.runs)
    if options.save:
        append(rows)
