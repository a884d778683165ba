"""Installing: what an import brings, what is built for which torch, nvcc and GPU, what is said of
what is missing."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import toolchain
import torch
from torch.utils import cpp_extension

import segkern
from segkern.ops import _library
from segkern.runtime.device import usable_device
from support.inputs import linear_assignment_inputs

ROOT = Path(__file__).parent.parent


def python(code, cwd, **variables):
    """What a new process prints that runs `code` with this tree's segkern."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return run.stdout


BROUGHT = """
import sys, torch
before = set(sys.modules)
{code}
print(*sorted(set(sys.modules) - before))
"""
HELP = """
from segkern.cli import main
try:
    main(["--help"])
except SystemExit:
    print()
"""


def test_import_brings_the_ops_alone(tmp_path):
    """Modules are counted, not seconds, which a busy machine stretches."""
    brought = python(BROUGHT.format(code="import segkern"), tmp_path).split()
    assert {name.partition(".")[0] for name in brought} == {"segkern"}
    rooms = {".".join(name.split(".")[:2]) for name in brought}
    assert rooms == {"segkern", "segkern._moved", "segkern._waiting", "segkern.ops"}


def test_help_brings_nothing_that_takes_long(tmp_path):
    brought = python(BROUGHT.format(code=HELP), tmp_path).splitlines()[-1].split()
    assert "segkern.cli" in brought
    long = ("timm", "torchvision", "transformers", "scipy.ndimage", "matplotlib", "sklearn")
    for name in (*long, "torch._dynamo", "torchmetrics", "tensorboard", "triton"):
        assert name not in brought


def test_the_face_has_every_name_that_editors_see():
    tree = ast.parse(Path(segkern.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        seen |= {alias.asname: node.module or "" for alias in node.names}
    assert seen == segkern._HOME
    assert set(segkern.__all__) == {"ops", *seen}
    for name in segkern.__all__:
        assert name in dir(segkern)
        assert getattr(segkern, name) is not None


def program(path, text):
    """A shell script at that path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


NVCC = """case $1 in
--version) echo "Cuda compilation tools, release {version}, V{version}.99";;
--list-gpu-arch) printf 'compute_90\\ncompute_120\\n';;
esac"""


def test_one_way_finds_nvcc(tmp_path):
    home = program(tmp_path / "home/bin/nvcc", NVCC.format(version="12.4")).parents[1]
    path = program(tmp_path / "path/bin/nvcc", NVCC.format(version="13.0")).parent
    other = program(tmp_path / "local/bin/nvcc", NVCC.format(version="12.8")).parents[1]
    path, home, nowhere = str(path), str(home), str(tmp_path / "nowhere")
    cases = [
        ({"CUDA_HOME": home, "PATH": path}, (12, 4)),
        ({"CUDA_PATH": home, "PATH": path}, (12, 4)),
        ({"CUDA_HOME": "", "PATH": path}, (13, 0)),
        ({"PATH": nowhere}, (12, 8)),
    ]
    for env, version in cases:
        found = toolchain.find_nvcc(env, str(other))
        assert (found.version, found.architectures) == (version, ("9.0", "12.0")), env
    assert "no bin/nvcc" in toolchain.find_nvcc({"CUDA_HOME": nowhere, "PATH": path}, str(other))
    assert "not found" in toolchain.find_nvcc({"PATH": nowhere}, nowhere)


OLD = toolchain.Nvcc(Path("/cuda/bin/nvcc"), (12, 4), ("7.0", "7.5", "8.0", "8.6", "9.0"))
NEW = toolchain.Nvcc(Path("/cuda/bin/nvcc"), (13, 0), ("7.5", "8.0", "9.0", "10.0", "12.0"))
PLANS = [  # CUDA of torch, nvcc, TORCH_CUDA_ARCH_LIST, architectures, words of the reason
    ("13.2", NEW, None, "7.5 8.0 9.0 10.0 12.0+PTX", ""),
    ("13.2", NEW, "", "7.5 8.0 9.0 10.0 12.0+PTX", ""),
    ("12.6", OLD, None, "7.5 8.0 9.0+PTX", ""),
    ("12.6", OLD, "8.0,9.0", "8.0 9.0", ""),
    ("12.6", OLD, "8.0 8.6+PTX", "8.0 8.6+PTX", ""),
    ("12.6", OLD, "8.6;12.0", "8.6", "12.0 (unknown to nvcc 12.4 (/cuda/bin/nvcc))"),
    ("12.6", OLD, "12.0", "", "12.0 (unknown to nvcc 12.4"),
    ("12.6", OLD, "7.0;9.0a", "9.0a", "7.0 (segkern needs 7.5)"),
    ("13.2", NEW, "Hopper", "Hopper", ""),
    ("13.2", OLD, None, "", "torch 2.15 is for CUDA 13, but this is nvcc 12.4"),
    ("12.6", NEW, "9.0", "", "install a torch for CUDA 13"),
    (None, NEW, None, "", "torch 2.15 is not a CUDA build"),
    ("13.2", "nvcc was not found", "9.0", "", "nvcc was not found"),
]


@pytest.mark.parametrize(("cuda", "nvcc", "listed", "built", "said"), PLANS)
def test_what_is_built_for_which_gpu(cuda, nvcc, listed, built, said):
    env = {} if listed is None else {"TORCH_CUDA_ARCH_LIST": listed}
    plan = toolchain.plan_cuda("2.15", cuda, nvcc, env)
    assert plan.architectures == tuple(built.split())
    assert said in plan.why + plan.left_out
    assert bool(plan.why) == (not built)
    assert "SEGKERN_NO_CUDA" in toolchain.plan_cuda("2", cuda, nvcc, {"SEGKERN_NO_CUDA": "1"}).why


@pytest.mark.parametrize(
    ("compiler", "host"),
    [("c++", "c++"), ("ccache g++-12", "g++-12"), ("/usr/bin/ccache clang++ -m64", "clang++")],
)
def test_nvcc_compiles_with_cxx(compiler, host, tmp_path):
    """And says so where the two do not work together, as with a gcc that is too new for it."""
    assert toolchain.host_compiler(compiler) == host
    said = f"echo error: $2 is too new; test $2 != -ccbin={host}"
    nvcc = toolchain.Nvcc(program(tmp_path / "nvcc", said), (12, 4), ())
    assert toolchain.trial(nvcc, compiler) == f"error: -ccbin={host} is too new"


def test_flags_are_those_that_the_compiler_knows():
    flags = ["-Wall", "-fno-such-flag", "-mno-such-machine", "-std=c++20"]
    assert toolchain.accepted("c++", flags) == ["-Wall", "-std=c++20"]


@pytest.mark.parametrize("asked", ["", "1"])
def test_another_cuda_ends_the_cuda_part_alone(asked, tmp_path):
    """Unless SEGKERN_CUDA=1 asks for it; either way the reason stands in the build's output."""
    if torch.version.cuda is None:
        pytest.skip("torch is not a CUDA build")
    program(tmp_path / "bin/nvcc", NVCC.format(version="11.0"))
    env = os.environ | {"CUDA_HOME": str(tmp_path), "SEGKERN_CUDA": asked}
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path / "lib"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == int(asked or 0), run.stderr
    assert "but this is nvcc 11.0" in run.stderr
    assert ("Mend that or leave out SEGKERN_CUDA=1" in run.stderr) == bool(asked)
    if not asked:
        info = json.loads((tmp_path / "lib/segkern/_build_info.json").read_text())
        assert "but this is nvcc 11.0" in info["no_cuda"]


GPUS = [  # what nvidia-smi prints, and what `make` builds for
    ("9.0", "9.0"),
    ("12.0\n8.6\n8.6", "12.0;8.6"),
    ("NVIDIA-SMI has failed because it could not talk to the driver.", "9.0"),
    ("[N/A]", "9.0"),
]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("printed", "built"), GPUS)
def test_make_builds_for_all_gpus_at_hand(printed, built, tmp_path):
    program(tmp_path / "nvidia-smi", f"printf '{printed}\\n'")
    env = {k: v for k, v in os.environ.items() if k not in ("TORCH_CUDA_ARCH_LIST", "MAKEFLAGS")}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    command = ["make", "-s", "--eval", 'shown: ; @echo "$$TORCH_CUDA_ARCH_LIST"', "shown"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.stdout.strip() == built, run.stderr


def test_the_source_distribution_has_every_source(tmp_path):
    """Made where there is neither torch nor a compiler."""
    (tmp_path / "torch.py").write_text("raise ImportError('not here')\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path), "CXX": "none", "CUDA_HOME": "none"}
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist"]
    command += ["--dist-dir", tmp_path]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    files = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    files += [*(ROOT / "segkern").rglob("*.py"), ROOT / "segkern/py.typed"]
    files += [ROOT / "tools/toolchain.py", ROOT / "pyproject.toml", ROOT / "LICENSE"]
    assert {str(p.relative_to(ROOT)) for p in files} <= packed
    assert not [p for p in packed if p.endswith((".so", ".pyc", "_build_info.json"))]


def test_a_compiler_that_fails_says_what_to_do(tmp_path):
    env = os.environ | {"CXX": "false", "SEGKERN_NO_CUDA": "1"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode != 0
    for words in ("The compiler failed", "set CXX", "SEGKERN_NO_CUDA=1", "SEGKERN_NO_BUILD=1"):
        assert words in run.stderr


OLD_SETUPTOOLS = """
import runpy, setuptools, sys
setuptools.__version__, sys.argv = "65.5.0", ["setup.py", "sdist"]
runpy.run_path("setup.py")
"""


def test_build_with_old_setuptools_says_what_to_do():
    command = [sys.executable, "-c", OLD_SETUPTOOLS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "setuptools is 65.5.0" in run.stderr
    assert 'pip install "setuptools>=77"' in run.stderr


WINDOWS = """
import runpy, setuptools, sys
sys.platform, sys.argv = "win32", ["setup.py", "-q", "build_py", "--build-lib", {folder!r}]
runpy.run_path("setup.py")
"""


def test_windows_gets_the_pure_python_install(tmp_path):
    python(WINDOWS.format(folder=str(tmp_path)), ROOT)
    code = "import segkern; print(segkern.ops._library.info()['cpu kernels'])"
    said = python(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert said == "missing: pure-Python install (there are no kernels for Windows)\n"


RUNS = [  # CUDA of the build and of torch, that of the driver, what is said of the CUDA kernels
    ("13.2", "13.0", "13.0", ""),
    ("13.2", "13.0", None, ""),
    ("13.2", "13.0", "12.4", "driver runs CUDA 12.4 at most, the kernels are for CUDA 13"),
    ("12.6", "13.2", "13.2", "built for torch 2.15 (CUDA 12.6), this is torch"),
    (None, "13.2", "13.2", "built for torch 2.15 (CUDA none), this is torch"),
    ("13.2", None, "13.2", "is not a CUDA build"),
    ("unknown", "13.2", "13.2", ""),
]


@pytest.mark.parametrize(("built", "here", "driver", "said"), RUNS)
def test_kernels_that_do_not_fit_torch_or_the_driver(built, here, driver, said, monkeypatch):
    build = {"torch": "2.15"} | ({} if built == "unknown" else {"cuda": built})
    monkeypatch.setattr(_library, "BUILD", build)
    monkeypatch.setattr(torch.version, "cuda", here)
    monkeypatch.setattr(_library, "driver_cuda", lambda: driver)
    why = _library._unfit()
    assert said in why
    assert bool(why) == bool(said)
    assert _library.info()["CUDA driver"] == (f"runs CUDA {driver}" if driver else "none")


IMPORT = """
import sys, warnings, torch
import torch.version
{change}
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import segkern
    import segkern.models
from segkern.ops import _library
print(*(w.message for w in seen if "segkern" in str(w.message)), sep="\\n")
"""
WARNED = [
    ("", ""),
    ("torch.version.cuda = '99.0'", "--no-build-isolation"),
    ("torch.version.hip, torch.version.cuda = '7.1', None", "on ROCm"),
]


@pytest.mark.parametrize(("change", "said"), WARNED, ids=["fits", "other CUDA", "ROCm"])
def test_import_says_once_what_does_not_fit(change, said, tmp_path):
    shutil.copytree(ROOT / "segkern", tmp_path / "segkern", ignore=shutil.ignore_patterns("*.so"))
    info = {"torch": "2.15", "cuda": torch.version.cuda}
    (tmp_path / "segkern/_build_info.json").write_text(json.dumps(info))
    lines = python(IMPORT.format(change=change), tmp_path, PYTHONPATH=str(tmp_path)).strip()
    assert lines.count("segkern: ") == bool(said)
    assert said in lines


def test_rocm_runs_the_reference_of_what_is_cuda_code(monkeypatch):
    monkeypatch.setattr(_library, "ROCM", True)
    monkeypatch.setattr(_library, "MISSING", {})
    names = {"linear_assignment", "ms_deform_attn", "point_mask_loss"}
    assert names <= _library._cuda_only()
    assert "linear_assignment" in _library.info()["cuda kernels"]

    class OnDevice:
        device = torch.device("cuda")

    for op in names:
        assert not _library.use_kernel(op, "kernel", OnDevice)
    assert _library.use_kernel("masked_attn", "kernel", OnDevice)
    cost, _ = linear_assignment_inputs(1, 4, 3)
    assert _library.use_kernel("linear_assignment", "kernel", cost)


@pytest.mark.parametrize(("capability", "old"), [((7, 5), True), ((8, 0), False)])
def test_info_says_what_a_gpu_is_too_old_for(capability, old, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert ("Triton's kernels are made for 8.0" in _library.info()["GPU"]) == old


def test_missing_kernels_name_what_a_user_can_do(monkeypatch):
    monkeypatch.setitem(_library.MISSING, "cpu", "not built")
    with pytest.raises(ValueError, match=r"no kernels: not built; .* with SEGKERN_NO_BUILD=1"):
        usable_device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_the_cpu_kernels_compile_with_another_compiler(compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    command = [compiler, "-std=c++20", "-fsyntax-only", "-fopenmp-simd", "-w", *includes]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    for source in (ROOT / "csrc/cpu").glob("*.cpp"):
        run = subprocess.run([*command, source], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
