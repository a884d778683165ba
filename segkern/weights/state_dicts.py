"""State dicts: what does not fit a model, how they are renamed and how they are written."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def with_new_head(
    weights: dict[str, Tensor], own: dict[str, Tensor], head: Iterable[str]
) -> dict[str, Tensor]:
    """`weights` with a model's `own` in place of those named in `head`, as far as it has them."""
    return weights | {name: own[name] for name in head if name in own}


def on_disk(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as safetensors writes them: contiguous on the CPU, and of those that share memory,
    as tied layers do, each with its own copy."""
    written, places = {}, set()
    for name, value in weights.items():
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        written[name] = value.clone() if place in places else value
        places.add(place)
    return written


def write_tensors(path: Path, weights: dict[str, Tensor]) -> None:
    """Writes weights, as `on_disk` has them, to a safetensors file.

    Raises:
        OSError: it cannot be written, as where the disk is full.
    """
    try:
        save_file(on_disk(weights), path, metadata={"format": "pt"})
    except SafetensorError as error:  # which says the system's reason in its text alone
        number = re.search(r"os error (\d+)|code: (\d+)", str(error))
        if number is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        code = int(number[1] or number[2])
        raise OSError(code, os.strerror(code), str(path)) from error


def unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that they have without what wrapped their model: `module.` of
    DistributedDataParallel before all names, and `_orig_mod.` of torch.compile in any place."""
    out = {re.sub(r"(^|\.)_orig_mod\.", r"\1", str(name)): w for name, w in weights.items()}
    while out and all(name.startswith("module.") for name in out):
        out = {name.removeprefix("module."): value for name, value in out.items()}
    return out


def misshapen(weights: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Names of `weights` that have another shape than `own`."""
    return [k for k in own if k in weights and weights[k].shape != own[k].shape]


def misfits(weights: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Why `weights` cannot be loaded over `own`: missing, unexpected and misshapen keys."""

    def short(keys):
        return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")

    found = {
        "missing": [k for k in own if k not in weights],
        "unexpected": [k for k in weights if k not in own],
        "of another shape": [
            f"{k} {list(weights[k].shape)} instead of {list(own[k].shape)}"
            for k in misshapen(weights, own)
        ],
    }
    return [f"{what}: {short(keys)}" for what, keys in found.items() if keys]


def name_rules(pairs: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern, str]]:
    """Rules that rename modules and their tensors.

    Args:
        pairs: names of modules or tensors before and after; `#` stands for a number.
    """
    rules = []
    for source, target in pairs:
        pattern = re.escape(source).replace(r"\#", r"(\d+)")
        template, *rest = target.split("#")
        template += "".join(rf"\g<{i}>{part}" for i, part in enumerate(rest, 1))
        rules.append((re.compile(rf"^{pattern}(?=$|\.[a-z_]+$)"), template))
    return rules


def renamed(name: str, rules: list[tuple[re.Pattern, str]]) -> str | None:
    """A name by the first rule that fits; None where none does."""
    found = (pattern.subn(template, name) for pattern, template in rules)
    return next((new for new, count in found if count), None)
