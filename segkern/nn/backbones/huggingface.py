"""Backbones in Hugging Face's files: their settings, and the names of their weights.

Settings are the fields `backbone`, `backbone_options` and `drop_path_rate` of a model's config. Of
a Swin there are four spellings: hub and transformers 4, files written by transformers 5,
transformers 5 in memory, and that of a Swin of transformers' own for its first model of masks; all
are brought to the first. Of a DiNAT there is one.
"""

import re

import torch
from torch import Tensor

from ...weights.hf_folders import check_fixed
from ...weights.state_dicts import name_rules, renamed
from . import dinat
from .swin import VARIANTS

ENCODER = "model.pixel_level_module.encoder"

_SPELLINGS = [  # of a Swin
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"^({ENCODER})\.(?:swin|model)\.(encoder|embeddings)\.", r"\1.\2."),
        *(
            (rf"\.hidden_states_norms\.{i}\.", f".hidden_states_norms.stage{i + 1}.")
            for i in range(4)
        ),
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
_IGNORED = re.compile(
    r"\.relative_position_index$|\.encoder\.((swin|model)\.)?layernorm\.(weight|bias)$"
)

_BLOCK = (f"{ENCODER}.encoder.layers.#.blocks.#", "backbone.layers.#.blocks.#")
_SWIN = [
    (f"{ENCODER}.embeddings.patch_embeddings.projection", "backbone.patch_embed.proj"),
    (f"{ENCODER}.embeddings.norm", "backbone.patch_embed.norm"),
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
    (f"{ENCODER}.encoder.layers.#.downsample.norm", "backbone.layers.#.downsample.norm"),
    (
        f"{ENCODER}.encoder.layers.#.downsample.reduction",
        "backbone.layers.#.downsample.reduction",
    ),
    *((f"{ENCODER}.hidden_states_norms.stage{i + 1}", f"backbone.norms.{i}") for i in range(4)),
]

_STAGE = f"{ENCODER}.encoder.stages"
_RESNET = [
    (f"{ENCODER}.embedder.embedder.convolution", "backbone.body.conv1"),
    (f"{ENCODER}.embedder.embedder.normalization", "backbone.body.bn1"),
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
_LEVEL = (f"{ENCODER}.encoder.levels.#", "backbone.layers.#")
_DINAT = [
    *(
        (f"{ENCODER}.embeddings.patch_embeddings.projection.{i}", f"backbone.patch_embed.proj.{i}")
        for i in range(2)
    ),
    (f"{ENCODER}.embeddings.norm", "backbone.patch_embed.norm"),
    *(
        (f"{_LEVEL[0]}.layers.#.{theirs}", f"{_LEVEL[1]}.blocks.#.{ours}")
        for theirs, ours in (
            ("layernorm_before", "norm1"),
            ("attention.self.query", "attn.query"),
            ("attention.self.key", "attn.key"),
            ("attention.self.value", "attn.value"),
            ("attention.self.rpb", "attn.rpb"),
            ("attention.output.dense", "attn.proj"),
            ("layernorm_after", "norm2"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("layer_scale_parameters", "gammas"),  # both
        )
    ),
    (f"{_LEVEL[0]}.downsample.norm", f"{_LEVEL[1]}.downsample.norm"),
    (f"{_LEVEL[0]}.downsample.reduction", f"{_LEVEL[1]}.downsample.reduction"),
    *((f"{ENCODER}.hidden_states_norms.stage{i + 1}", f"backbone.norms.{i}") for i in range(4)),
]
_TABLES = {"swin": _SWIN, "resnet": _RESNET, "dinat": _DINAT}
_PREFIXES = {
    "timm_backbone": (f"{ENCODER}._backbone.", "backbone.body."),
    "resnet_digits": (f"{ENCODER}.", "backbone."),
}
_FIXED_SWIN = {
    "patch_size": 4,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "use_absolute_embeddings": False,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_FIXED_DINAT = {
    "patch_size": 4,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_FIXED_RESNET = {
    "embedding_size": 64,
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
_SWIN_FIELDS = ("embed_dim", "depths", "num_heads", "window_size")
_SWIN = {  # as JSON has them
    name: tuple(list(v) if isinstance(v, tuple) else v for v in map(variant.get, _SWIN_FIELDS))
    for name, variant in VARIANTS.items()
}
_DINAT_FIELDS = {  # there, and what a file without it has: here
    ("embed_dim", 64): "embed_dim",
    ("depths", (3, 4, 6, 5)): "depths",
    ("num_heads", (2, 4, 8, 16)): "num_heads",
    ("kernel_size", 7): "kernel_size",
    ("dilations", None): "dilations",
    ("mlp_ratio", 3.0): "mlp_ratio",
    ("layer_scale_init_value", 0.0): "layer_scale",
}
_RESNET = {  # layer_type, depths
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
_RESNET_WIDTHS = {"basic": (64, 128, 256, 512), "bottleneck": (256, 512, 1024, 2048)}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def read_backbone(config: dict, name: str) -> dict:
    """backbone, backbone_options and drop_path_rate.

    Args:
        config: what config.json holds.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: a backbone, or an option of one, that is not here.
    """
    own = config.get("segkern") or {}
    if own.get("backbone"):  # written here
        fields = ("backbone", "backbone_options", "drop_path_rate")
        return {field: own[field] for field in fields}
    backbone = config.get("backbone_config")
    if backbone is None and config.get("use_timm_backbone"):
        backbone = {"model_type": "timm_backbone", "backbone": config.get("backbone")}
    family = (backbone or {}).get("model_type")
    stages = (backbone or {}).get("out_features", _STAGES)
    if family in ("swin", "resnet", "dinat") and list(stages) != _STAGES:
        raise ValueError(
            f"from_pretrained: {name}: out_features must be {', '.join(_STAGES)}, got {stages}"
        )
    if family == "swin":
        check_fixed(backbone, _FIXED_SWIN, name)
        rate = backbone.get("drop_path_rate", 0.1)
        return _read_swin(backbone) | {"drop_path_rate": rate}
    if family == "dinat":
        check_fixed(backbone, _FIXED_DINAT, name)
        rate = backbone.get("drop_path_rate", 0.1)
        return _read_dinat(backbone) | {"drop_path_rate": rate}
    if family == "resnet":
        check_fixed(backbone, _FIXED_RESNET, name)
        return _read_resnet(backbone) | {"drop_path_rate": 0.0}
    if family == "timm_backbone":
        frozen = {"freeze_norm": True} if backbone.get("freeze_batch_norm_2d") else {}
        return {
            "backbone": backbone["backbone"],
            "backbone_options": frozen,
            "drop_path_rate": 0.0,
        }
    raise ValueError(
        f"from_pretrained: {name}: the backbone must be swin, dinat, resnet or timm_backbone, "
        f"got {family}"
    )


def _read_swin(backbone: dict) -> dict:
    values = {f: backbone.get(f, default) for f, default in zip(_SWIN_FIELDS, _SWIN["swin_tiny"])}
    for name, variant in _SWIN.items():
        if tuple(values.values()) == variant:
            return {"backbone": name, "backbone_options": {}}
    return {"backbone": "swin_tiny", "backbone_options": values}


def _read_dinat(backbone: dict) -> dict:
    values = {ours: backbone.get(*theirs) for theirs, ours in _DINAT_FIELDS.items()}
    return dinat.settings(values)


def _read_resnet(backbone: dict) -> dict:
    kind = backbone.get("layer_type", "bottleneck")
    depths = tuple(backbone.get("depths", (3, 4, 6, 3)))
    widths = tuple(backbone.get("hidden_sizes", _RESNET_WIDTHS["bottleneck"]))
    options = {}
    names = [name for name, value in _RESNET.items() if value == (kind, depths)]
    if not names:
        options["layers"] = list(depths)
        names = ["resnet34" if kind == "basic" else "resnet50"]
    if widths != _RESNET_WIDTHS[kind]:
        options["channels"] = [w if kind == "basic" else w // 4 for w in widths]
    return {"backbone": names[0], "backbone_options": options}


def write_backbone(settings: dict) -> dict:
    """backbone_config of Hugging Face of a model's settings."""
    name, options = settings["backbone"], settings["backbone_options"]
    if name in _SWIN:
        values = dict(zip(_SWIN_FIELDS, _SWIN[name])) | options
        return {
            "model_type": "swin",
            "out_features": _STAGES,
            "image_size": 384 if values["window_size"] == 12 else 224,
            "drop_path_rate": settings["drop_path_rate"],
            **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
            **_FIXED_SWIN,
        }
    if name in dinat.VARIANTS:
        sizes = dinat.arguments(name, options)
        return {
            "model_type": "dinat",
            "out_features": _STAGES,
            "drop_path_rate": settings["drop_path_rate"],
            **{theirs: sizes[ours] for (theirs, _), ours in _DINAT_FIELDS.items()},
            **_FIXED_DINAT,
        }
    if name in _RESNET and not set(options) - {"layers", "channels", "freeze_norm"}:
        kind, depths = _RESNET[name]
        widths = list(_RESNET_WIDTHS[kind])
        if "channels" in options:
            widths = [c if kind == "basic" else 4 * c for c in options["channels"]]
        return {
            "model_type": "resnet",
            "out_features": _STAGES,
            "layer_type": kind,
            "depths": list(options.get("layers", depths)),
            "hidden_sizes": widths,
            **_FIXED_RESNET,
        }
    if name == "resnet_digits":
        return {"model_type": "resnet_digits"}
    return {
        "model_type": "timm_backbone",
        "backbone": name,
        "features_only": True,
        "out_indices": [-4, -3, -2, -1],
        "freeze_batch_norm_2d": False,
    }


def from_huggingface(
    state: dict[str, Tensor], decoders: list[tuple[str, str]], family: str
) -> dict[str, Tensor]:
    """A model's weights under our names; those that have none keep theirs.

    Args:
        state: weights in any of the spellings.
        decoders: the names of all but the backbone, there and here.
        family: of the backbone: "swin", "dinat", "resnet", "timm_backbone" or "resnet_digits".
    """
    kept = {}
    for name, value in state.items():
        if family == "swin":
            if _IGNORED.search(name):
                continue
            for pattern, replacement in _SPELLINGS:
                name = pattern.sub(replacement, name)
        kept[name] = value
    rules, prefix = name_rules(decoders + _TABLES.get(family, [])), _PREFIXES.get(family)
    out = {_renamed(name, rules, prefix): value for name, value in kept.items()}
    for name in list(out):
        if match := re.fullmatch(r"(backbone\..*\.attn\.)query(\.weight|\.bias)", name):
            parts = [f"{match[1]}{part}{match[2]}" for part in ("query", "key", "value")]
            if all(part in out for part in parts):
                out[f"{match[1]}qkv{match[2]}"] = torch.cat([out.pop(part) for part in parts])
        elif family == "dinat" and name.endswith(".gammas") and len(out[name]) == 2:
            for i, value in enumerate(out.pop(name), 1):
                out[f"{name.removesuffix('gammas')}gamma{i}"] = value
    return out


def to_huggingface(
    state: dict[str, Tensor], decoders: list[tuple[str, str]], family: str
) -> dict[str, Tensor]:
    """The way back, to the spelling of the hub; arguments as `from_huggingface`."""
    split = {}
    for name, value in state.items():
        one = family in ("swin", "dinat")
        if one and (match := re.fullmatch(r"(backbone\..*\.attn\.)qkv(\.weight|\.bias)", name)):
            for part, piece in zip(("query", "key", "value"), value.chunk(3)):
                split[f"{match[1]}{part}{match[2]}"] = piece
        elif family == "dinat" and name.endswith(".gamma1"):
            both = value, state[f"{name.removesuffix('1')}2"]
            split[f"{name.removesuffix('gamma1')}gammas"] = torch.stack(both)
        elif family != "dinat" or not name.endswith(".gamma2"):
            split[name] = value
    rules = name_rules((ours, theirs) for theirs, ours in decoders + _TABLES.get(family, []))
    prefix = _PREFIXES.get(family)
    back = None if prefix is None else prefix[::-1]
    return {_renamed(name, rules, back): value for name, value in split.items()}


def _renamed(name: str, rules: list, prefix: tuple[str, str] | None) -> str:
    """A name by the first rule that fits, or by what it begins with before and after."""
    if new := renamed(name, rules):
        return new
    if prefix is not None and name.startswith(prefix[0]):
        return prefix[1] + name.removeprefix(prefix[0])
    return name
