"""Names of the weights: Hugging Face's Mask2Former and ours, both ways.

One table of module names serves both directions; `#` stands for a number. The backbones' names
stand in nn/backbones/huggingface.py. The projections to q, k and v of the query decoder's
cross-attention are one product there and three here.
"""

import re

import torch
from torch import Tensor

from ...nn.backbones import huggingface
from ...nn.backbones.huggingface import ENCODER

_PIXELS = "model.pixel_level_module.decoder"
_QUERIES = "model.transformer_module"
_CROSS = r"query_decoder\.layers\.\d+\.cross_attn\."  # here

PIXEL_DECODER = [
    (f"{_PIXELS}.level_embed", "pixel_decoder.level_embed"),
    (f"{_PIXELS}.input_projections.#.#", "pixel_decoder.input_proj.#.#"),
    *(
        (f"{_PIXELS}.encoder.layers.#.self_attn.{n}", f"pixel_decoder.layers.#.attn.{n}")
        for n in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    ),
    (f"{_PIXELS}.encoder.layers.#.self_attn_layer_norm", "pixel_decoder.layers.#.norm1"),
    (f"{_PIXELS}.encoder.layers.#.fc1", "pixel_decoder.layers.#.linear1"),
    (f"{_PIXELS}.encoder.layers.#.fc2", "pixel_decoder.layers.#.linear2"),
    (f"{_PIXELS}.encoder.layers.#.final_layer_norm", "pixel_decoder.layers.#.norm2"),
    (f"{_PIXELS}.adapter_1.#", "pixel_decoder.adapter.#"),
    (f"{_PIXELS}.layer_1.#", "pixel_decoder.output_conv.#"),
    (f"{_PIXELS}.mask_projection", "pixel_decoder.mask_features"),
]
_DECODERS = [
    *PIXEL_DECODER,
    (f"{_QUERIES}.queries_features", "query_decoder.query_feat"),
    (f"{_QUERIES}.queries_embedder", "query_decoder.query_embed"),
    (f"{_QUERIES}.level_embed", "query_decoder.level_embed"),
    *(
        (f"{_QUERIES}.decoder.layers.#.self_attn.{n}", f"query_decoder.layers.#.self_attn.{n}")
        for n in ("q_proj", "k_proj", "v_proj", "out_proj")
    ),
    (f"{_QUERIES}.decoder.layers.#.self_attn_layer_norm", "query_decoder.layers.#.self_norm"),
    *(
        (f"{_QUERIES}.decoder.layers.#.cross_attn.{n}", f"query_decoder.layers.#.cross_attn.{n}")
        for n in ("in_proj_weight", "in_proj_bias", "out_proj")
    ),
    (f"{_QUERIES}.decoder.layers.#.cross_attn_layer_norm", "query_decoder.layers.#.cross_norm"),
    (f"{_QUERIES}.decoder.layers.#.fc1", "query_decoder.layers.#.linear1"),
    (f"{_QUERIES}.decoder.layers.#.fc2", "query_decoder.layers.#.linear2"),
    (f"{_QUERIES}.decoder.layers.#.final_layer_norm", "query_decoder.layers.#.norm"),
    (f"{_QUERIES}.decoder.layernorm", "query_decoder.norm"),
    (f"{_QUERIES}.decoder.mask_predictor.mask_embedder.#.0", "query_decoder.mask_embed.#"),
    ("class_predictor", "query_decoder.class_embed"),
    ("criterion.empty_weight", "criterion.empty_weight"),
]


def from_huggingface(
    state: dict[str, Tensor],
    family: str,
    decoders: list[tuple[str, str]] = _DECODERS,
    joined: str = _CROSS,
) -> dict[str, Tensor]:
    """Our names and products.

    Args:
        state: weights of transformers' Mask2FormerForUniversalSegmentation in any of the three
            spellings.
        family: of the backbone: "swin", "resnet", "timm_backbone" or "resnet_digits".
        decoders: the names of all but the backbone, there and here.
        joined: pattern of our names of attentions whose three projections are one there.

    Returns:
        The weights under our names; those that have none keep theirs.
    """
    out = huggingface.from_huggingface(state, decoders, family)
    for name in list(out):
        if match := re.fullmatch(rf"({joined})in_proj(_weight|_bias)", name):
            for part, value in zip("qkv", out.pop(name).chunk(3)):
                out[f"{match[1]}{part}_proj.{match[2][1:]}"] = value
    return out


def to_huggingface(
    state: dict[str, Tensor],
    family: str,
    decoders: list[tuple[str, str]] = _DECODERS,
    joined: str = _CROSS,
) -> dict[str, Tensor]:
    """The names and products that transformers finds on disk.

    Args:
        state: our weights.
        family, decoders, joined: as `from_huggingface`.

    Returns:
        The weights under Hugging Face's names, without `criterion.seed`, which it does not have.
    """
    fused = {}
    for name, value in state.items():
        if match := re.fullmatch(rf"({joined})q_proj\.(weight|bias)", name):
            parts = [state[f"{match[1]}{part}_proj.{match[2]}"] for part in "qkv"]
            fused[f"{match[1]}in_proj_{match[2]}"] = torch.cat(parts)
        elif name != "criterion.seed" and not re.match(rf"{joined}[kv]_proj\.", name):
            fused[name] = value
    out = huggingface.to_huggingface(fused, decoders, family)
    if family == "swin":  # transformers 5 has, and never uses, one more norm, and misses it
        last = state["backbone.norms.3.weight"]
        out[f"{ENCODER}.swin.layernorm.weight"] = torch.ones_like(last)
        out[f"{ENCODER}.swin.layernorm.bias"] = torch.zeros_like(last)
    return out
