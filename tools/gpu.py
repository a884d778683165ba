"""python tools/gpu.py [OUT]: all that a machine with a GPU is asked, in under ten minutes.

Tests on cuda and compute-sanitizer side by side, then every benchmark on its own. Nothing is
built or installed: the interpreter that runs this needs torch with CUDA, pytest, pytest-benchmark
and the built package beside this folder. A stage that fails or takes too long is reported, and the
others still run. Into OUT (build/gpu):

    log.txt      what every stage printed
    bench.json   pytest-benchmark's JSON of all benchmarks
    rows.csv     their rows, as in bench/results.csv
    goals.txt    stages, and goals beside what was measured
"""

import contextlib
import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import goals  # noqa: E402  (beside the benchmarks)

TOTAL = 580.0  # seconds
TESTS = 280.0  # of them for all test stages, which run side by side
TEST = 190.0  # for each of these
# what decides most, first: of the tests, the op files after those of the GPU; of the benchmarks,
# with their shares of the time that is left. Others follow by name, with a share of 1.
FIRST = ["masked_attn", "ms_deform_attn", "window_attn", "point_mask_loss", "matching_cost"]
SHARES = {"mask2former": 6, "masked_attn": 7, "ms_deform_attn": 2, "window_attn": 2}
SHARES |= {"point_mask_loss": 1, "matching_cost": 1, "linear_assignment": 1, "segment_map": 1}
SHARES |= {"segmenter": 3, "criterion": 2, "modules": 2}
INTERRUPTED = 15.0  # seconds in which an interrupted stage may write its results
SANITIZERS = ("memcheck", "racecheck")
BAD = 86  # exit status of a sanitizer that found something
REFUSED = "Device not supported"  # says a sanitizer that cannot work on a machine
TABLE = ["--benchmark-columns=median,iqr,rounds", "--benchmark-sort=name"]


@dataclass
class Stage:
    """A command, the seconds that it may take, and what became of it."""

    name: str
    command: list[str]
    seconds: float
    is_test: bool = True
    env: dict[str, str] = field(default_factory=dict)
    status: str = ""
    took: float = 0.0

    @property
    def bad(self) -> bool:
        return self.is_test and not self.status.startswith(("ok", "skipped"))


class Run:
    """Runs stages until the time is over, and keeps what they print in `log`."""

    def __init__(self, log: Path, total: float = TOTAL):
        self.end = time.monotonic() + total
        self.kept = total * (1 - TESTS / TOTAL)  # for what comes after the tests
        self.log = log
        self.stages: list[Stage] = []
        self._lock = threading.Lock()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")

    def left(self, tests: bool = False) -> float:
        return self.end - time.monotonic() - (self.kept if tests else 0)

    def __call__(self, stage: Stage) -> Stage:
        self.stages.append(stage)
        start, limit = time.monotonic(), min(stage.seconds, self.left(stage.is_test))
        if limit < 1:
            stage.status = "not started: no time left"
            return stage
        with tempfile.TemporaryFile("w+", errors="replace") as out:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env=environment() | stage.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # a shell's background job ignores it, and would hand that on
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
            try:
                code = process.wait(limit)
                stage.status = "ok" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                stage.status = f"stopped after {limit:.0f} s"
                stop(process)
            stage.took = time.monotonic() - start
            out.seek(0)
            printed = out.read()
        if stage.name in SANITIZERS and REFUSED in printed:
            stage.status = f"skipped: {REFUSED}"
        with self._lock, self.log.open("a") as log:
            log.write(f"==== {stage.name}: {stage.status}, {stage.took:.0f} s\n{printed}\n")
        print(f"{stage.name:28} {stage.took:5.0f} s  {stage.status}", flush=True)
        return stage


def environment() -> dict[str, str]:
    """The package beside this folder, and cuBLAS as torch wants it where determinism is asked."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return dict(os.environ) | settings


def stop(process: subprocess.Popen) -> None:
    """Interrupts a stage, which may then still write its results, and ends what it left."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(INTERRUPTED)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *arguments]


def test_stages() -> list[Stage]:
    """The op tests on cuda, a process each because an illegal access ends the process's use of
    the device; the tests of the GPU; some of these under the sanitizers."""
    marked = [
        str(p) for p in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in p.read_text()
    ]
    stages = [Stage("tests of the GPU", pytest(*marked, "-m", "gpu", "-rs"), TEST)]
    ops = {p.stem for p in (ROOT / "segkern/ops").glob("[!_]*.py")}
    for op in [*FIRST, *sorted(ops - set(FIRST))]:
        command = pytest(
            f"tests/ops/test_{op}.py", "--device", "cuda", "-m", "not gpu and not slow"
        )
        stages.append(Stage(f"{op} on cuda", [*command, "-rs"], TEST))
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in SANITIZERS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(BAD), "--print-limit", "20"]
        command += ["--target-processes", "application-only"]
        command += pytest("tests/gpu/test_gpu.py", "-k", "agrees_with_the_cpu_kernel and odd")
        # each tensor an allocation of its own, so that its end is seen
        stage = Stage(tool, command, TEST, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        stage.status = "" if Path(sanitizer).exists() else "skipped: no compute-sanitizer"
        stages.append(stage)
    return stages


def run_tests(run: Run) -> None:
    stages = test_stages()
    run.stages += [s for s in stages if s.status]
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        list(pool.map(run, [s for s in stages if not s.status]))


def run_benchmarks(run: Run, folder: Path) -> None:
    """Every bench file on its own, within its share of what is left of the time."""
    found = {p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")}
    names = [*SHARES, *sorted(found - SHARES.keys())]
    for i, name in enumerate(names):
        shares = [SHARES.get(other, 1) for other in names[i:]]
        seconds = (run.left() - INTERRUPTED) * shares[0] / sum(shares)
        command = pytest(f"bench/bench_{name}.py", "-rs", *TABLE)
        command += ["--seconds", f"{0.7 * seconds:.0f}", f"--benchmark-json={folder}/{name}.json"]
        run(Stage(f"bench {name}", command, seconds, is_test=False))


def gather(folder: Path, out: Path) -> list[dict]:
    """Joins the JSON files in `folder`; writes bench.json and rows.csv, returns the rows."""
    found = [p for p in sorted(folder.glob("*.json")) if p.stat().st_size]
    files = [json.loads(p.read_text()) for p in found]
    whole = dict(files[0]) if files else {}
    whole["benchmarks"] = [b for f in files for b in f["benchmarks"]]
    (out / "bench.json").write_text(json.dumps(whole, indent=1) + "\n")
    rows = goals.read([out / "bench.json"])
    with (out / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def report(run: Run, rows: list[dict]) -> str:
    lines = [f"{s.name:28} {s.took:5.0f} s  {s.status}" for s in run.stages]
    if rows:
        lines += ["", f"{rows[0]['device']}, torch {rows[0]['torch']}", "", goals.table(rows)]
    return "\n".join(lines)


CHECK = """
import torch, segkern.ops, segkern.ops._library as library
torch.cuda.is_available() or exit("torch finds no CUDA device")
for name, value in library.info().items():
    print(f"{name:20}", value)
"cuda" in library.MISSING and exit("CUDA kernels: " + library.MISSING["cuda"])
"""


def main() -> int:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/gpu").absolute()
    for module in ("torch", "pytest", "pytest_benchmark"):
        if importlib.util.find_spec(module) is None:
            print(f"make gpu: {sys.executable} has no {module}")
            return 2
    run = Run(out / "log.txt")
    check = run(Stage("check", [sys.executable, "-c", CHECK], 60))
    if check.bad:
        print(run.log.read_text())
        return 2
    run_tests(run)
    with tempfile.TemporaryDirectory() as folder:
        run_benchmarks(run, Path(folder))
        rows = gather(Path(folder), out)
    text = report(run, rows)
    (out / "goals.txt").write_text(text + "\n")
    print(f"\n{text}\n\nIn {out}: log.txt bench.json rows.csv goals.txt")
    return 1 if any(stage.bad for stage in run.stages) else 0


if __name__ == "__main__":
    sys.exit(main())
