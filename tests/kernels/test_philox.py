"""random_points drawn in a Triton kernel: the bits of Python's."""

import os
import subprocess
import sys

import pytest
import torch

from segkern.ops.point_sample import random_points_reference

pytest.importorskip("triton", reason="no Triton on this platform")

from segkern.kernels import philox

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else []  # there kernels are compiled for GPUs
DEVICES += [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", [0, 42, -1, 0x123456789AB, -(2**63)])
def test_bits(seed, device):
    seed = torch.tensor([seed], device=device)
    ids = torch.tensor([[0, 0, 0], [5, -1, 0xFFFFFFFF], [2**40 + 3, 7, 9]], device=device)
    for shaped in (ids, ids.mT.contiguous().mT[:, None], ids[0], ids[:0]):
        for n in (0, 1, 513):
            got = philox.random_points(seed, shaped, n)
            want = random_points_reference(seed, shaped, n)
            assert got.shape == want.shape
            assert torch.equal(got, want)


if not INTERPRETED:

    def test_bits_in_the_interpreter():
        """In a process of its own: the interpreter is chosen when a kernel is decorated."""
        command = [sys.executable, "-m", "pytest", __file__, "-q", "-m", "not gpu"]
        variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        assert 5 * "." in run.stdout, "none is skipped"
