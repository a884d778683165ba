"""random_points drawn in a Triton kernel: the bits of Python's."""

import os
import subprocess
import sys

import pytest
import torch

from segkern.ops import random_points

pytest.importorskip("triton", reason="no Triton on this platform")

import triton
import triton.language as tl

from segkern.kernels.philox import random_point

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else []  # there kernels are compiled for GPUs
DEVICES += [pytest.param("cuda", marks=pytest.mark.gpu)]


@triton.jit
def draw(
    seed,  # [1] int64
    ids,  # [3] int64: sample, prediction, target
    out,  # [n, 2]
    n,
    BLOCK: tl.constexpr,
):
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample, prediction, target = tl.load(ids), tl.load(ids + 1), tl.load(ids + 2)
    x, y = random_point(tl.load(seed), point, target, prediction, sample)
    tl.store(out + 2 * point, x, mask=point < n)
    tl.store(out + 2 * point + 1, y, mask=point < n)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ids", [[0, 0, 0], [5, -1, 0xFFFFFFFF], [2**40 + 3, 7, 9]], ids=str)
@pytest.mark.parametrize("seed", [0, 42, -1, 0x123456789AB, -(2**63)])
def test_bits(seed, ids, device):
    seed, ids = torch.tensor([seed], device=device), torch.tensor(ids, device=device)
    out = torch.full((1000, 2), float("nan"), device=device)
    draw[(4,)](seed, ids, out, 1000, 256)
    assert torch.equal(out, random_points(seed, ids, 1000))


if not INTERPRETED:

    def test_bits_in_the_interpreter():
        """In a process of its own: the interpreter is chosen when a kernel is decorated."""
        command = [sys.executable, "-m", "pytest", __file__, "-q", "-m", "not gpu"]
        variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        assert 15 * "." in run.stdout, "none is skipped"
