"""What compiled device code takes of a multiprocessor: registers, shared and local memory."""

import re
import subprocess
from pathlib import Path

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may have


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
