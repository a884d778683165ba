"""Mask2Former with Swin-T against transformers: inference and a training step, same weights.

Times are taken in turn in one process; peak memory is that of a process of its own, above what it
held after the imports. `--small` only shows that everything runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _rows import append, measure

from segkern.testing import random_targets

LABELS = 133
CASES = {  # kind, image size, batch
    "inference 384 B=1": ("inference", 384, 1),
    "inference 512 B=1": ("inference", 512, 1),
    "inference 1024 B=1": ("inference", 1024, 1),
    "training step 512 B=2 T=16": ("training", 512, 2),
}
SMALL = {
    "inference 64 B=1": ("inference", 64, 1),
    "training step 64 B=2 T=16": ("training", 64, 2),
}


def save_weights(folder: Path) -> None:
    """Random weights, as transformers initialises and stores them."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(drop_path_rate=0.3, out_features=stages)
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=LABELS)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def build(impl: str, folder: Path, kind: str, size: int, batch: int):
    """The function to time."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size)
    masks, labels = random_targets([16] * batch, LABELS, size, size)
    if impl == "segkern":
        from segkern.models import Mask2Former
        from segkern.nn.targets import Targets

        model = Mask2Former.from_pretrained(folder)
        targets = Targets.from_lists(masks, labels, num_labels=LABELS)

        def loss():
            return model.loss(x, targets)[0]

    else:
        from transformers import Mask2FormerForUniversalSegmentation

        model = Mask2FormerForUniversalSegmentation.from_pretrained(folder)

        def loss():
            return model(x, mask_labels=masks, class_labels=labels).loss

    if kind == "inference":
        model.eval()

        @torch.inference_mode()
        def run():
            model(x)

        return run
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05)

    def step():
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()

    return step


def peak_memory(impl: str, folder: Path, kind: str, size: int, batch: int) -> float:
    """Megabytes that a fresh process needs for two runs, above the imports."""
    arguments = [
        sys.executable,
        __file__,
        "--peak",
        json.dumps([impl, str(folder), kind, size, batch]),
    ]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def _peak(impl: str, folder: str, kind: str, size: int, batch: int) -> None:
    if impl == "segkern":
        import segkern.models  # noqa: F401
    else:
        import transformers.models.mask2former.modeling_mask2former
        import transformers.models.swin.modeling_swin  # noqa: F401

    before = _resident("VmRSS")
    function = build(impl, Path(folder), kind, size, batch)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading the weights does not count
    function()
    function()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    """Resident megabytes of this process: VmRSS now, VmHWM at the highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def run(runs: int, cases: dict) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder))
        for case, (kind, size, batch) in cases.items():
            impls = ("segkern", "transformers")
            peaks = {i: peak_memory(i, Path(folder), kind, size, batch) for i in impls}
            functions = {i: build(i, Path(folder), kind, size, batch) for i in impls}
            rows += measure("mask2former swin_tiny", case, "float32", functions, runs, peaks)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each implementation")
    parser.add_argument("--save", action="store_true", help="append the rows to results.csv")
    parser.add_argument("--small", action="store_true", help="tiny images, to see that it runs")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        _peak(*json.loads(options.peak))
    else:
        rows = run(options.runs, SMALL if options.small else CASES)
        if options.save:
            append(rows)
