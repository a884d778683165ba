"""What a build finds and decides before it compiles: compiler flags, nvcc, GPUs, or why no CUDA.

`setup.py` and the tests ask; nothing here imports torch.
"""

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# GPUs that a build is for if TORCH_CUDA_ARCH_LIST names none, as far as nvcc knows them; the last
# one's code is also left in a form that later GPUs compile
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
OLDEST = (7, 5)


class Nvcc(NamedTuple):
    """The CUDA compiler.

    Attributes:
        path: of the program; two folders up is what CUDA_HOME means.
        version: major and minor.
        architectures: compute capabilities that it compiles for, such as "9.0".
    """

    path: Path
    version: tuple[int, int]
    architectures: tuple[str, ...]

    def __str__(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]} ({self.path})"


class Plan(NamedTuple):
    """What becomes of the CUDA part.

    Attributes:
        architectures: to build it for, in the words of TORCH_CUDA_ARCH_LIST; empty for no build.
        why: there is none; empty if it is built as it was asked for.
        left_out: architectures that were asked for and cannot be, with the reason.
    """

    architectures: tuple[str, ...] = ()
    why: str = ""
    left_out: str = ""


def output(command: list) -> str:
    """What a program prints; empty if it cannot run or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return ""
    return run.stdout if run.returncode == 0 else ""


def find_nvcc(env: Mapping[str, str], fallback: str = "/usr/local/cuda") -> Nvcc | str:
    """The nvcc of CUDA_HOME (or CUDA_PATH), else on PATH, else of `fallback`, as torch finds it.

    Returns:
        The compiler, or why there is none.
    """
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    on_path = None if home else shutil.which("nvcc", path=env.get("PATH"))
    path = Path(on_path or f"{home or fallback}/bin/nvcc")
    if not path.is_file():
        nowhere = f"nvcc was not found by CUDA_HOME, on PATH or in {fallback}"
        return f"CUDA_HOME={home} has no bin/nvcc" if home else nowhere
    version = re.search(r"release (\d+)\.(\d+)", output([path, "--version"]))
    if version is None:
        return f"{path} --version names no release"
    known = re.findall(r"compute_(\d+)(\d)\b", output([path, "--list-gpu-arch"]))
    return Nvcc(path, tuple(map(int, version.groups())), tuple(".".join(a) for a in known))


def plan_cuda(torch: str, cuda: str | None, nvcc: Nvcc | str, env: Mapping[str, str]) -> Plan:
    """Decides about the CUDA part.

    Args:
        torch: its version, for the reasons.
        cuda: the CUDA version that torch was built with; None if with none.
        nvcc: or why there is none.
        env: SEGKERN_NO_CUDA and TORCH_CUDA_ARCH_LIST are looked at.
    """
    if env.get("SEGKERN_NO_CUDA") == "1":
        return Plan(why="SEGKERN_NO_CUDA=1 was set while building")
    if cuda is None:
        return Plan(why=f"torch {torch} is not a CUDA build")
    if isinstance(nvcc, str):
        return Plan(why=nvcc)
    major = int(cuda.split(".")[0])
    if nvcc.version[0] != major:
        return Plan(
            why=f"torch {torch} is for CUDA {major}, but this is {nvcc}: point CUDA_HOME to a "
            f"toolkit of CUDA {major}, or install a torch for CUDA {nvcc.version[0]}"
        )
    return _plan_architectures(nvcc, env.get("TORCH_CUDA_ARCH_LIST", ""))


def _plan_architectures(nvcc: Nvcc, listed: str) -> Plan:
    asked = [name for name in re.split(r"[;,\s]+", listed) if name]
    wanted = asked or [a for a in ARCHITECTURES if a in nvcc.architectures]
    built, left_out = [], []
    for name in wanted:
        number = re.match(r"(\d+)\.(\d+)", name)  # torch knows others, such as Hopper
        if number is not None and tuple(map(int, number.groups())) < OLDEST:
            left_out.append(f"{name} (segkern needs {OLDEST[0]}.{OLDEST[1]})")
        elif number is not None and number.group() not in nvcc.architectures:
            left_out.append(f"{name} (unknown to {nvcc})")
        else:
            built.append(name)
    if built and not asked:
        built[-1] += "+PTX"
    left = ", ".join(left_out)
    why = "" if built else f"there is no GPU left to build for: {left or nvcc}"
    return Plan(tuple(built), why, left)


def host_compiler(compiler: str) -> str:
    """The program in a command such as "ccache g++ -m64"."""
    words = [w for w in shlex.split(compiler) if Path(w).name not in ("ccache", "sccache")]
    return words[0] if words else compiler


def compile_empty(command: list, suffix: str) -> str:
    """What a compiler says of an empty file that it cannot compile; empty if it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty" + suffix)
        source.write_text("int main() {}\n")
        whole = [*command, "-c", source, "-o", source.with_suffix(".o")]
        run = subprocess.run(whole, capture_output=True, text=True)
    said = " ".join((run.stderr + run.stdout).split())[:300]
    return "" if run.returncode == 0 else said or f"exit code {run.returncode}"


def trial(nvcc: Nvcc, compiler: str) -> str:
    """What is wrong with nvcc and that compiler for the host together; empty if nothing is."""
    return compile_empty([nvcc.path, "-std=c++20", f"-ccbin={host_compiler(compiler)}"], ".cu")


def accepted(compiler: str, flags: list[str]) -> list[str]:
    """Of `flags` those that the compiler knows: of gcc's, clang has some, other CPUs some."""
    command = [*shlex.split(compiler), "-Werror"]
    return [flag for flag in flags if not compile_empty([*command, flag], ".cpp")]


def toolkit_libraries(nvcc: Nvcc) -> list[str]:
    """The folders of the CUDA toolkit's libraries, as nvcc itself has them."""
    run = subprocess.run([nvcc.path, "--dryrun", "x.cu"], capture_output=True, text=True)
    line = re.search(r"LIBRARIES=(.*)", run.stderr + run.stdout)
    return re.findall(r'-L([^"\s]+)', line.group(1)) if line else []
