"""Builds segkern/_C_cpu.abi3.so (always), segkern/_C_cuda.abi3.so (where nvcc and torch are of one
CUDA) and segkern/_host (run-length codes, maps of ids and views, for this Python).

The first two speak LibTorch's stable ABI only: one binary serves torch >= 2.11 and any
Python >= 3.11. No GPU is needed. Environment:
  SEGKERN_NO_BUILD=1    pure-Python install, in which the reference runs; always so on Windows,
                        whose compiler lacks the vectors that the kernels are written in
  SEGKERN_NO_CUDA=1     CPU library only
  SEGKERN_CUDA=1        stops where the CUDA library cannot be built as asked; without it the build
                        goes on, and `segkern info` has the reason
  SEGKERN_SANITIZE=address | thread   with the sanitizers of addresses and undefined behaviour, or
                        of races
  SEGKERN_EMULATE=1     for tests: _C_cpu is the CUDA sources, compiled for the host, and has
                        their ops alone (csrc/cuda/emulate.h)
  SEGKERN_AVX2=1        for tests: no code for AVX-512, as on a CPU without it
  CUDA_HOME             the toolkit; else that of the nvcc on PATH, else /usr/local/cuda
  TORCH_CUDA_ARCH_LIST  default "7.5;8.0;9.0;10.0;12.0+PTX", as far as nvcc knows them
  CXX, MAX_JOBS as usual; nvcc compiles with CXX, too
"""

import json
import os
import shutil
import sys
from pathlib import Path
from subprocess import SubprocessError

from setuptools import __version__ as setuptools_version
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
import toolchain  # noqa: E402

STABLE_ABI = "0x020b000000000000"  # torch 2.11: the oldest that can load the libraries
COMPILER = os.environ.get("CXX", "c++")
SANITIZE = os.environ.get("SEGKERN_SANITIZE", "")
EMULATE = os.environ.get("SEGKERN_EMULATE") == "1"
AVX2 = os.environ.get("SEGKERN_AVX2") == "1"
HELP = (
    "\nsegkern builds C++ kernels while it is installed. {problem}\n"
    "  {remedy},\n"
    "  or set SEGKERN_NO_BUILD=1 for the pure-Python install, in which the slow reference runs.\n"
)


def stop(problem, remedy):
    raise SystemExit(HELP.format(problem=problem, remedy=remedy))


def say(what):
    print(f"segkern: {what}", file=sys.stderr)


def why_pure():
    """Why nothing is compiled; empty if it is. Packing the sources needs no compiler."""
    if os.environ.get("SEGKERN_NO_BUILD") == "1":
        return "SEGKERN_NO_BUILD=1"
    if sys.platform == "win32":
        return "there are no kernels for Windows"
    packs = {"sdist", "egg_info", "dist_info"}
    builds = {"build", "build_ext", "build_py", "bdist_wheel", "editable_wheel", "install"}
    asked = set(sys.argv)
    return "packing" if packs & asked and not builds & asked else ""


def flags_cpu():
    flags = ["-std=c++20", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    flags += ["-DSEGKERN_AVX2"] * AVX2
    wanted = ["-Wall", "-Wno-unknown-pragmas"]
    if SANITIZE:
        checks = ["-fsanitize=thread"]
        if SANITIZE == "address":
            checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        return [*flags, *wanted, "-DSEGKERN_SANITIZE", "-O1", "-g", *checks], checks
    # no -ffast-math: NaN must leave range tests; fused multiply-adds are welcome
    wanted += ["-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    wanted += [f"-mprefer-vector-width={256 if AVX2 else 512}"]
    return [*flags, "-O3", *toolchain.accepted(COMPILER, wanted)], []


def sources(folder, suffix):
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def sources_emulated():
    """A wrapper of each CUDA source, and the schemas: the library has the ops of these alone."""
    folder = Path("build/emulate")
    folder.mkdir(parents=True, exist_ok=True)
    wrappers = []
    for source in map(Path, sources("cuda", ".cu")):
        wrapper = folder / f"{source.stem}.cpp"
        wrapper.write_text(f'#include "{ROOT / source}"\n')
        wrappers.append(str(wrapper))
    return ["csrc/cpu/schemas.cpp", *wrappers]


def plan_cuda(torch):
    """nvcc and what to do with it; stops where that is less than SEGKERN_CUDA=1 asks for."""
    env = os.environ | ({"SEGKERN_NO_CUDA": "1"} if SANITIZE or EMULATE else {})
    nvcc = toolchain.find_nvcc(env)
    plan = toolchain.plan_cuda(torch.__version__, torch.version.cuda, nvcc, env)
    if plan.architectures:
        error = toolchain.trial(nvcc, COMPILER)
        if error:
            plan = toolchain.Plan(why=f"{nvcc} does not work with {COMPILER}: {error}")
    if os.environ.get("SEGKERN_CUDA") == "1" and (plan.why or plan.left_out):
        stop(
            f"SEGKERN_CUDA=1 asks for CUDA kernels, but {plan.why or 'not for ' + plan.left_out}.",
            "Mend that or leave out SEGKERN_CUDA=1; the kernels for the CPU are then built",
        )
    return nvcc, plan


def extension_cuda(cpp_extension, nvcc, plan):
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(plan.architectures)
    cpp_extension.CUDA_HOME = str(nvcc.path.parents[1])
    defines = ["-std=c++20", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA"]
    host = f"-ccbin={toolchain.host_compiler(COMPILER)}"
    # the runtime is linked in: the binary then serves torch of any CUDA of its major
    return cpp_extension.CppExtension(
        "segkern._C_cuda",
        sources("cuda", ".cu"),
        libraries=["c10_cuda", "torch_cuda", "cudart_static", "rt", "dl", "pthread"],
        library_dirs=toolchain.toolkit_libraries(nvcc),
        extra_compile_args={"cxx": defines, "nvcc": [*defines, host, "-O3"]},
        py_limited_api=True,
    )


def extensions():
    """The extensions to build and what to write into _build_info.json."""
    try:
        import torch
        from pybind11.setup_helpers import Pybind11Extension
        from torch.utils import cpp_extension
    except ImportError as error:
        stop(
            f"torch or pybind11 cannot be imported here ({error}).",
            "Install torch >= 2.11, pybind11 and ninja, then: "
            "pip install --no-build-isolation segkern",
        )
    if shutil.which(COMPILER.split()[0]) is None:
        stop(f"No C++ compiler: '{COMPILER}' is not found.", "Install g++ >= 12 or set CXX")
    compile_flags, link_flags = flags_cpu()
    found = [
        cpp_extension.CppExtension(
            "segkern._C_cpu",
            sources_emulated() if EMULATE else sources("cpu", ".cpp"),
            extra_compile_args=compile_flags + ["-DSEGKERN_EMULATE"] * EMULATE,
            extra_link_args=link_flags,
            py_limited_api=True,
        )
    ]
    if not (SANITIZE or EMULATE):
        # returns Python objects: built for this Python alone; without it NumPy works
        host = Pybind11Extension("segkern._host", sources("host", ".cpp"), cxx_std=17)
        # the same values on every CPU, and as PyTorch's separate product and sum
        host.extra_compile_args += ["-O3", "-ffp-contract=off"]
        found.append(host)
    nvcc, plan = plan_cuda(torch)
    info = {
        "pure": False,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "compiler": COMPILER,
        "cuda_architectures": list(plan.architectures),
    }
    if os.environ.get("SEGKERN_NO_CUDA") == "1":
        del info["cuda"]  # nothing that could miss this torch's CUDA
    if plan.left_out:
        info["left_out"] = plan.left_out
        say(f"CUDA kernels are not built for {plan.left_out}")
    if plan.architectures:
        say(f"CUDA kernels for {', '.join(plan.architectures)} by {nvcc}")
        info["nvcc"] = str(nvcc).removeprefix("nvcc ")
        found.append(extension_cuda(cpp_extension, nvcc, plan))
    else:
        say(f"no CUDA kernels: {plan.why}")
        info["no_cuda"] = plan.why
    return found, info, cpp_extension.BuildExtension


if int(setuptools_version.split(".")[0]) < 77:  # it would only say that the license is invalid
    raise SystemExit(f'setuptools is {setuptools_version}: pip install "setuptools>=77"')
pure = why_pure()
if pure:
    ext_modules, build_info, build_ext = [], {"pure": True, "why": pure}, None
else:
    ext_modules, build_info, build_ext = extensions()
build_info["python"] = sys.version.split()[0]


def write_build_info(folder):
    text = json.dumps(build_info, indent=1)
    (Path(folder) / "segkern" / "_build_info.json").write_text(text + "\n")


class BuildPy(build_py):
    """Leaves a record of the build beside the package; `segkern info` prints it."""

    def run(self):
        super().run()
        write_build_info(ROOT if self.editable_mode else self.build_lib)


cmdclass = {"build_py": BuildPy}
if build_ext is not None:

    class BuildExt(build_ext):
        """Leaves the same when the libraries are built into the source tree."""

        def run(self):
            try:
                super().run()
            except (BaseError, RuntimeError, OSError, SubprocessError) as error:
                stop(
                    f"The compiler failed: {error}\nWhat it says stands above.",
                    "Install g++ >= 12 or clang >= 16, or set CXX; SEGKERN_NO_CUDA=1 builds the "
                    "kernels for the CPU alone",
                )
            if self.inplace:
                write_build_info(ROOT)

    cmdclass["build_ext"] = BuildExt

setup(ext_modules=ext_modules, cmdclass=cmdclass)
