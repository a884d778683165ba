"""Builds segkern/_C_cpu.abi3.so (always), segkern/_C_cuda.abi3.so (where nvcc and a CUDA build of
torch are found) and segkern/_host (run-length encoding, for this Python).

The first two speak LibTorch's stable ABI only: one binary serves torch >= 2.11 and any
Python >= 3.11. No GPU is needed. Environment:
  SEGKERN_NO_BUILD=1    pure-Python install, in which the reference runs
  SEGKERN_NO_CUDA=1     CPU library only
  SEGKERN_SANITIZE=address | thread   with the sanitizers of addresses and undefined behaviour, or
                        of races
  SEGKERN_EMULATE=1     for tests: _C_cpu takes the CUDA sources, compiled for the host, in place
                        of the C++ kernels of the same ops (csrc/cuda/emulate.h)
  SEGKERN_AVX2=1        for tests: no code for AVX-512, as on a CPU without it
  TORCH_CUDA_ARCH_LIST  default "8.0;9.0;10.0+PTX";  CXX, MAX_JOBS as usual
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
STABLE_ABI = "0x020b000000000000"  # torch 2.11: the oldest that can load the libraries
SANITIZE = os.environ.get("SEGKERN_SANITIZE", "")
EMULATE = os.environ.get("SEGKERN_EMULATE") == "1"
AVX2 = os.environ.get("SEGKERN_AVX2") == "1"
HELP = (
    "\nsegkern builds C++ kernels while it is installed. {problem}\n"
    "  {remedy}\n"
    "  or set SEGKERN_NO_BUILD=1 for the pure-Python install, in which the slow reference runs.\n"
)


def stop(problem, remedy):
    raise SystemExit(HELP.format(problem=problem, remedy=remedy))


def flags_cpu():
    flags = ["-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    flags += [f"-DTORCH_TARGET_VERSION={STABLE_ABI}"] + ["-DSEGKERN_AVX2"] * AVX2
    if SANITIZE:
        checks = ["-fsanitize=thread"]
        if SANITIZE == "address":
            checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        return flags + ["-DSEGKERN_SANITIZE", "-O1", "-g", *checks], checks
    # no -ffast-math: NaN must leave range tests; fused multiply-adds are welcome
    return flags + ["-O3", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno"] + [
        "-fno-trapping-math",
        f"-mprefer-vector-width={256 if AVX2 else 512}",
    ] * (os.uname().machine == "x86_64"), []


def sources(folder, suffix):
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def sources_emulated(cuda):
    """The C++ kernels without those of the ops in `cuda`, whose sources a wrapper includes."""
    folder = Path("build/emulate")
    folder.mkdir(parents=True, exist_ok=True)
    wrappers = []
    for source in map(Path, cuda):
        wrapper = folder / f"{source.stem}.cpp"
        wrapper.write_text(f'#include "{ROOT / source}"\n')
        wrappers.append(str(wrapper))
    stems = {Path(source).stem for source in cuda}
    return [s for s in sources("cpu", ".cpp") if Path(s).stem not in stems] + wrappers


def toolkit_libraries():
    """The folders of the CUDA toolkit's libraries, as nvcc itself has them."""
    run = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True)
    line = re.search(r"LIBRARIES=(.*)", run.stderr + run.stdout)
    return re.findall(r'-L([^"\s]+)', line.group(1)) if line else []


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
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        stop(f"No C++ compiler: '{compiler}' is not found.", "Install g++ >= 12 or set CXX")
    info = {
        "pure": False,
        "torch": torch.__version__,
        "compiler": compiler,
        "cuda_architectures": [],
    }
    compile_flags, link_flags = flags_cpu()
    cuda = sources("cuda", ".cu")
    found = [
        cpp_extension.CppExtension(
            "segkern._C_cpu",
            sources_emulated(cuda) if EMULATE else sources("cpu", ".cpp"),
            extra_compile_args=compile_flags + ["-DSEGKERN_EMULATE"] * EMULATE,
            extra_link_args=link_flags,
            py_limited_api=True,
        )
    ]
    if not (SANITIZE or EMULATE):
        # returns Python objects: built for this Python alone; without it NumPy works
        host = Pybind11Extension("segkern._host", ["csrc/host/rle.cpp"], cxx_std=17)
        found.append(host)
    if os.environ.get("SEGKERN_NO_CUDA") == "1" or SANITIZE or EMULATE:
        info["no_cuda"] = "SEGKERN_NO_CUDA=1 was set while building"
    elif torch.version.cuda is None:
        info["no_cuda"] = f"torch {torch.__version__} is not a CUDA build"
    elif cpp_extension.CUDA_HOME is None or shutil.which("nvcc") is None:
        info["no_cuda"] = "nvcc was not found while building"
    else:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
        info["cuda_architectures"] = (
            os.environ["TORCH_CUDA_ARCH_LIST"].replace(",", ";").split(";")
        )
        defines = ["-std=c++20", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA"]
        found.append(
            # the runtime is linked in: the binary then serves torch of any CUDA of its major
            cpp_extension.CppExtension(
                "segkern._C_cuda",
                cuda,
                libraries=["c10_cuda", "torch_cuda", "cudart_static", "rt", "dl", "pthread"],
                library_dirs=toolkit_libraries(),
                extra_compile_args={"cxx": defines, "nvcc": [*defines, "-O3"]},
                py_limited_api=True,
            )
        )
    return found, info, cpp_extension.BuildExtension


if os.environ.get("SEGKERN_NO_BUILD") == "1":
    ext_modules, build_info, build_ext = [], {"pure": True}, None
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
        """The same when the libraries are built into the source tree."""

        def run(self):
            super().run()
            if self.inplace:
                write_build_info(ROOT)

    cmdclass["build_ext"] = BuildExt

setup(ext_modules=ext_modules, cmdclass=cmdclass)
