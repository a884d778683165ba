"""Names of the weights: Hugging Face's Mask2Former and ours, both ways.

One table of module names serves both directions; `#` stands for a number. Backbones of timm keep
timm's names. What is left is the three spellings of a Swin (hub and transformers 4, files written
by transformers 5, transformers 5 in memory), which are brought to the one on the hub first, and
products that one side has fused: q, k and v of Swin are one product here, those of the query
decoder's cross-attention there.
"""

import re

import torch
from torch import Tensor

from ...weights.state_dicts import name_rules, renamed

_ENCODER = "model.pixel_level_module.encoder"
_PIXELS = "model.pixel_level_module.decoder"
_QUERIES = "model.transformer_module"
_CROSS = r"query_decoder\.layers\.\d+\.cross_attn\."  # here

_SPELLINGS = [  # of a Swin
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"^({_ENCODER})\.swin\.(encoder|embeddings)\.", r"\1.\2."),
        (r"\.attention\.q_proj\.", ".attention.self.query."),
        (r"\.attention\.k_proj\.", ".attention.self.key."),
        (r"\.attention\.v_proj\.", ".attention.self.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.relative_position_bias\.", ".attention.self."),
        (r"(\.blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
        (r"(\.blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
    )
]
# of a Swin: computed here, or never used by the model that wrote it
_IGNORED = re.compile(r"\.relative_position_index$|\.encoder\.(swin\.)?layernorm\.(weight|bias)$")

_DECODERS = [
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

_BLOCK = (f"{_ENCODER}.encoder.layers.#.blocks.#", "backbone.layers.#.blocks.#")
_SWIN = [
    (f"{_ENCODER}.embeddings.patch_embeddings.projection", "backbone.patch_embed.proj"),
    (f"{_ENCODER}.embeddings.norm", "backbone.patch_embed.norm"),
    *(
        (f"{_BLOCK[0]}.{theirs}", f"{_BLOCK[1]}.{ours}")
        for theirs, ours in (
            ("layernorm_before", "norm1"),
            ("attention.self.query", "attn.query"),
            ("attention.self.key", "attn.key"),
            ("attention.self.value", "attn.value"),
            ("attention.self.relative_position_bias_table", "attn.relative_position_bias_table"),
            ("attention.output.dense", "attn.proj"),
            ("layernorm_after", "norm2"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        )
    ),
    (f"{_ENCODER}.encoder.layers.#.downsample.norm", "backbone.layers.#.downsample.norm"),
    (
        f"{_ENCODER}.encoder.layers.#.downsample.reduction",
        "backbone.layers.#.downsample.reduction",
    ),
    *((f"{_ENCODER}.hidden_states_norms.stage{i + 1}", f"backbone.norms.{i}") for i in range(4)),
]

_STAGE = f"{_ENCODER}.encoder.stages"
_RESNET = [
    (f"{_ENCODER}.embedder.embedder.convolution", "backbone.body.conv1"),
    (f"{_ENCODER}.embedder.embedder.normalization", "backbone.body.bn1"),
    *(
        (f"{_STAGE}.{s}.layers.#.{theirs}", f"backbone.body.layer{s + 1}.#.{ours}")
        for s in range(4)
        for theirs, ours in (
            ("shortcut.convolution", "downsample.0"),
            ("shortcut.normalization", "downsample.1"),
            *((f"layer.{i}.convolution", f"conv{i + 1}") for i in range(3)),
            *((f"layer.{i}.normalization", f"bn{i + 1}") for i in range(3)),
        )
    ),
]
_TABLES = {"swin": _SWIN, "resnet": _RESNET}
_PREFIXES = {
    "timm_backbone": (f"{_ENCODER}._backbone.", "backbone.body."),
    "resnet_digits": (f"{_ENCODER}.", "backbone."),
}


def _rename(names: list[str], family: str, back: bool) -> dict[str, str]:
    pairs = _DECODERS + _TABLES.get(family, [])
    rules = name_rules((b, a) for a, b in pairs) if back else name_rules(pairs)
    prefix = _PREFIXES.get(family)
    out = {}
    for name in names:
        out[name] = renamed(name, rules) or name
        if out[name] == name and prefix is not None and name.startswith(prefix[back]):
            out[name] = prefix[1 - back] + name.removeprefix(prefix[back])
    return out


def from_huggingface(state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Our names and products.

    Args:
        state: weights of transformers' Mask2FormerForUniversalSegmentation in any of the three
            spellings.
        family: of the backbone: "swin", "resnet", "timm_backbone" or "resnet_digits".

    Returns:
        The weights under our names; those that have none keep theirs.
    """
    kept = {}
    for name, value in state.items():
        if family == "swin":
            if _IGNORED.search(name):
                continue
            for pattern, replacement in _SPELLINGS:
                name = pattern.sub(replacement, name)
        kept[name] = value
    names = _rename(list(kept), family, back=False)
    out = {names[name]: value for name, value in kept.items()}
    for name in list(out):
        if match := re.fullmatch(r"(backbone\..*\.attn\.)query(\.weight|\.bias)", name):
            parts = [f"{match[1]}{part}{match[2]}" for part in ("query", "key", "value")]
            if all(part in out for part in parts):
                out[f"{match[1]}qkv{match[2]}"] = torch.cat([out.pop(part) for part in parts])
        elif match := re.fullmatch(rf"({_CROSS})in_proj(_weight|_bias)", name):
            for part, value in zip("qkv", out.pop(name).chunk(3)):
                out[f"{match[1]}{part}_proj.{match[2][1:]}"] = value
    return out


def to_huggingface(state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The names and products that transformers finds on disk.

    Args:
        state: our weights.
        family: of the backbone: "swin", "resnet", "timm_backbone" or "resnet_digits".

    Returns:
        The weights under Hugging Face's names, without `criterion.seed`, which it does not have.
    """
    split = {}
    for name, value in state.items():
        swin = family == "swin"
        if swin and (match := re.fullmatch(r"(backbone\..*\.attn\.)qkv(\.weight|\.bias)", name)):
            for part, piece in zip(("query", "key", "value"), value.chunk(3)):
                split[f"{match[1]}{part}{match[2]}"] = piece
        elif match := re.fullmatch(rf"({_CROSS})q_proj\.(weight|bias)", name):
            parts = [state[f"{match[1]}{part}_proj.{match[2]}"] for part in "qkv"]
            split[f"{match[1]}in_proj_{match[2]}"] = torch.cat(parts)
        elif name != "criterion.seed" and not re.match(rf"{_CROSS}[kv]_proj\.", name):
            split[name] = value
    names = _rename(list(split), family, back=True)
    out = {names[name]: value for name, value in split.items()}
    if family == "swin":  # transformers 5 has, and never uses, one more norm, and misses it
        last = state["backbone.norms.3.weight"]
        out[f"{_ENCODER}.swin.layernorm.weight"] = torch.ones_like(last)
        out[f"{_ENCODER}.swin.layernorm.bias"] = torch.zeros_like(last)
    return out
