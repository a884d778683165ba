"""What counts a GPU's work without one: its rules, and that both models run whole without a value
being read, as a CUDA graph asks. In a process of its own, whose kept constants have no values."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this platform")
pytestmark = pytest.mark.slow
BENCH = Path(__file__).parents[2] / "bench"
SCRIPT = """
import json
from dataclasses import asdict

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from torch.utils.checkpoint import checkpoint

import count_launches as count
from segkern.models import Mask2Former, Mask2FormerConfig, SegmenterConfig

rates = count.Rates(bandwidth=1e12, half=1e14, single=1e13, launch=1e-6)
small = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 16, "image_size": (64, 96)}
found = {"rules": {}}
with count.imaginary_gpu(torch.float32):
    x, weight = torch.zeros(8, 1000), torch.zeros(2000, 1000)
    with torch.no_grad(), count.Count(rates) as one:
        y = torch.nn.functional.linear(x.view(8, 10, 100).flatten(1), weight)
        y += 1
        y.zero_()
        torch.zeros(1, 2000).expand(8, -1).clone()
    found["rules"] = {name: asdict(total) for name, total in one.totals.items()}
    try:
        x.sum().item()
    except DataDependentOutputException:
        found["reading fails"] = True
    memory = {}
    for kept in ("all", "inputs"):
        x, weight = torch.zeros(256, 1024), torch.zeros(1024, requires_grad=True)

        def chain(x):
            for _ in range(8):
                x = x.exp()
            return x

        with count.Count(rates) as one:
            if kept == "all":
                y = chain(x * weight)
            else:
                y = checkpoint(chain, x * weight, use_reentrant=False, preserve_rng_state=False)
                y = checkpoint(chain, y, use_reentrant=False, preserve_rng_state=False)
            forward = one.live.most
            count._backward(y.sum())
            del y
        memory[kept] = forward, one.live.most, one.live.now
    found["memory"] = memory
swin = Mask2FormerConfig(
    num_labels=11,
    backbone_options={"depths": [1, 2, 1, 1]},
    encoder_layers=1,
    decoder_layers=3,
)
resnet = Mask2FormerConfig(
    num_labels=11,
    backbone="resnet18",
    backbone_options={"freeze_norm": True},
    encoder_layers=1,
    decoder_layers=3,
)
with count.imaginary_gpu(torch.float32):
    body = Mask2Former(resnet).backbone.train()
    with count.Count(rates) as one:
        maps = body(torch.zeros(2, 3, 64, 96))
        count._backward(sum(m.square().sum() for m in maps))
    found["resnet"] = {name: asdict(total) for name, total in one.totals.items()}
for config in (swin, SegmenterConfig(num_labels=11, **small)):
    for kind in count.KINDS:
        one = count.counted(config, kind, (64, 96), 2, "bf16", rates)
        totals = one.totals
        found[f"{config.kind} {kind} bytes"] = one.live.most
        found[f"{config.kind} {kind}"] = {name: asdict(t) for name, t in totals.items()}
        assert len(count.table(totals, found[f"{config.kind} {kind}"], 5).splitlines()) == 7
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCH), *sys.path])}
    command = [sys.executable, "-W", "error::UserWarning:segkern", "-c", SCRIPT]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_rules(found):
    """Views are no launch; a product reads and writes what it must; a repeated row is there once;
    time is the larger of bytes and operations, and no less than a launch takes."""
    rules = found["rules"]
    assert found["reading fails"]
    assert {name: total["launches"] for name, total in rules.items()} == {
        "mm": 1,
        "add_": 1,
        "zero_": 1,
        "zeros": 1,
        "clone": 1,
    }
    assert rules["mm"]["bytes"] == 4 * (8 * 1000 + 2000 * 1000 + 8 * 2000)
    assert rules["mm"]["operations"] == 2 * 8 * 1000 * 2000
    assert rules["mm"]["least"] == pytest.approx(rules["mm"]["bytes"] / 1e12)
    assert rules["add_"]["bytes"] == 2 * rules["zero_"]["bytes"] == 2 * 4 * 8 * 2000
    assert rules["clone"]["bytes"] == 4 * (2000 + 8 * 2000)
    assert rules["zero_"]["least"] < rules["zero_"]["estimate"] == 1e-6


MAP, ROW = 4 * 256 * 1024, 4 * 1024


def test_memory_in_use_at_once(found):
    """Of a chain of eight powers, kept whole for backward, which frees each when its node has run;
    and of two such, of which checkpoints keep the inputs."""
    forward, most, after = found["memory"]["all"]
    assert forward == 9 * MAP + ROW  # x, eight powers and the weight
    assert 11 * MAP < most < 11 * MAP + 2 * ROW  # and two gradients
    assert after == MAP + 2 * ROW  # x, the weight and its gradient
    forward, most, after = found["memory"]["inputs"]
    assert forward == 5 * MAP + ROW  # x, two inputs, and a power beside the next
    assert 13 * MAP < most < 13 * MAP + 2 * ROW  # the eight powers again
    assert after == MAP + 2 * ROW


def test_a_resnet_trains_with_one_launch_a_norm(found):
    """And one for its gradient, that of its shortcut and its ReLU; nothing is copied for them."""
    resnet = found["resnet"]
    assert resnet["norm_relu"]["launches"] == resnet["norm_relu_backward"]["launches"] == 17
    assert not resnet.keys() & {"native_batch_norm", "cudnn_batch_norm", "threshold_backward"}


OURS = {
    "mask2former inference": {"mask_bits", "masked_attn", "ms_deform_attn", "feed_forward"},
    "mask2former training step": {
        "masked_attn_backward",
        "ms_deform_attn_backward",
        "matching_cost",
        "linear_assignment",
        "point_mask_loss_backward",
        "_fused_adamw_",
        "_foreach_norm",
    },
    "segmenter inference": {"addmm"},
    "segmenter training step": {"_fused_adamw_"},
}


@pytest.mark.parametrize("case", OURS)
def test_models_run_whole(found, case):
    totals = found[case]
    assert found[case + " bytes"] > 2**19
    assert OURS[case] <= totals.keys()
    for total in totals.values():
        assert total["launches"] > 0
        assert 0 <= total["least"] <= total["estimate"]
