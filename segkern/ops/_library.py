"""Finds and loads the compiled kernels, and says what is there and why something is not.

An op's Python file states its schema and fake here; the CPU library brings the schemas of its own
kernels too (csrc/cpu/schemas.cpp), for programs without Python, and they must be the same. CUDA's
registers kernels only, and Triton's are registered by name and imported at their first launch. The
device of the tensors decides which kernel runs; nothing falls back in silence.
"""

import ctypes
import importlib.util
import json
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent.parent
OPS: list[str] = []  # every op that is declared
CPU_ONLY: set[str] = set()  # of them, those that have no kernel for CUDA yet
COMPOSED: dict[str, Callable] = {}  # op to its kernel of PyTorch's ops, where TRITON has none
TRITON: dict[str, str] = {}  # op to the module of segkern.kernels that holds its launcher
_definitions = torch.library.Library("segkern", "DEF")


def _build_info() -> dict:
    path = PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _major(version: str) -> int:
    return int(version.split(".")[0])


def driver_cuda() -> str | None:
    """The newest CUDA that the NVIDIA driver runs, such as "13.0"; None without a driver."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _other_cuda() -> str:
    """What to do if segkern was built beside a torch of another CUDA, as pip's isolated builds
    are; empty if it was not, or this torch has no CUDA."""
    built, here = BUILD.get("cuda", torch.version.cuda), torch.version.cuda
    if here is None or (built is not None and _major(built) == _major(here)):
        return ""
    return (
        f"built for torch {BUILD['torch']} (CUDA {built or 'none'}), this is torch "
        f"{torch.__version__} (CUDA {here}): reinstall with "
        "`pip install --no-build-isolation --no-deps --force-reinstall segkern`"
    )


def _unfit() -> str:
    """Why the CUDA library could not run here, be it built or not; empty if it can."""
    here, driver = torch.version.cuda, driver_cuda()
    if here is None:
        return f"torch {torch.__version__} is not a CUDA build"
    built = BUILD.get("cuda") or here
    if driver is not None and _major(driver) < _major(built):
        return (
            f"the NVIDIA driver runs CUDA {driver} at most, the kernels are for CUDA "
            f"{_major(built)}: update the driver, or install torch and segkern for CUDA "
            f"{_major(driver)}"
        )
    return _other_cuda()


def _load() -> dict[str, str]:
    """Loads `_C_cpu` and `_C_cuda`. Returns, for each device without kernels, the reason."""
    missing = {}
    for device in ("cpu", "cuda"):
        if device == "cuda" and ROCM:
            continue  # see `use_kernel`
        path = PACKAGE / f"_C_{device}.abi3.so"
        unfit = _unfit() if device == "cuda" else ""
        if unfit:
            missing[device] = unfit
        elif not path.is_file():
            why = f"{path.name} was not built (run `make` or `pip install .`)"
            missing[device] = BUILD.get(f"no_{device}", why)
        elif device == "cpu" and _known("linear"):
            continue  # a copy beside an exported model was loaded before
        else:
            try:
                torch.ops.load_library(path)
            except OSError as error:
                missing[device] = f"{path.name} does not load: {error}"
    return missing


def _known(name: str) -> torch._C.FunctionSchema | None:
    """The schema of op `segkern::<name>`, where a library has brought it."""
    return next(iter(torch._C._jit_get_schemas_for_operator(f"segkern::{name}")), None)


def _say(what: str) -> None:
    warnings.warn(f"segkern: {what}", stacklevel=3)


BUILD = _build_info()
PURE = bool(BUILD.get("pure"))
ROCM = torch.version.hip is not None
REMEDY = "to run without kernels, slowly, reinstall segkern with SEGKERN_NO_BUILD=1"
if PURE:
    _why = f"pure-Python install ({BUILD.get('why', 'SEGKERN_NO_BUILD=1')})"
    MISSING = dict.fromkeys(("cpu", "cuda"), _why)
    _say(f"{_why}: the slow reference runs")
else:
    MISSING = _load()
    if ROCM:
        _say("on ROCm, ops whose kernels are CUDA C++ run their slow reference (`segkern info`)")
    elif _other_cuda():
        _say(f"no CUDA kernels: {_other_cuda()}")
if importlib.util.find_spec("triton") is None:
    MISSING["triton"] = "triton is not installed (pip install triton)"


def define(
    schema: str,
    fake: Callable,
    triton: str | None = None,
    cpu_only: bool = False,
    composed: Callable | None = None,
) -> torch._ops.OpOverload:
    """Declares op `segkern::<schema>` with its fake (shapes, dtypes); returns its handle.

    Args:
        triton: the module of `segkern.kernels` whose function of the op's name runs on CUDA; None
            where `_C_cuda` brings the kernel.
        cpu_only: there is no kernel for CUDA yet.
        composed: the kernel of PyTorch's own ops, for all devices that have no other.

    Raises:
        ImportError: the loaded library states another schema.
    """
    name = schema.split("(", 1)[0]
    known = _known(name)
    if known is None:
        _definitions.define(schema)
    elif known != torch._C.parse_schema(f"segkern::{schema}"):
        raise ImportError(
            f"segkern: the loaded kernels are of another version: {name} is {known} there, "
            f"{schema} here; build them again (run `make` or `pip install .`)"
        )
    OPS.append(name)
    if cpu_only:
        CPU_ONLY.add(name)
    torch.library.register_fake(f"segkern::{name}", fake, lib=_definitions)
    if triton is not None:
        TRITON[name] = triton

        def launch(*args):
            return getattr(importlib.import_module(f"segkern.kernels.{triton}"), name)(*args)

        _definitions.impl(name, launch, "CUDA")
    if composed is not None:
        COMPOSED[name] = composed
        _definitions.impl(name, composed, "CompositeExplicitAutograd")
    return getattr(torch.ops.segkern, name).default


def _cuda_only() -> set[str]:
    """The ops whose kernel for GPUs is CUDA C++, which ROCm lacks."""
    return set(OPS) - TRITON.keys() - CPU_ONLY - COMPOSED.keys()


def use_kernel(op: str, impl: str, tensor: torch.Tensor) -> bool:
    """True if the kernel is to run, False for the reference.

    Raises:
        ValueError: `impl` is neither "kernel" nor "reference".
        NotImplementedError: the tensor's device has no kernel in this install.
    """
    if impl not in ("kernel", "reference"):
        raise ValueError(f"{op}: impl must be 'kernel' or 'reference', got {impl!r}")
    device = tensor.device.type
    composed = op in COMPOSED and not (device == "cuda" and op in TRITON)
    if impl == "reference" or composed:
        return impl == "kernel"
    if PURE or (ROCM and device == "cuda" and op in _cuda_only()):
        return False
    library = "triton" if device == "cuda" and op in TRITON else device
    why = MISSING.get(library)
    if device not in ("cpu", "cuda", "meta"):
        why = why or "segkern has kernels for cpu and cuda only"
    elif device == "cuda" and op in CPU_ONLY:
        why = "this version has one for the CPU alone"
    if why is not None:
        raise NotImplementedError(
            f"{op}: no kernel for device '{device}': {why}; {REMEDY}, or give this call "
            "impl='reference'"
        )
    return True


def is_exported() -> bool:
    """Whether what runs is recorded by torch.export or torch.jit.trace, as a graph for batches of
    other sizes, too: a loop over images would be one of the recorded number."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def applied(function: type[torch.autograd.Function], *args):
    """`function.apply(*args)`; under torch.jit.trace its forward alone, as a graph with a function
    of Python cannot be saved."""
    if torch.jit.is_tracing():
        return function.forward(_Forgotten(), *args)
    return function.apply(*args)


class _Forgotten:
    """Stands for the context of a function that has no backward."""

    def save_for_backward(self, *tensors):
        pass


def simd_level() -> str:
    """The instruction set that the cloned CPU loops run with on this machine."""
    if platform.machine() != "x86_64":
        return "baseline"
    return {"AVX512": "x86-64-v4 (AVX-512)", "AVX2": "x86-64-v3 (AVX2)"}.get(
        torch.backends.cpu.get_cpu_capability(), "baseline"
    )


def info() -> dict[str, str]:
    """What `segkern info` prints: versions, libraries, SIMD level, architectures, reasons."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    rows = {
        name: installed(name) for name in ("segkern", "torch", "torchvision", "triton", "timm")
    }
    rows |= {"transformers": installed("transformers"), "python": platform.python_version()}
    for library in ("cpu", "cuda", "triton"):
        state = "found" if library == "triton" else "loaded"
        rows[f"{library} kernels"] = (
            f"missing: {MISSING[library]}" if library in MISSING else state
        )
    if ROCM:
        rows["cuda kernels"] = f"references on ROCm: {', '.join(sorted(_cuda_only()))}"
    rows["built with"] = ", ".join(
        f"{k} {BUILD[k]}" for k in ("torch", "python", "compiler", "nvcc") if k in BUILD
    )
    rows["SIMD"] = simd_level()
    rows["CUDA architectures"] = ", ".join(BUILD.get("cuda_architectures", [])) or "none"
    if BUILD.get("left_out"):
        rows["CUDA architectures"] += f"; left out: {BUILD['left_out']}"
    driver = driver_cuda()
    rows["CUDA driver"] = "none" if driver is None else f"runs CUDA {driver}"
    rows["CPU threads"] = str(torch.get_num_threads())
    return rows | {"GPU": _gpu()}


def _gpu() -> str:
    """Name and compute capability of the current GPU, and what it is too old for."""
    if not torch.cuda.is_available():
        return "none that torch can use"
    capability = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} ({'.'.join(map(str, capability))})"
    old = torch.version.cuda is not None and capability < (8, 0)
    return name + ("; Triton's kernels are made for 8.0 and later" if old else "")
