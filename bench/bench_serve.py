"""A served model under load, with micro-batches and without.

Two servers of one model run side by side, each `segkern serve` in a process of its own; a client
sends bursts of pictures of two sizes, 16 at once, to one after the other. A row is the time of a
burst: pictures over it are pictures a second. Run as a script, it prints for each server p50, p95
and p99 of single requests, and pictures a second; `--save` appends them to serve.csv:

    python bench/bench_serve.py [--save] [--small]

With `--small`, and without a process each, it only shows that this works.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from _measure import DEVICE, OPTIONS, Work, append, pick, provenance

import segkern

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # support.serving
# without the packages of the extra `serve` there is nothing to measure
serving = pytest.importorskip("support.serving")
httpx = pytest.importorskip("httpx")

BATCHES = {"segkern": 8, "one by one": 1}
AT_ONCE = 16
SHARES = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}  # of single requests
COLUMNS = ("date", "commit", "impl", "case", *SHARES, "pictures_s", "runs", "device", "threads")
_open = ExitStack()  # servers


@pytest.fixture(scope="module", autouse=True)
def _closed():
    """Servers end with the file."""
    yield
    _open.close()


def settings() -> tuple[int, list[tuple[int, int]]]:
    """Pictures of a burst, and their sizes (H, W)."""
    sizes = [(480, 640), (640, 480)]
    return pick((16, [(40, 60), (60, 40)]), (64, sizes), (512, sizes))


@cache
def model_folder() -> Path:
    """A Mask2Former Swin-T for a short side of 256 pixels (of 800 on a GPU), not trained."""
    folder = Path(_open.enter_context(tempfile.TemporaryDirectory(prefix="segkern-bench-")))
    torch.manual_seed(0)
    side = {"cpu": 256, "cuda": 800}[DEVICE]
    config = segkern.Mask2FormerConfig(133, shortest_edge=side, longest_edge=2 * side)
    segkern.Mask2Former(config).save_pretrained(folder / "model")
    return folder / "model"


@cache
def server(batch: int) -> str:
    """The address of a server with batches of so many pictures."""
    if OPTIONS.small:
        return _open.enter_context(serving.in_thread(serving.quick_model, batch=batch)).url
    folder = model_folder().parent / str(batch)
    folder.mkdir()
    return _open.enter_context(serving.command(model_folder(), folder, "--batch", str(batch))).url


@cache
def files() -> tuple[bytes, ...]:
    """Pictures of each size."""
    _, sizes = settings()
    return tuple(serving.file_of(serving.picture(*size), "JPEG") for size in sizes)


def burst(url: str) -> list[float]:
    """Sends a burst; seconds of every request."""
    count, _ = settings()

    async def run():
        room, limits = asyncio.Semaphore(AT_ONCE), httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:

            async def one(i):
                async with room:
                    start = time.perf_counter()
                    data, headers = files()[i % 2], {"Content-Type": "image/jpeg"}
                    answer = await client.post("/segment", content=data, headers=headers)
                    answer.raise_for_status()
                    return time.perf_counter() - start

            return await asyncio.gather(*map(one, range(count)))

    return asyncio.run(run())


def build() -> Work:
    return Work({name: partial(burst, server(batch)) for name, batch in BATCHES.items()})


def case() -> str:
    count, ((H, W), _) = settings()
    return f"{count} pictures {W}x{H} and {H}x{W}, {AT_ONCE} at once"


@pytest.mark.parametrize("impl", BATCHES)
def test_bursts(impl, measured):
    measured("serve", case(), "float32", impl, build)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="does it run?")
    parser.add_argument("--runs", type=int, default=5, help="bursts to each server")
    parser.add_argument("--save", action="store_true", help="append to serve.csv")
    given = parser.parse_args()
    OPTIONS.small = given.small
    seconds = {name: [] for name in BATCHES}
    rates = {name: [] for name in BATCHES}
    with _open:
        for _ in range(given.runs + 1):
            for name, batch in BATCHES.items():
                start = time.perf_counter()
                found = burst(server(batch))
                rates[name].append(len(found) / (time.perf_counter() - start))
                seconds[name].append(found)
    shared = provenance() | {
        "case": case(),
        "runs": given.runs,
        "threads": torch.get_num_threads(),
    }
    rows = []
    for name in BATCHES:
        every = np.concatenate(seconds[name][1:])  # the first burst warms up
        times = {column: f"{1e3 * np.quantile(every, q):.1f}" for column, q in SHARES.items()}
        rate = f"{statistics.median(rates[name][1:]):.2f}"
        rows.append(shared | times | {"impl": name, "pictures_s": rate})
    for row in rows:
        print(", ".join(f"{name} {row[name]}" for name in ("impl", *SHARES, "pictures_s")))
    if given.save:
        append(rows, Path(__file__).with_name("serve.csv"), COLUMNS)


if __name__ == "__main__":
    main()
