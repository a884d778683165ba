"""Where the time of an inference or a training step goes: by module, by op, matrix products apart.

    python bench/profile_model.py                              # both implementations, 512 x 512
    python bench/profile_model.py --kind "training step" --batch 2 --dtype bfloat16 --impl segkern
    python bench/profile_model.py --save build/before.json           # and, after a change:
    python bench/profile_model.py --against build/before.json        # what became of each op

On a GPU, where torch finds one, times are those of the device. Modules count what they call in
forward; backward is in the table of ops alone. Profiling slows small ops down: the first line is
the time without it. (A file of the name profile.py would hide Python's own module.)
"""

import argparse
import json
import time
from pathlib import Path

import _models
import torch
from torch.profiler import ProfilerActivity, profile, record_function

PRODUCTS = ("mm", "convolution", "linear")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def mark_modules(model: torch.nn.Module, depth: int) -> None:
    """Ranges named after the modules down to `depth`, as the profiler shows them."""
    for path, module in model.named_modules():
        if not path or path.count(".") >= depth:
            continue
        running = []

        def enter(*_, path=path, running=running):
            running.append(record_function(f"module {path}"))
            running[-1].__enter__()

        def leave(*_, running=running):
            running.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def measured(run, runs: int) -> float:
    """Milliseconds, the median of some runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[len(times) // 2]


def profiled(run) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of each module, with what it calls, and of each op, without."""
    activities = [ProfilerActivity.CPU]
    if DEVICE == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        run()
    on = "device" if DEVICE == "cuda" else "cpu"
    modules, ops = {}, {"between ops": 0.0}
    for event in profiler.key_averages():
        own = getattr(event, f"self_{on}_time_total") / 1000
        if event.key.startswith("module "):
            modules[event.key.removeprefix("module ")] = getattr(event, f"{on}_time_total") / 1000
            ops["between ops"] += own
        else:
            ops[event.key.removeprefix("aten::")] = own
    return modules, ops


def is_product(op: str) -> bool:
    """Whether an op is a matrix product or a convolution, forward or backward."""
    return any(part in op for part in PRODUCTS)


def table(title: str, times: dict[str, float], whole: float, earlier: dict, rows: int) -> None:
    print(f"\n{title:<52} {'ms':>9} {'share':>7}{'   earlier ms' if earlier else ''}")
    for name, value in sorted(times.items(), key=lambda x: -x[1])[:rows]:
        before = f"{earlier.get(name, 0):13.1f}" if earlier else ""
        print(f"{name[:52]:<52} {value:9.1f} {value / whole:7.1%}{before}")


def report(impl: str, case: tuple, options, earlier: dict) -> dict:
    """Prints the tables of one implementation; returns what --save keeps."""
    run = _models.build(impl, _models.weights(options.backbone), *case, DEVICE)
    for _ in range(2):
        run()
    alone = measured(run, options.runs)
    mark_modules(run.model, options.depth)
    modules, ops = profiled(run)
    whole = sum(ops.values())
    products = sum(v for k, v in ops.items() if is_product(k))
    print(
        f"\n== {impl}: {alone:.1f} ms; matrix products {products:.1f} ms ({products / whole:.0%})"
    )
    table("module, with what it calls", modules, whole, earlier.get("modules", {}), options.rows)
    table("op, without what it calls", ops, whole, earlier.get("ops", {}), options.rows)
    return {"ms": alone, "modules": modules, "ops": ops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--impl", nargs="+", default=["segkern", "transformers"])
    parser.add_argument("--kind", default="inference", choices=("inference", "training step"))
    parser.add_argument("--backbone", default="swin_tiny")
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="height [width]")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--depth", type=int, default=2, help="of the modules shown")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    earlier = json.loads(options.against.read_text()) if options.against else {}
    case = (options.kind, options.size[0], options.size[-1], options.batch, options.dtype)
    found = {impl: report(impl, case, options, earlier.get(impl, {})) for impl in options.impl}
    if options.save:
        options.save.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
