"""What every model offers in Hugging Face's manner, said once: opening a checkpoint, where and of
what dtype its weights are, how many they are; and its settings as plain values.

A model takes these into its class (`from_pretrained = classmethod(manners.from_pretrained)`) and
has `config_class` and `read_pretrained`, which reads the settings and weights of a checkpoint.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..weights.folders import find_folder, is_single_file
from ..weights.hub import Place
from .build import build, new_labels

Model = TypeVar("Model", bound=nn.Module)


def from_pretrained(
    cls: type[Model],
    name_or_folder: str | Path,
    num_labels: int | None = None,
    id2label: dict[int, str] | None = None,
    label2id: dict[str, int] | None = None,
    ignore_mismatched_sizes: bool = False,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> Model:
    """Opens a checkpoint, in eval mode.

    The class head starts anew, with a warning, where the new labels differ in number or in name
    from the checkpoint's; names of a checkpoint that has none, or LABEL_0, LABEL_1, ..., differ
    from no others.

    Args:
        name_or_folder: a folder that `save_pretrained`, transformers (4 or 5) or the model's
            original code wrote, one of its files, or the folder of a training run; a single file
            of the original code, where the model has such; or a name on the hub.
        num_labels: K of the new task. None keeps the checkpoint's, or is the number of names.
        id2label: names of the new task's labels.
        label2id: the same the other way round.
        ignore_mismatched_sizes: weights of another shape than the checkpoint's start anew, too,
            with a warning, in place of an error.
        dtype: of the model's floating weights, or its name; "auto" takes the checkpoint's. None is
            float32.
        torch_dtype: the same, by transformers' older name.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept; None is the hub's own place.
        token: for the hub; True takes the one that is stored.
        local_files_only: nothing is downloaded.
        subfolder: of the folder, or of the repository on the hub.

    Returns:
        The model.

    Raises:
        ValueError: no such checkpoint, labels that contradict each other, or weights that are not
            those of the configured model (names the keys); nothing is loaded then.
    """
    if dtype is not None and torch_dtype not in (None, dtype):
        raise ValueError(
            f"from_pretrained: torch_dtype must be left out beside dtype, got {torch_dtype}"
        )
    labels = new_labels(num_labels, id2label, label2id)
    source = name_or_folder
    if not is_single_file(source):
        place = Place(revision, cache_dir, token, local_files_only, subfolder)
        source = find_folder(source, place)
    settings, weights = cls.read_pretrained(source, labels and labels.count)
    model = build(source, cls, settings, weights, labels, ignore_mismatched_sizes)
    return model.to(_dtype(dtype or torch_dtype, weights))


def _dtype(wanted: str | torch.dtype | None, weights: dict[str, Tensor]) -> torch.dtype | None:
    if wanted == "auto":
        return next((w.dtype for w in weights.values() if w.is_floating_point()), None)
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if wanted is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(
            f"from_pretrained: dtype must be a floating dtype, its name or 'auto', got {wanted!r}"
        )
    return found


@property
def device(model: nn.Module) -> torch.device:
    """Where the first weight is."""
    return next(model.parameters()).device


@property
def dtype(model: nn.Module) -> torch.dtype:
    """Of the first floating weight."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def num_parameters(
    model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """How many numbers the weights are: all, those that are trained, those of no embedding."""
    parts = (m for m in model.modules() if not (exclude_embeddings and type(m) is nn.Embedding))
    found = {p for m in parts for p in m.parameters(recurse=False)}
    return sum(p.numel() for p in found if p.requires_grad or not only_trainable)


def to_dict(config) -> dict:
    """A config's settings as plain values, and its kind as "model_type"."""
    return {"model_type": config.kind, **asdict(config)}


def to_json_string(config) -> str:
    """The same as JSON."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"
