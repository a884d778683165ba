"""Opens .pt2 files that `export` wrote, without the model's code."""

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = "libsegkern.so"  # beside every .pt2 file
ABOUT = "segkern"  # the name of the description in a file


@dataclass(frozen=True)
class Loaded:
    """A model of a file.

    Attributes:
        about: what it is, and how pictures become pixels: kind, task, post, outputs, labels,
            mean, std, padding, divisor, and the shape of the pixels, with None for any number.
        run: pixels [B, C, h, w] float32 to the results, in the order of `about["outputs"]`.
    """

    about: dict
    run: Callable[[Tensor], Sequence[Tensor]]

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """The results by name, for [B, C, h, w] float32, normalised and padded.

        Raises:
            ValueError: not of `about["shape"]`, or h or w no multiple of `about["divisor"]`.
        """
        have, want, divisor = pixel_values.shape, self.about["shape"], self.about["divisor"]
        fits = len(have) == 4 and all(w in (None, n) for n, w in zip(have, want))
        if not fits or pixel_values.dtype != torch.float32 or any(n % divisor for n in have[2:]):
            shape = ", ".join(name if n is None else str(n) for name, n in zip("BChw", want))
            raise ValueError(
                f"load: pixel_values must be [{shape}] float32, h and w multiples of {divisor}, "
                f"got {list(have)} {str(pixel_values.dtype).removeprefix('torch.')}"
            )
        # compiled code takes what it is given for what it was compiled for
        found = self.run(pixel_values.contiguous())
        return dict(zip(self.about["outputs"], found, strict=True))


def load(path: str | Path) -> Loaded:
    """Opens a .pt2 file.

    Args:
        path: an AOTInductor package or a torch.export program, written by `export` or `quantize`.

    Raises:
        FileNotFoundError: no such file, or no kernels here and none beside a file that needs them.
        ImportError: a program in int8, and torchao is missing.
        ValueError: no .pt2 file that segkern wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: no file {path}")
    package = _is_package(path)
    if package or _calls(path, b"ops.segkern."):
        _need_kernels(path)
    if package:
        model = torch._inductor.aoti_load_package(str(path))
        about = model.get_metadata().get(ABOUT)
    else:
        if _calls(path, b"quantized_decomposed"):
            _need_int8(path)
        files = {ABOUT: ""}
        program = torch.export.load(path, extra_files=files)
        about, model = files[ABOUT], program.module(check_guards=False)
    if not about:
        raise ValueError(f"load: {path} was not written by segkern")
    return Loaded(json.loads(about), model)


def _is_package(path: Path) -> bool:
    """Whether a .pt2 file holds compiled code, or else a program."""
    try:
        with zipfile.ZipFile(path) as file:
            names = ["/".join(name.split("/")[1:]) for name in file.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"load: path must be a .pt2 file, {path} is none ({error})") from error
    if any(name.startswith("data/aotinductor/") for name in names):
        return True
    if any(name.startswith("models/") for name in names):
        return False
    raise ValueError(f"load: {path} holds neither compiled code nor a program")


def _calls(path: Path, ops: bytes) -> bool:
    """Whether a program calls ops of such a name."""
    with zipfile.ZipFile(path) as file:
        models = [n for n in file.namelist() if "/models/" in n and n.endswith(".json")]
        return any(ops in file.read(name) for name in models)


def _need_int8(path: Path) -> None:
    """Registers the ops of int8 programs."""
    try:
        import torchao.quantization.pt2e  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"load: {path} is in int8 and needs torchao: pip install torchao"
        ) from error


def _need_kernels(path: Path) -> None:
    """Loads the library beside a file, where this process has no kernels."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("segkern::linear", "CPU"):
        return
    library = path.with_name(LIBRARY)
    if not library.is_file():
        raise FileNotFoundError(
            f"load: {path} calls segkern's kernels: {LIBRARY} must lie beside it, as it was "
            "written, or segkern must be installed with its kernels"
        )
    torch.ops.load_library(library)
