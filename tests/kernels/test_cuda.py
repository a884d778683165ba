"""The CUDA sources, compiled for GPUs that are not there.

`make emulate` and `make racecheck` check what they compute, on the host; `make gpu` on a GPU.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from support.cubin import RESERVED, usage

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
SOURCES = sorted(p.name for p in CUDA.glob("*.cu"))
# 86 and 89 run what is made for 80; `make long` has those that `make check` leaves out
ARCHITECTURES = [90, *(pytest.param(a, marks=pytest.mark.long) for a in (75, 80, 100, 120))]


def test_every_source_is_here():
    assert SOURCES


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_and_fits(source, arch, tmp_path):
    cubin = tmp_path / "kernels.cubin"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    command = ["nvcc", "-cubin", f"-arch=sm_{arch}", "-std=c++20", "-O3", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *includes]
    run = subprocess.run(
        [*command, str(CUDA / source), "-o", str(cubin)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    kernels = usage(cubin)
    assert kernels
    for kernel in kernels:
        # of sm_75 it is asked that it runs; two registers that spill are let pass
        assert kernel["local"] <= (16 if arch == 75 else 0), f"{kernel} spills or has a stack"
        # linear_assignment leaves this much of what it asks for; what runs in global memory asks
        # for none
        static = kernel["shared"] - (RESERVED if arch >= 90 else 0)
        assert static <= 512 or "6Memory" in kernel["name"], kernel


def test_the_library_holds_every_kernel_that_python_declares():
    """But for those of PyTorch's ops, which have one for all devices."""
    from segkern import ops  # noqa: F401
    from segkern.ops import _library

    if not (_library.PACKAGE / "_C_cuda.abi3.so").is_file():
        pytest.skip("no CUDA library was built")
    assert "cuda" not in _library.MISSING, _library.MISSING["cuda"]
    for name in set(_library.OPS) - _library.CPU_ONLY - _library.COMPOSED.keys():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"segkern::{name}", "CUDA"), name
