"""Checkpoints of Mask2Former's original code: a pickle of NumPy arrays, one .pkl file.

Plain functions on dicts, as huggingface.py. The file holds weights alone: sizes are read off their
shapes, and how pictures are resized off the number of classes, which tells the data set in the
published ones.
Source: the names of the weights are those of the published checkpoints (facebookresearch/
Mask2Former on detectron2).
"""

import re
import warnings
from collections.abc import Callable
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from ...nn.backbones.swin import VARIANTS
from ...structures.labels import DATASETS
from ...weights import unpickling

SUFFIX = ".pkl"  # of the file

_HEAD, _LAYERS = r"sem_seg_head\.pixel_decoder", r"sem_seg_head\.predictor\.transformer"
_NAMES = [  # the first that fits
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"backbone\.norm(\d)\.", r"backbone.norms.\1."),
        (r"backbone\.stem\.conv1\.norm\.", "backbone.body.bn1."),
        (r"backbone\.stem\.conv1\.", "backbone.body.conv1."),
        (r"backbone\.res(\d)\.(\d+)\.shortcut\.norm\.", r"backbone.body.layer\1.\2.downsample.1."),
        (r"backbone\.res(\d)\.(\d+)\.shortcut\.", r"backbone.body.layer\1.\2.downsample.0."),
        (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.", r"backbone.body.layer\1.\2.bn\3."),
        (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.", r"backbone.body.layer\1.\2.conv\3."),
        (rf"{_HEAD}\.transformer\.encoder\.(layers\.\d+)\.self_attn\.", r"pixel_decoder.\1.attn."),
        (rf"{_HEAD}\.transformer\.(encoder\.)?", "pixel_decoder."),
        (rf"{_HEAD}\.adapter_1\.norm\.", "pixel_decoder.adapter.1."),
        (rf"{_HEAD}\.adapter_1\.", "pixel_decoder.adapter.0."),
        (rf"{_HEAD}\.layer_1\.norm\.", "pixel_decoder.output_conv.1."),
        (rf"{_HEAD}\.layer_1\.", "pixel_decoder.output_conv.0."),
        (rf"{_HEAD}\.", "pixel_decoder."),
        (
            rf"{_LAYERS}_(self|cross)_attention_layers\.(\d+)\.norm\.",
            r"query_decoder.layers.\2.\1_norm.",
        ),
        (
            rf"{_LAYERS}_(self|cross)_attention_layers\.(\d+)\.(self|multihead)_attn\.",
            r"query_decoder.layers.\2.\1_attn.",
        ),
        (rf"{_LAYERS}_ffn_layers\.", "query_decoder.layers."),
        (r"sem_seg_head\.predictor\.decoder_norm\.", "query_decoder.norm."),
        (r"sem_seg_head\.predictor\.mask_embed\.layers\.", "query_decoder.mask_embed."),
        (r"sem_seg_head\.predictor\.static_query\.", "query_decoder.query_feat."),
        (r"sem_seg_head\.predictor\.", "query_decoder."),
    )
]
_COMPUTED = "relative_position_index"
_RESNETS = {6: "resnet50", 23: "resnet101"}  # by the blocks of the third stage
_LEVELS, _POINTS = 3, 4  # of the pixel decoder: the code reads no other number


def read_file(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a .pkl file.

    Args:
        path: of the file.

    Returns:
        settings under the names of `Mask2FormerConfig`, and weights under our names; weights that
        have no name here keep theirs.

    Raises:
        ValueError: no such checkpoint; or a backbone that is neither Swin nor ResNet.
    """
    content = unpickling.load_arrays(path)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "sem_seg_head.predictor.class_embed.weight" not in state:
        raise ValueError(
            f"from_pretrained: {path} is no checkpoint of Mask2Former's original code"
        )
    try:
        weights = from_original({name: torch.as_tensor(value) for name, value in state.items()})
        settings = read_sizes(weights, str(path))
    except (KeyError, TypeError, RuntimeError) as error:  # of MaskFormer, or no numbers
        raise ValueError(
            f"from_pretrained: {path} is no checkpoint of Mask2Former's original code ({error})"
        ) from error
    for name in [name for name in weights if name.endswith(".running_var")]:  # frozen there
        count = name.replace("running_var", "num_batches_tracked")
        weights.setdefault(count, torch.zeros((), dtype=torch.int64))
    return settings, weights


def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and products for the weights of the original code."""
    out = {}
    for name, value in state.items():
        if name.endswith(_COMPUTED):
            continue
        for pattern, replacement in _NAMES:
            name, count = pattern.subn(replacement, name)
            if count:
                break
        # its stages count from 2
        name = re.sub(r"(?<=body\.layer)\d", lambda found: str(int(found[0]) - 1), name)
        if found := re.fullmatch(r"(query_decoder\..*_attn\.)in_proj_(weight|bias)", name):
            for part, piece in zip("qkv", value.chunk(3)):
                out[f"{found[1]}{part}_proj.{found[2]}"] = piece
        else:
            out[name] = value
    return out


def read_sizes(weights: dict[str, Tensor], name: str) -> dict:
    """Settings under the names of `Mask2FormerConfig` that weights under our names show; a warning
    says what the number of classes alone tells.

    Args:
        weights: of `from_original`.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: a backbone that is neither Swin nor ResNet.
    """

    def rows(path: str) -> int:
        return weights[f"{path}.weight"].shape[0]

    def count(pattern: str) -> int:
        return len({found[0] for key in weights if (found := re.match(pattern, key))})

    labels = rows("query_decoder.class_embed") - 1
    queries, width = weights["query_decoder.query_feat.weight"].shape
    heads = rows("pixel_decoder.layers.0.attn.attention_weights") // (_LEVELS * _POINTS)
    return {
        "num_labels": labels,
        "num_queries": queries,
        "hidden_dim": width,
        "feature_size": width,
        "mask_feature_size": rows("pixel_decoder.mask_features"),
        "encoder_layers": count(r"pixel_decoder\.layers\.\d+\."),
        "decoder_layers": count(r"query_decoder\.layers\.\d+\."),
        "encoder_feedforward_dim": rows("pixel_decoder.layers.0.linear1"),
        "dim_feedforward": rows("query_decoder.layers.0.linear1"),
        "num_attention_heads": heads,
        **_dataset(labels, name),
        **read_backbone(weights, count, name),
    }


def _dataset(labels: int, name: str) -> dict:
    """What the published checkpoints with so many classes are trained on."""
    known = [
        (facts, task)
        for facts in DATASETS.values()
        for task, number in facts.labels.items()
        if number == labels and facts.edges is not None
    ]
    if not known:
        warnings.warn(
            f"{name}: has {labels} classes, which no published checkpoint has: pictures are "
            "resized as COCO's (shortest_edge, longest_edge), and no class is stuff",
            stacklevel=2,
        )
        return {}
    facts, task = known[0]
    stuff = facts.stuff if task == "panoptic" else ()
    return {"shortest_edge": facts.edges[0], "longest_edge": facts.edges[1], "stuff": stuff}


def read_backbone(weights: dict[str, Tensor], count: Callable[[str], int], name: str) -> dict:
    """backbone, backbone_options and drop_path_rate that weights under our names show.

    Args:
        weights: of `from_original`.
        count: of the different beginnings of names that a pattern finds.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: neither Swin nor ResNet.
    """
    if "backbone.patch_embed.proj.weight" in weights:
        tables = [
            weights[f"backbone.layers.{i}.blocks.0.attn.relative_position_bias_table"].shape
            for i in range(4)
        ]
        sizes = {
            "embed_dim": weights["backbone.patch_embed.proj.weight"].shape[0],
            "depths": tuple(count(rf"backbone\.layers\.{i}\.blocks\.\d+\.") for i in range(4)),
            "num_heads": tuple(heads for _, heads in tables),
            "window_size": (isqrt(tables[0][0]) + 1) // 2,
        }
        names = [variant for variant, known in VARIANTS.items() if known == sizes]
        return {
            "backbone": names[0] if names else "swin_tiny",
            "backbone_options": {} if names else sizes,
            "drop_path_rate": 0.3,  # that of all published ones; the file does not hold it
        }
    blocks = count(r"backbone\.body\.layer3\.\d+\.")
    if blocks not in _RESNETS:
        raise ValueError(
            f"from_pretrained: {name}: the backbone must be a Swin, ResNet-50 or ResNet-101"
        )
    return {"backbone": _RESNETS[blocks], "backbone_options": {"freeze_norm": True}}
