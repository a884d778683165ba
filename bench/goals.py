"""python bench/goals.py FILE.json...: what was measured, beside what is aimed at.

The goals are the project's definition of "fast": ratios of medians in one run on one machine.
Of several cases the worst decides, and the range is shown.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Goal:
    """One line of the table.

    Attributes:
        device: "cpu" or "cuda".
        work: what is aimed at, in words.
        bench, case, dtype: which rows, as regular expressions that match in full.
        peer: the implementation that is compared with; empty where only the roofline counts.
        ratio: how many times faster, at least.
        memory: share of the peer's peak memory, at most.
        roofline: share of the roofline's speed, at least.
        graph: whether segkern must have run as one CUDA graph.
    """

    device: str
    work: str
    bench: str
    case: str
    dtype: str
    peer: str = ""
    ratio: float | None = None
    memory: float | None = None
    roofline: float | None = None
    graph: bool = False


F32, BF16, HALF = "float32", "bfloat16", "bfloat16 weights"
BOTH = r" forward\+backward"
THEIRS, COMPILED = "transformers", "transformers, compiled"
ORIGINAL = "original CUDA op"
SWIN, ANY = "mask2former swin_tiny", "mask2former (swin_tiny|resnet50)"
PYRAMID = "maskformer swin_tiny"
MASKED = rf"B=16 S=\d+ open=\d+% with its mask{BOTH}"
DEFORM = "B=16 1024x1024"
STEP, INFERENCE = "training step 1024 B=8 T=16", "inference (1024|800x1344) B=1"

GOALS = [
    Goal("cpu", "Swin-T inference 512", SWIN, "inference 512 B=1", F32, THEIRS, 3),
    Goal("cpu", "Swin-T inference 1024", SWIN, "inference 1024 B=1", F32, THEIRS, 3.5),
    Goal(
        "cpu", "Swin-T, bfloat16", SWIN, "inference (512|1024) B=1", HALF, THEIRS + ", float32", 7
    ),
    Goal("cpu", "Swin-T inference", SWIN, "inference (512|1024) B=1", F32, "OpenVINO", 1.5),
    Goal("cpu", "Swin-T, bfloat16", SWIN, "inference (512|1024) B=1", HALF, "OpenVINO", 2),
    Goal("cpu", "Swin-T step 512", SWIN, "training step 512 B=2 T=16", F32, THEIRS, 3, 0.35),
    Goal("cpu", "accelerated", "accelerate mask2former", "inference 512 B=1", F32, THEIRS, 1.8),
    Goal("cpu", "accelerated", "accelerate mask2former", "training step 512 B=2", F32, THEIRS, 2),
    Goal("cpu", "MaskFormer 512", PYRAMID, "inference 512 B=1", F32, THEIRS, 2.5),
    Goal("cpu", "MaskFormer 512", PYRAMID, "inference 512 B=1", F32, "OpenVINO", 1.3),
    Goal("cpu", "panoptic maps", "segment_map", "panoptic.*1024x2048.*", F32, THEIRS, 20),
    Goal("cpu", "instance maps", "segment_map", "instance.*1024x2048.*", F32, THEIRS, 10),
    Goal("cpu", "semantic maps", "segment_map", "semantic.*1024x2048.*", F32, THEIRS, 2),
    Goal("cpu", "loader, COCO LSJ", "loader", "COCO LSJ 1024.*", "uint8", THEIRS, 4, 0.6),
    Goal("cpu", "loader, COCO LSJ", "loader", "COCO LSJ 1024.*", "uint8", "torchvision", 2, 0.6),
    Goal("cpu", "run lengths", "run lengths", ".*1024x2048", "int32", "pycocotools", 5),
    Goal("cpu", "linear_assignment", "linear_assignment", r"160x\(100x20\).*", F32, "scipy", 2),
    Goal("cpu", "EoMT-S inference 640", "eomt small", "inference 640 B=1", F32, "OpenVINO", 1.2),
    Goal("cpu", "ms_deform_attn", "ms_deform_attn", "1024x1024", F32, THEIRS, 20),
    Goal("cpu", "ms_deform_attn, both", "ms_deform_attn", f"1024x1024{BOTH}", F32, THEIRS, 12),
    Goal("cuda", "masked_attn, mask_bits", "masked_attn", MASKED, BF16, "products", 10),
    Goal("cuda", "masked_attn, mask_bits", "masked_attn", MASKED, BF16, "SDPA, bool mask", 3),
    Goal("cuda", "masked_attn, mask_bits", "masked_attn", MASKED, BF16, "FlexAttention", 5),
    Goal("cuda", "masked_attn, mask_bits", "masked_attn", MASKED, BF16, roofline=1 / 1.5),
    Goal("cuda", "ms_deform_attn", "ms_deform_attn", DEFORM, ".*", ORIGINAL, 5),
    Goal("cuda", "ms_deform_attn", "ms_deform_attn", DEFORM, ".*", "DCNv4 FlashDeformAttn", 1.5),
    Goal("cuda", "ms_deform_attn, both", "ms_deform_attn", DEFORM + BOTH, ".*", ORIGINAL, 3),
    Goal("cuda", "ms_deform_attn", "ms_deform_attn", DEFORM, ".*", THEIRS),
    Goal("cuda", "ms_deform_attn, both", "ms_deform_attn", DEFORM + BOTH, ".*", THEIRS),
    Goal(
        device="cuda",
        work="criterion, 10 predictions",
        bench="criterion",
        case=f"B=16 T=16 1024x1024{BOTH}",
        dtype=BF16,
        peer=THEIRS,
        ratio=20,
        memory=0.1,
        graph=True,
    ),
    Goal(
        device="cuda",
        work="linear_assignment",
        bench="linear_assignment",
        case=r"160x\(100x\d+\).*",
        dtype=F32,
        peer="torch-linear-assignment",
        ratio=10,
    ),
    Goal(
        device="cuda",
        work="linear_assignment",
        bench="linear_assignment",
        case=r"160x\(100x\d+\).*",
        dtype=F32,
        peer="scipy with its transfers",
        ratio=100,
    ),
    Goal("cuda", "training step 1024", ANY, STEP, BF16, THEIRS, 4, 0.4, graph=True),
    Goal("cuda", "training step 1024", ANY, STEP, BF16, COMPILED, 2),
    Goal("cuda", "inference, one image", ANY, INFERENCE, BF16, THEIRS, 6),
    Goal("cuda", "inference, one image", ANY, INFERENCE, BF16, COMPILED, 2.5),
    Goal(
        device="cuda",
        work="Seg-B-Mask/16, 512, batches",
        bench="segmenter Seg-B-Mask/16",
        case=r"inference 512 B=\d\d+",
        dtype=BF16,
        peer="timm, compiled",
        ratio=1.5,
        roofline=0.45,
    ),
]


def read(paths: list[str]) -> list[dict]:
    """The rows in pytest-benchmark's JSON files."""
    files = (json.loads(Path(path).read_text()) for path in paths)
    return [b["extra_info"] for file in files for b in file["benchmarks"] if b["extra_info"]]


def line(goal: Goal, rows: list[dict]) -> tuple[str, str, str, str]:
    """work, goal, measured, roofline of one goal, in words."""
    wanted = []
    if goal.peer:
        wanted.append(f"{goal.ratio:g}x of {goal.peer}" if goal.ratio else f"beside {goal.peer}")
    wanted += [f"memory <= {goal.memory:g}x"] if goal.memory else []
    wanted += [f"roofline >= {goal.roofline:.2f}"] if goal.roofline else []
    wanted += ["one graph"] if goal.graph else []
    cases = {}
    for row in rows:
        keys = zip((goal.bench, goal.case, goal.dtype), (row["bench"], row["case"], row["dtype"]))
        if all(re.fullmatch(pattern, text) for pattern, text in keys):
            cases.setdefault((row["bench"], row["case"], row["dtype"]), {})[row["impl"]] = row
    pairs = [(c["segkern"], c.get(goal.peer)) for c in cases.values() if "segkern" in c]
    if goal.peer:
        pairs = [(ours, peer) for ours, peer in pairs if peer]
    if not pairs:
        return goal.work, ", ".join(wanted), "not measured", ""
    met, found = [], []
    if goal.peer:
        ratios = [float(peer["ratio"]) for _, peer in pairs]
        met += [min(ratios) >= goal.ratio] if goal.ratio else []
        found.append(span(ratios, "x"))
    if goal.memory:
        sizes = [(o["peak_mb"], p["peak_mb"]) for o, p in pairs if o["peak_mb"] and p["peak_mb"]]
        shares = [float(ours) / float(peer) for ours, peer in sizes if float(peer)]
        met.append(bool(shares) and max(shares) <= goal.memory)
        found.append(f"memory {span(shares, 'x') if shares else 'not measured'}")
    if goal.graph:
        met.append(all(ours["how"] == "graph" for ours, _ in pairs))
        found.append("graph" if met[-1] else pairs[0][0]["how"])
    roof = [float(ours["roofline"]) for ours, _ in pairs if ours["roofline"]]
    if goal.roofline:
        met.append(bool(roof) and min(roof) >= goal.roofline)
    words = [("met" if all(met) else "missed")] if met else []
    words += [", ".join(found)] if found else []
    words += [f"({len(pairs)} cases)"] if len(pairs) > 1 else []
    return goal.work, ", ".join(wanted), " ".join(words), span(roof, "") if roof else ""


def span(values: list[float], unit: str) -> str:
    low, high = f"{min(values):.2f}{unit}", f"{max(values):.2f}{unit}"
    return low if low == high else f"{low} to {high}"


def table(rows: list[dict]) -> str:
    """Goal, measured and share of the roofline, of the device that the rows come from."""
    device = "cpu" if all(row["how"] == "cpu" for row in rows) else "cuda"
    lines = [line(goal, rows) for goal in GOALS if goal.device == device]
    lines = [("work", "goal", "measured", "roofline"), *lines]
    widths = [max(len(cells[i]) for cells in lines) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
        for cells in lines
    )


if __name__ == "__main__":
    print(table(read(sys.argv[1:])))
