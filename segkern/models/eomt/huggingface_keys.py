"""Names of the weights: Hugging Face's EoMT and ours, both ways.

One table of module names serves both directions; `#` stands for a number. What is left are
products that one side has fused: q, k and v are one here, so are gate and the other half of a
gated feed-forward network.
"""

import re

import torch
from torch import Tensor

from ...weights.state_dicts import name_rules, renamed

_BLOCK = [
    ("layers.#.norm1", "encoder.blocks.#.norm1"),
    ("layers.#.layer_scale1.lambda1", "encoder.blocks.#.ls1"),
    ("layers.#.norm2", "encoder.blocks.#.norm2"),
    ("layers.#.layer_scale2.lambda1", "encoder.blocks.#.ls2"),
    *((f"layers.#.attention.{part}_proj", f"encoder.blocks.#.attn.{part}") for part in "qkv"),
    ("layers.#.mlp.gate_proj", "encoder.blocks.#.mlp.gate"),
]
_HEADS = [
    ("embeddings.cls_token", "encoder.cls_token"),
    ("embeddings.register_tokens", "encoder.reg_token"),
    ("layernorm", "encoder.norm"),
    ("query", "query"),
    ("upscale_block.block.#.conv1", "upscale.#.conv1"),
    ("upscale_block.block.#.conv2", "upscale.#.conv2"),
    ("upscale_block.block.#.layernorm2d", "upscale.#.norm"),
    *((f"mask_head.fc{i + 1}", f"mask_head.{i}") for i in range(3)),
    ("class_predictor", "class_predictor"),
    ("criterion.empty_weight", "criterion.empty_weight"),
    ("attn_mask_probs", "attn_mask_probs"),
]
_FORMS = {
    "dinov2": [
        ("embeddings.patch_embeddings.projection", "encoder.patch_embed.proj"),
        ("embeddings.position_embeddings.weight", "encoder.pos_embed"),
        ("layers.#.attention.out_proj", "encoder.blocks.#.attn.proj"),
    ],
    "dinov3": [
        ("embeddings.patch_embeddings", "encoder.patch_embed.proj"),
        ("layers.#.attention.o_proj", "encoder.blocks.#.attn.proj"),
    ],
}
_PLAIN = [
    ("layers.#.mlp.fc1", "encoder.blocks.#.mlp.fc1"),
    ("layers.#.mlp.fc2", "encoder.blocks.#.mlp.fc2"),
]
_UP_DOWN = [  # of DINOv3, and of gated networks
    ("layers.#.mlp.up_proj", "encoder.blocks.#.mlp.fc1"),
    ("layers.#.mlp.down_proj", "encoder.blocks.#.mlp.fc2"),
]
_FUSED = [  # of gated networks, as transformers 4 has them
    ("layers.#.mlp.weights_in", "encoder.blocks.#.mlp.fc1"),
    ("layers.#.mlp.weights_out", "encoder.blocks.#.mlp.fc2"),
]
_KNOWN_ABSENT = "embeddings.mask_token"  # of DINOv3, which segmentation has no use for


def from_huggingface(state: dict[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """Our names and products.

    Args:
        state: weights of transformers' EomtForUniversalSegmentation or
            EomtDinov3ForUniversalSegmentation.
        encoder: "dinov2" or "dinov3".

    Returns:
        The weights under our names; those that have none keep theirs.
    """
    rules = name_rules(_BLOCK + _HEADS + _FORMS[encoder] + _PLAIN + _UP_DOWN + _FUSED)
    out = {renamed(k, rules) or k: v for k, v in state.items() if k != _KNOWN_ABSENT}
    if "encoder.pos_embed" in out:
        out["encoder.pos_embed"] = out["encoder.pos_embed"][None]
    for name in list(out):
        if match := re.fullmatch(r"(encoder\.blocks\.\d+\.attn\.)q\.(weight|bias)", name):
            parts = [f"{match[1]}{part}.{match[2]}" for part in "qkv"]
            if all(part in out for part in parts):
                out[f"{match[1]}qkv.{match[2]}"] = torch.cat([out.pop(part) for part in parts])
            elif match[2] == "bias" and parts[2] in out:
                for part in "qv":
                    out[f"{match[1]}{part}_bias"] = out.pop(f"{match[1]}{part}.bias")
        elif match := re.fullmatch(r"(encoder\.blocks\.\d+\.mlp\.)gate\.(weight|bias)", name):
            up = f"{match[1]}fc1.{match[2]}"
            if up in out:
                out[up] = torch.cat((out.pop(name), out[up]))
    return out


def to_huggingface(state: dict[str, Tensor], encoder: str, gated: bool) -> dict[str, Tensor]:
    """The names and products that transformers finds on disk.

    Args:
        state: our weights.
        encoder: "dinov2" or "dinov3".
        gated: the feed-forward networks are.

    Returns:
        The weights under Hugging Face's names, without `criterion.seed`, which it does not have.
    """
    split = {}
    for name, value in state.items():
        if name == "criterion.seed":
            continue
        if match := re.fullmatch(r"(encoder\..*\.attn\.)qkv\.(weight|bias)", name):
            for part, piece in zip("qkv", value.chunk(3)):
                split[f"{match[1]}{part}.{match[2]}"] = piece
        elif match := re.fullmatch(r"(encoder\..*\.attn\.[qv])_bias", name):
            split[f"{match[1]}.bias"] = value
        elif gated and (match := re.fullmatch(r"(encoder\..*\.mlp\.)fc1\.(weight|bias)", name)):
            for part, piece in zip(("gate", "fc1"), value.chunk(2)):
                split[f"{match[1]}{part}.{match[2]}"] = piece
        else:
            split[name] = value[0] if name == "encoder.pos_embed" else value
    networks = _UP_DOWN if gated or encoder == "dinov3" else _PLAIN
    rules = name_rules((b, a) for a, b in _BLOCK + _HEADS + _FORMS[encoder] + networks)
    return {renamed(name, rules): value for name, value in split.items()}
