"""Checkpoints of SegFormer's original code: one .pth file, as MMSegmentation writes it.

Plain functions on dicts, as huggingface.py. The file holds weights and names of the classes: sizes
are read off the shapes of the weights; heads, and how pictures are resized, off the sizes and the
number of classes, which tell the published ones apart. An encoder by itself (mit_b0.pth) is such a
file without a head.
Source: the names of the weights are those of the published checkpoints (NVlabs/SegFormer).
"""

import re
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ...io.atomic_files import atomic
from ...structures.labels import DATASETS
from ...weights import unpickling
from ...weights.state_dicts import on_disk, unwrapped
from .config import SIZES, SegFormerConfig

SUFFIX = ".pth"  # of the file
LAYER_NORM_EPS = 1e-6  # of blocks and stages there, where transformers has 1e-5

_STAGES = (  # names there, whose stages count from 1, and here; # is a block
    ("backbone.patch_embed{}.", "backbone.stages.{}.patch_embed."),
    ("backbone.block{}.#.mlp.dwconv.dwconv.", "backbone.stages.{}.blocks.#.mlp.dwconv."),
    ("backbone.block{}.#.", "backbone.stages.{}.blocks.#."),
    ("backbone.norm{}.", "backbone.stages.{}.norm."),
    ("decode_head.linear_c{}.proj.", "head.linears.{}."),
)
_NAMES = [  # the first that fits
    *((a.format(i + 1), b.format(i)) for a, b in _STAGES for i in range(4)),
    ("decode_head.linear_fuse.conv.", "head.fuse."),
    ("decode_head.linear_fuse.bn.", "head.norm."),
    ("decode_head.linear_pred.", "head.classifier."),
]
# MMSegmentation's own classifier, which this head replaces, and that of ImageNet
_UNUSED = re.compile(r"(decode_head\.conv_seg|(backbone\.)?head)\.")
_UNUSED_WIDTH = 128  # of that classifier
_FILTERS = ("head.fuse.weight", "head.classifier.weight")  # 1 x 1 there


def read_file(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a .pth file.

    Args:
        path: of the file.

    Returns:
        settings under the names of `SegFormerConfig`, and weights under our names; weights that
        have no name here keep theirs.

    Raises:
        ValueError: no such checkpoint.
    """
    path = Path(path).expanduser()
    try:
        content = unpickling.load(path)
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path}: {error}") from error
    content = content if isinstance(content, dict) else {}
    state, _ = unpickling.weights_of(content)
    state = unwrapped(state)
    if "patch_embed1.proj.weight" in state:  # an encoder by itself
        state = {f"backbone.{name}": value for name, value in state.items()}
    weights = from_original(state)
    try:
        settings = read_sizes(weights, str(path))
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"from_pretrained: {path} is no checkpoint of SegFormer's original code ({error})"
        ) from error
    meta = content.get("meta")
    names = (meta if isinstance(meta, dict) else {}).get("CLASSES") or ()
    if len(names) == settings["num_labels"]:
        settings["id2label"] = dict(enumerate(map(str, names)))
    return settings, weights


def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and shapes for the weights of the original code."""
    out = {}
    for name, value in state.items():
        if not _UNUSED.match(name):
            name = _renamed(name, _NAMES)
            out[name] = value.flatten(1) if name in _FILTERS else value
    return out


def to_original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back; MMSegmentation's own classifier, which the head does not use, is zeros."""
    back, out = [(ours, theirs) for theirs, ours in _NAMES], {}
    for name, value in weights.items():
        out[_renamed(name, back)] = value[..., None, None] if name in _FILTERS else value
    if (bias := weights.get("head.classifier.bias")) is not None:
        out["decode_head.conv_seg.weight"] = bias.new_zeros(len(bias), _UNUSED_WIDTH, 1, 1)
        out["decode_head.conv_seg.bias"] = torch.zeros_like(bias)
    return out


def _renamed(name: str, pairs: list[tuple[str, str]]) -> str:
    for before, after in pairs:
        pattern = re.escape(before).replace(r"\#", r"(\d+)")
        if match := re.match(pattern, name):
            return after.replace("#", "".join(match.groups())) + name[match.end() :]
    return name


def write_file(path: str | Path, settings: dict, weights: dict[str, Tensor]) -> None:
    """Writes a .pth file, whole or not at all.

    Args:
        path: of the file; its folder is made if it is not there.
        settings: names of `SegFormerConfig`.
        weights: names of `SegFormer`.

    Raises:
        ValueError: another suffix.
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"save_original: path must end in {SUFFIX}, got {path}")
    if (eps := settings["layer_norm_eps"]) != LAYER_NORM_EPS:
        warnings.warn(
            f"{path}: layer_norm_eps is {eps} here, and {LAYER_NORM_EPS} in the original code, "
            "whose outputs differ by as much",
            stacklevel=3,
        )
    content = {"state_dict": on_disk(to_original(weights))}
    if names := settings.get("id2label"):
        content["meta"] = {"CLASSES": tuple(names[k] for k in range(len(names)))}
    with atomic(path) as temporary:
        torch.save(content, temporary)


def read_sizes(weights: dict[str, Tensor], name: str) -> dict:
    """Settings under the names of `SegFormerConfig` that weights under our names show; a warning
    says what no published checkpoint tells.

    Args:
        weights: of `from_original`.
        name: of the checkpoint, for messages.

    Raises:
        KeyError: a weight is missing.
    """
    stages = [f"backbone.stages.{i}" for i in range(4)]
    channels = tuple(len(weights[f"{s}.patch_embed.proj.weight"]) for s in stages)
    depths = tuple(
        len({found[1] for key in weights if (found := re.match(rf"{s}\.blocks\.(\d+)\.", key))})
        for s in stages
    )
    labels = len(weights["head.classifier.bias"]) if "head.classifier.bias" in weights else None
    sets = {DATASETS[name].labels["semantic"]: name for name in ("cityscapes", "ade20k")}
    sizes = [size for size, (*known, _) in SIZES.items() if known == [channels, depths]]
    taken = []
    if not sizes:
        taken.append(
            "heads are taken to be 1, 2, 5, 8, as its sizes are of no published checkpoint"
        )
    if labels is not None and labels not in sets:
        taken.append(
            f"pictures are resized as ADE20K's (shortest_edge, longest_edge), as its {labels} "
            "classes are of no published checkpoint"
        )
    if taken:
        warnings.warn(f"{name}: {'; '.join(taken)}", stacklevel=4)
    dataset = sets.get(labels, "ade20k")
    settings = asdict(SegFormerConfig.preset(sizes[0] if sizes else "b0", dataset))
    settings |= {"hidden_sizes": channels, "depths": depths, "layer_norm_eps": LAYER_NORM_EPS}
    settings["sr_ratios"] = tuple(
        weights[key].shape[-1] if (key := f"{s}.blocks.0.attn.sr.weight") in weights else 1
        for s in stages
    )
    settings["mlp_ratios"] = tuple(
        len(weights[f"{s}.blocks.0.mlp.fc1.bias"]) // c for s, c in zip(stages, channels)
    )
    if labels is not None:
        settings["num_labels"] = labels
        settings["decoder_hidden_size"] = len(weights["head.fuse.weight"])
    return settings
