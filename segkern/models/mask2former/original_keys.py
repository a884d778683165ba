"""Names of the weights: the original code's Mask2Former (on detectron2) and ours, both ways.

One table of module names serves both directions; `#` stands for a number. Projections to q, k and
v of the query decoder are one product there and three here; Swin's rows of position biases are
stored there and computed here.
Source: the names of the weights are those of the published checkpoints (facebookresearch/
Mask2Former on detectron2).
"""

import re
from math import isqrt

import torch
from torch import Tensor

from ...nn.backbones.swin import bias_rows
from ...weights.state_dicts import name_rules, renamed

_HEAD, _PREDICTOR = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
_ENCODER = f"{_HEAD}.transformer.encoder.layers.#"
_SELF = f"{_PREDICTOR}.transformer_self_attention_layers.#"
_CROSS = f"{_PREDICTOR}.transformer_cross_attention_layers.#"
_FEEDFORWARD = f"{_PREDICTOR}.transformer_ffn_layers.#"
_PROJECTIONS = ("in_proj_weight", "in_proj_bias", "out_proj")

_RESNET = [  # stages count from 2 there, and norms lie inside of their convolutions
    ("backbone.stem.conv1", "backbone.body.conv1"),
    ("backbone.stem.conv1.norm", "backbone.body.bn1"),
    *(
        (f"backbone.res{stage + 1}.#.{theirs}", f"backbone.body.layer{stage}.#.{ours}")
        for stage in range(1, 5)
        for theirs, ours in (
            ("shortcut", "downsample.0"),
            ("shortcut.norm", "downsample.1"),
            ("conv#", "conv#"),
            ("conv#.norm", "bn#"),
        )
    ),
]
_SWIN = [("backbone.norm#", "backbone.norms.#")]  # its other names are the same, and a DiNAT's
_DINAT = re.compile(r"^backbone\.levels\."), "backbone.layers."  # but for this
_DECODERS = [
    (f"{_HEAD}.transformer.level_embed", "pixel_decoder.level_embed"),
    (f"{_HEAD}.input_proj.#.#", "pixel_decoder.input_proj.#.#"),
    *(
        (f"{_ENCODER}.self_attn.{n}", f"pixel_decoder.layers.#.attn.{n}")
        for n in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    ),
    *(
        (f"{_ENCODER}.{n}", f"pixel_decoder.layers.#.{n}")
        for n in ("norm1", "norm2", "linear1", "linear2")
    ),
    (f"{_HEAD}.adapter_1", "pixel_decoder.adapter.0"),
    (f"{_HEAD}.adapter_1.norm", "pixel_decoder.adapter.1"),
    (f"{_HEAD}.layer_1", "pixel_decoder.output_conv.0"),
    (f"{_HEAD}.layer_1.norm", "pixel_decoder.output_conv.1"),
    (f"{_HEAD}.mask_features", "pixel_decoder.mask_features"),
    *((f"{_SELF}.self_attn.{n}", f"query_decoder.layers.#.self_attn.{n}") for n in _PROJECTIONS),
    (f"{_SELF}.norm", "query_decoder.layers.#.self_norm"),
    *(
        (f"{_CROSS}.multihead_attn.{n}", f"query_decoder.layers.#.cross_attn.{n}")
        for n in _PROJECTIONS
    ),
    (f"{_CROSS}.norm", "query_decoder.layers.#.cross_norm"),
    *(
        (f"{_FEEDFORWARD}.{n}", f"query_decoder.layers.#.{n}")
        for n in ("linear1", "linear2", "norm")
    ),
    (f"{_PREDICTOR}.decoder_norm", "query_decoder.norm"),
    (f"{_PREDICTOR}.mask_embed.layers.#", "query_decoder.mask_embed.#"),
    *(
        (f"{_PREDICTOR}.{n}", f"query_decoder.{n}")
        for n in ("query_feat", "query_embed", "level_embed", "class_embed")
    ),
]
_NAMES = _RESNET + _SWIN + _DECODERS
_OLD = [  # names of the code's first versions
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", f"{_HEAD}."),
        (rf"^{re.escape(_PREDICTOR)}\.static_query\.", f"{_PREDICTOR}.query_feat."),
    )
]
_COMPUTED = re.compile(r"relative_position_index$")
_ATTENTION = r"query_decoder\.layers\.\d+\.(self|cross)_attn\."  # here


def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and products for weights of the original code, of any of its versions; those that
    have no name here keep theirs."""
    rules, out = name_rules(_NAMES), {}
    for name, value in state.items():
        if _COMPUTED.search(name):
            continue
        for pattern, replacement in (*_OLD, _DINAT):
            name = pattern.sub(replacement, name)
        name = renamed(name, rules) or name
        if found := re.fullmatch(rf"({_ATTENTION})in_proj_(weight|bias)", name):
            for part, piece in zip("qkv", value.chunk(3)):
                out[f"{found[1]}{part}_proj.{found[3]}"] = piece
        else:
            out[name] = value
    return out


def to_original(weights: dict[str, Tensor], frozen: bool = False) -> dict[str, Tensor]:
    """The way back, to the names of the published checkpoints.

    Args:
        weights: under our names.
        frozen: the norms of a ResNet keep their statistics: such have no count of batches there.

    Returns:
        The weights under the original's names, without `criterion.seed`, which it does not have.
    """
    rules, out = name_rules((ours, theirs) for theirs, ours in _NAMES), {}
    for name, value in weights.items():
        counts = frozen and name.endswith("num_batches_tracked")
        if counts or name == "criterion.seed" or re.match(rf"{_ATTENTION}[kv]_proj\.", name):
            continue
        if found := re.fullmatch(rf"({_ATTENTION})q_proj\.(weight|bias)", name):
            parts = [weights[f"{found[1]}{part}_proj.{found[3]}"] for part in "qkv"]
            name, value = f"{found[1]}in_proj_{found[3]}", torch.cat(parts)
        out[renamed(name, rules) or name] = value
        if name.endswith("relative_position_bias_table"):
            window = (isqrt(len(value)) + 1) // 2
            index = bias_rows(window, torch.device("cpu"))
            out[name.replace("bias_table", "index")] = index
    return out
