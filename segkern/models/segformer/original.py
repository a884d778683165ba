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

from torch import Tensor

from ...structures.labels import DATASETS
from ...weights import unpickling
from ...weights.state_dicts import unwrapped
from .config import SIZES, SegFormerConfig

SUFFIX = ".pth"  # of the file
LAYER_NORM_EPS = 1e-6  # of blocks and stages there, where transformers has 1e-5

_NAMES = [  # the first that fits
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"backbone\.patch_embed(\d)\.", "backbone.stages.{}.patch_embed."),
        (r"backbone\.block(\d)\.(\d+)\.mlp\.dwconv\.", "backbone.stages.{}.blocks.{}.mlp."),
        (r"backbone\.block(\d)\.(\d+)\.", "backbone.stages.{}.blocks.{}."),
        (r"backbone\.norm(\d)\.", "backbone.stages.{}.norm."),
        (r"decode_head\.linear_c(\d)\.proj\.", "head.linears.{}."),
        (r"decode_head\.linear_fuse\.conv\.", "head.fuse."),
        (r"decode_head\.linear_fuse\.bn\.", "head.norm."),
        (r"decode_head\.linear_pred\.", "head.classifier."),
    )
]
# MMSegmentation's own classifier, which this head replaces, and that of ImageNet
_UNUSED = re.compile(r"(decode_head\.conv_seg|(backbone\.)?head)\.")
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
    try:
        content = unpickling.load(path)
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path}: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        state = {}
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
        if _UNUSED.match(name):
            continue
        for pattern, replacement in _NAMES:
            if match := pattern.match(name):
                stage, *block = match.groups() or ("1",)  # stages count from 1 there
                name = replacement.format(int(stage) - 1, *block) + name[match.end() :]
                break
        out[name] = value.flatten(1) if name in _FILTERS else value
    return out


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
