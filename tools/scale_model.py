"""A model of training on many GPUs: step time, communication, memory, checkpoints, loaders.

    python tools/scale_model.py                                  # Swin-L, 1024, on 8, 64, 512 GPUs
    python tools/scale_model.py --gpus 4 --network 3 --parallel fsdp

Nothing here is measured on several GPUs. The step of one is counted launch by launch, as
bench/count_launches.py says, and taken `--slower` times as long; images a second of a core are
those of the newest row of bench/results.csv; all else is an option, whose value is an assumption.

    compute      count of one GPU's step x slower; a third of it forward
    all-reduce   2 (N - 1) / N x bytes / bandwidth + hops x latency      N GPUs
    gather       (N - 1) / N x bytes / bandwidth + hops x latency        also of a reduce-scatter
    bandwidth    a GPU's over NVLink within a machine, else the smaller of that and of all the
                 network cards of a machine together
    ddp          an all-reduce of the gradients, hidden behind backward but for the last bucket
    fsdp         a gather hidden behind forward, a gather and a scatter behind backward, but for
                 the first block; each for every block
    memory       counted at once on one GPU; with fsdp, less what the others hold of weights,
                 gradients and moments
    checkpoint   weights and moments in float32, of which each machine writes its share
"""

import argparse
import csv
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
MB = 1e6
WEIGHT, MOMENTS = 4, 8  # bytes of a parameter in float32, and of AdamW's two moments
BUCKET = 25 * MB  # of DDP
LOADER = ("loader", "COCO LSJ 1024 batch of 8, 7 objects", 8)  # bench, case, images


@dataclass
class Machine:
    """What is assumed of the machines.

    Attributes:
        per_machine: GPUs of one.
        nvlink: GB a second that collectives reach within one.
        network: GB a second of the network card of each GPU.
        latency: microseconds of a hop of a collective.
        disk: GB a second that one machine writes to where checkpoints lie.
        cores: of the CPU, for each GPU.
        slower: how many times its count a step takes.
    """

    per_machine: int = 8
    nvlink: float = 350.0
    network: float = 45.0
    latency: float = 20.0
    disk: float = 2.0
    cores: int = 12
    slower: float = 1.5


@dataclass
class Model:
    """What is counted of one GPU's step.

    Attributes:
        parameters: of the model.
        blocks: that fsdp gathers one by one.
        seconds: of a step, by count.
        memory: bytes in use at once.
        images: of the step.
    """

    parameters: int
    blocks: int
    seconds: float
    memory: float
    images: int


def plan(model: Model, machine: Machine, gpus: int, parallel: str, per_core: float) -> dict:
    """Figures of a step on so many GPUs, by their names in the table.

    Args:
        model, machine: what is counted and assumed.
        gpus: at least 1.
        parallel: "ddp" or "fsdp".
        per_core: images a second that a core reads.
    """
    machines = math.ceil(gpus / machine.per_machine)
    fast = machine.nvlink
    if machines > 1:
        fast = min(fast, machine.network * machine.per_machine)
    share, hop = (gpus - 1) / gpus, math.ceil(math.log2(gpus)) * machine.latency * 1e-6
    size = model.parameters * WEIGHT
    compute = model.seconds * machine.slower
    forward, backward = compute / 3, compute * 2 / 3

    def gather(size, times=1):
        return share * size / (fast * 1e9) + times * hop

    memory = model.memory
    if parallel == "ddp":
        sent, buckets = 2 * share * size, math.ceil(size / BUCKET)
        busy = 2 * gather(size, buckets)
        last = 2 * gather(min(size, BUCKET))
        shown = max(last, busy - backward) if gpus > 1 else 0.0
    else:
        sent = 3 * share * size
        once, first = gather(size, model.blocks), gather(size / model.blocks)
        busy = 3 * once
        shown = max(first, once - forward) + max(first, 2 * once - backward)
        shown = shown if gpus > 1 else 0.0
        memory -= share * model.parameters * (2 * WEIGHT + MOMENTS)
    step, images = compute + shown, model.images * gpus
    saved = model.parameters * (WEIGHT + MOMENTS)
    return {
        "GPUs": gpus,
        "images a step": images,
        "step ms": 1e3 * step,
        "sent MB a GPU": sent / MB,
        "communication ms": 1e3 * busy,
        "not hidden ms": 1e3 * shown,
        "efficiency %": 100 * compute / step,
        "images/s": images / step,
        "loader cores a GPU": model.images / step / per_core,
        "memory GB": memory / 1e9,
        "checkpoint GB": saved / 1e9,
        "written in s": saved / 1e9 / (machine.disk * machines),
    }


def limits(figures: dict, machine: Machine) -> list[str]:
    """What holds a plan up, in words."""
    found = []
    if figures["not hidden ms"] > 0.1 * figures["step ms"]:
        found.append("communication is not hidden: more images a GPU, or --accumulate")
    if (cores := figures["loader cores a GPU"]) > machine.cores:
        found.append(f"reading needs {cores:.1f} cores a GPU of {machine.cores}")
    return found


def images_a_second(path: Path = ROOT / "bench" / "results.csv") -> tuple[float, str]:
    """That a core reads, and where it was measured."""
    bench, case, images = LOADER
    with path.open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["bench"], row["case"], row["impl"]) == (bench, case, "segkern")
        ]
    row = rows[-1]
    return images / float(row["p50_ms"]) * 1e3, f"{row['device']}, {row['date']}"


def counted(backbone: str, size: int, images: int) -> Model:
    """A training step of a Mask2Former in bf16 on one imaginary GPU; half a minute."""
    sys.path.insert(0, str(ROOT / "bench"))
    import count_launches
    import torch

    from segkern.models import Mask2Former, Mask2FormerConfig
    from segkern.training.sharded import units

    config = Mask2FormerConfig.preset(backbone)
    with torch.device("meta"):
        model = Mask2Former(config)
    rates = count_launches.Rates()
    count = count_launches.counted(config, "training step", (size, size), images, "bf16", rates)
    return Model(
        parameters=sum(p.numel() for p in model.parameters()),
        blocks=len(list(units(model))),
        seconds=sum(total.estimate for total in count.totals.values()),
        memory=count.live.most,
        images=images,
    )


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    for row in rows:
        cells = (
            f"{v}" if isinstance(v, int) else f"{v:.3g}" if v < 100 else f"{v:.0f}"
            for v in row.values()
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="swin_large", help="of a Mask2Former preset")
    parser.add_argument("--size", type=int, default=1024, help="of the images")
    parser.add_argument("--images", type=int, default=2, help="of a GPU's step")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--parallel", nargs="+", default=["ddp", "fsdp"])
    assumed = Machine()
    for field in fields(Machine):
        value = getattr(assumed, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=value)
    options = parser.parse_args(arguments)
    machine = replace(assumed, **{f.name: getattr(options, f.name) for f in fields(Machine)})
    model = counted(options.backbone, options.size, options.images)
    per_core, where = images_a_second()
    print(
        f"{model.parameters / 1e6:.0f} M parameters in {model.blocks} blocks; a step of "
        f"{model.images} images is counted as {1e3 * model.seconds:.0f} ms"
    )
    print(f"assumed: {machine}")
    print(f"measured: {per_core:.0f} images/s a core ({where})")
    for parallel in options.parallel:
        rows = [plan(model, machine, gpus, parallel, per_core) for gpus in options.gpus]
        print(f"\n--parallel {parallel}\n\n{table(rows)}")
        for row in rows:
            for text in limits(row, machine):
                print(f"{row['GPUs']} GPUs: {text}")


if __name__ == "__main__":
    main()
