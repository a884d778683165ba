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
            mean, std, divisor.
        run: pixels [B, C, h, w] float32 to the results, in the order of `about["outputs"]`.
    """

    about: dict
    run: Callable[[Tensor], Sequence[Tensor]]

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """The results by name, for [B, C, h, w] float32, normalised and padded.

        Raises:
            ValueError: h or w is no multiple of `about["divisor"]`.
        """
        divisor = self.about["divisor"]
        if pixel_values.ndim != 4 or any(side % divisor for side in pixel_values.shape[2:]):
            raise ValueError(
                f"load: pixel_values must be [B, C, h, w], h and w multiples of {divisor}, got "
                f"{list(pixel_values.shape)}"
            )
        return dict(zip(self.about["outputs"], self.run(pixel_values), strict=True))


def load(path: str | Path) -> Loaded:
    """Opens a .pt2 file.

    Args:
        path: an AOTInductor package or a torch.export program, written by `export`.

    Raises:
        FileNotFoundError: no such file, or no kernels here and none beside the file.
        ValueError: no .pt2 file that `export` wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: no file {path}")
    package = _is_package(path)
    _need_kernels(path)
    if package:
        model = torch._inductor.aoti_load_package(str(path))
        about = model.get_metadata().get(ABOUT)
    else:
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
