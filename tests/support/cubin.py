"""What compiled device code takes of a multiprocessor: registers, shared and local memory."""

import re
import subprocess
from pathlib import Path

# bytes a block may have: A100; RTX 30 and A10; RTX 40 and L4; H100 and H200; B200; RTX 50
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_LIMIT = {arch: 1024 * kilobytes for arch, kilobytes in SHARED_LIMIT.items()}
REGISTERS = 65536  # of a multiprocessor, on all of these: what a block may take
RESERVED = 1024  # bytes of a block that sm_90 and later keep for the system, and report as static


def usage(path: Path | str) -> list[dict]:
    """Reads a cubin, or a library that holds several.

    Returns:
        For each kernel and architecture: arch (80, 90, ...; None in a lone cubin), name, registers
        a thread, shared (static, bytes a block), local (stack and spills, bytes a thread).
    """
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    run = subprocess.run(
        [tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    )
    kernels, arch, name = [], None, None
    for line in run.stdout.splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.match(r" *Function (.+):$", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            kernel = {"arch": arch, "name": name, "registers": registers, "shared": shared}
            kernels.append(kernel | {"local": stack + local})
    return kernels
