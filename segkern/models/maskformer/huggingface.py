"""Folders in Hugging Face's format: config.json, preprocessor_config.json and the weights.

Plain functions on dicts: settings have the names of `MaskFormerConfig`, weights those of
`MaskFormer`. What Hugging Face has no field for stands under "segkern" in config.json, which
transformers carries along. transformers opens what is written here if the backbone is a Swin, a
plain ResNet or another timm model; "resnet_digits" only opens here.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from ...nn.backbones import huggingface as backbones
from ...nn.backbones.huggingface import ENCODER, read_backbone, write_backbone
from ...nn.backbones.swin import bias_rows
from ...structures.labels import IMAGENET_MEAN, known_stuff
from ...weights import hf_folders as files
from .. import huggingface as folders
from ..preprocessor import write_preprocessor

_SAME = {  # fields with one name and meaning, and Hugging Face's defaults
    "fpn_feature_size": 256,
    "mask_feature_size": 256,
    "use_auxiliary_loss": False,
    "cross_entropy_weight": 1.0,
    "mask_weight": 20.0,
    "dice_weight": 1.0,
    "no_object_weight": 0.1,
}
_DECODER = {  # of decoder_config: the field there, its default, ours
    "num_queries": (100, "num_queries"),
    "d_model": (256, "hidden_dim"),
    "decoder_layers": (6, "decoder_layers"),
    "decoder_attention_heads": (8, "num_attention_heads"),
    "decoder_ffn_dim": (2048, "dim_feedforward"),
    "dropout": (0.1, "dropout"),
}
_FIXED_DECODER = {  # what the architecture does not leave open here
    "model_type": "detr",
    "activation_function": "relu",
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "auxiliary_loss": False,
}

_PIXELS = "model.pixel_level_module.decoder"
_QUERIES = "model.transformer_module"
_LAYER = f"{_QUERIES}.decoder.layers.#", "query_decoder.layers.#"
_DECODERS = [
    (f"{_PIXELS}.fpn.stem.#", "pixel_decoder.stem.#"),
    (f"{_PIXELS}.fpn.layers.#.proj.#", "pixel_decoder.adapters.#.#"),
    (f"{_PIXELS}.fpn.layers.#.block.#", "pixel_decoder.blocks.#.#"),
    (f"{_PIXELS}.mask_projection", "pixel_decoder.mask_features"),
    (f"{_QUERIES}.queries_embedder", "query_decoder.query_embed"),
    (f"{_QUERIES}.input_projection", "query_decoder.input_proj"),
    *(
        (f"{_LAYER[0]}.{theirs}.{n}", f"{_LAYER[1]}.{ours}.{n}")
        for theirs, ours in (("self_attn", "self_attn"), ("encoder_attn", "cross_attn"))
        for n in ("q_proj", "k_proj", "v_proj", "out_proj")
    ),
    *(
        (f"{_LAYER[0]}.{theirs}", f"{_LAYER[1]}.{ours}")
        for theirs, ours in (
            ("self_attn_layer_norm", "self_norm"),
            ("encoder_attn_layer_norm", "cross_norm"),
            ("fc1", "linear1"),
            ("fc2", "linear2"),
            ("final_layer_norm", "norm"),
        )
    ),
    (f"{_QUERIES}.decoder.layernorm", "query_decoder.norm"),
    ("class_predictor", "query_decoder.class_embed"),
    ("mask_embedder.#.0", "query_decoder.mask_embed.#"),
    ("criterion.empty_weight", "criterion.empty_weight"),
]
_IN_MEMORY = [  # of transformers 5
    (re.compile(rf"^({re.escape(_QUERIES)}\.decoder\.layers\.\d+)\.{theirs}\."), rf"\1.{hub}.")
    for theirs, hub in (
        (r"mlp\.fc1", "fc1"),
        (r"mlp\.fc2", "fc2"),
        (r"self_attn\.o_proj", "self_attn.out_proj"),
        (r"encoder_attn\.o_proj", "encoder_attn.out_proj"),
    )
]
_ON_HUB = [  # this model's own Swin
    (re.compile(rf"^({re.escape(ENCODER)})\.(encoder|embeddings)\."), r"\1.model.\2."),
    *(
        (re.compile(rf"\.hidden_states_norms\.stage{i + 1}\."), f".hidden_states_norms.{i}.")
        for i in range(4)
    ),
]


def read_folder(
    name_or_folder: str | Path, num_labels: int | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a MaskFormer in Hugging Face's format, as
    `models.huggingface.read_folder` describes them."""
    return folders.read_folder(
        name_or_folder,
        num_labels,
        read_config,
        lambda state, settings: from_huggingface(state, folders.family(settings)),
        "query_decoder.class_embed.bias",
    )


def write_folder(folder: str | Path, settings: dict, weights: dict[str, Tensor]) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors, each whole at any time.

    Args:
        folder: is made if it is not there; other files in it stay, other weights go.
        settings: names of `MaskFormerConfig`.
        weights: names of `MaskFormer`.

    Raises:
        OSError: the folder cannot be written to.
    """
    preprocessor = write_preprocessor(settings, "MaskFormerImageProcessor")
    config = write_config(settings)
    state = to_huggingface(
        weights, folders.family(settings), config["backbone_config"].get("window_size")
    )
    files.write_folder(folder, state, config, preprocessor)


def read_config(config: dict, name: str = "config.json") -> dict:
    """Settings under the names of `MaskFormerConfig` from a config.json of Hugging Face.

    Args:
        config: what the file holds; a field that is missing has Hugging Face's default.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: another model, or an option that MaskFormer has not here.
    """
    files.check_type(config, "maskformer", name)
    decoder = config.get("decoder_config") or {}
    files.check_fixed(decoder, _FIXED_DECODER, f"{name}: decoder_config")
    own = config.get("segkern") or {}
    labels = files.read_labels(config, name)
    settings = {field: config.get(field, default) for field, default in _SAME.items()}
    settings |= {ours: decoder.get(field, value) for field, (value, ours) in _DECODER.items()}
    settings |= {
        "num_labels": len(labels),
        "id2label": labels,
        "stuff": tuple(own["stuff"]) if "stuff" in own else known_stuff(labels),
    }
    backbone = config.get("backbone_config")
    if backbone and backbone.get("model_type") == "maskformer-swin":
        config = config | {"backbone_config": backbone | {"model_type": "swin"}}
    return settings | read_backbone(config, name)


def write_config(settings: dict) -> dict:
    """config.json of Hugging Face from settings under the names of `MaskFormerConfig`."""
    decoder = {field: settings[ours] for field, (_, ours) in _DECODER.items()}
    return {
        "architectures": ["MaskFormerForInstanceSegmentation"],
        "model_type": "maskformer",
        "backbone_config": write_backbone(settings)
        | {"num_channels": len(settings.get("image_mean", IMAGENET_MEAN))},
        "decoder_config": decoder | _FIXED_DECODER,
        **{field: settings[field] for field in _SAME},
        **files.write_labels(settings.get("id2label"), settings["num_labels"]),
        "segkern": {
            "stuff": list(settings.get("stuff", ())),
            "backbone": settings["backbone"],
            "backbone_options": settings["backbone_options"],
            "drop_path_rate": settings["drop_path_rate"],
        },
    }


def from_huggingface(state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Our names and products.

    Args:
        state: weights of transformers' MaskFormerForInstanceSegmentation, as the hub and
            transformers 4 spell them, or transformers 5 in memory.
        family: of the backbone: "swin", "resnet", "timm_backbone" or "resnet_digits".

    Returns:
        The weights under our names; those that have none keep theirs.
    """
    hub = {_spelled(name, _IN_MEMORY): value for name, value in state.items()}
    return backbones.from_huggingface(hub, _DECODERS, family)


def to_huggingface(state: dict[str, Tensor], family: str, window: int | None) -> dict[str, Tensor]:
    """The names and products that transformers finds on disk.

    Args:
        state: our weights.
        family: of the backbone: "swin", "resnet", "timm_backbone" or "resnet_digits".
        window: side of a Swin's windows; None for another backbone.

    Returns:
        The weights under Hugging Face's names, with what a Swin has there besides: places in its
        tables of position biases, and a norm that is never used.
    """
    out = backbones.to_huggingface(state, _DECODERS, family)
    if family != "swin":
        return out
    out = {_spelled(name, _ON_HUB): value for name, value in out.items()}
    last = state["backbone.norms.3.weight"]
    for name in [name for name in out if name.endswith("relative_position_bias_table")]:
        out[name.replace("bias_table", "index")] = bias_rows(window, last.device)
    out[f"{ENCODER}.model.layernorm.weight"] = torch.ones_like(last)
    out[f"{ENCODER}.model.layernorm.bias"] = torch.zeros_like(last)
    return out


def _spelled(name: str, spellings: list[tuple[re.Pattern, str]]) -> str:
    for pattern, replacement in spellings:
        name = pattern.sub(replacement, name)
    return name
