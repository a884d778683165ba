"""Folders in Hugging Face's format: config.json, preprocessor_config.json and the weights.

Plain functions on dicts: settings have the names of `Mask2FormerConfig`, weights those of
`Mask2Former`. What Hugging Face has no field for stands under "segkern" in config.json, which
transformers carries along. transformers opens what is written here if the backbone is a Swin, a
plain ResNet or another timm model; "resnet_digits" only opens here.
"""

from pathlib import Path

from torch import Tensor

from ...nn.backbones.swin import VARIANTS
from ...structures.labels import IMAGENET_MEAN, known_stuff
from ...weights import hf_folders as files
from ...weights.folders import find_folder, read_json
from .huggingface_keys import from_huggingface, to_huggingface

_SAME = {  # fields with one name and meaning, and Hugging Face's defaults
    "num_queries": 100,
    "hidden_dim": 256,
    "feature_size": 256,
    "mask_feature_size": 256,
    "encoder_layers": 6,
    "num_attention_heads": 8,
    "encoder_feedforward_dim": 1024,
    "dim_feedforward": 2048,
    "dropout": 0.0,
    "train_num_points": 12544,
    "oversample_ratio": 3.0,
    "importance_sample_ratio": 0.75,
    "class_weight": 2.0,
    "mask_weight": 5.0,
    "dice_weight": 5.0,
    "no_object_weight": 0.1,
}
_FIXED = {  # what the architecture does not leave open here
    "activation_function": "relu",
    "pre_norm": False,
    "enforce_input_projection": False,
    "common_stride": 4,
    "use_auxiliary_loss": True,
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
_RESNET = {  # layer_type, depths
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
_RESNET_WIDTHS = {"basic": (64, 128, 256, 512), "bottleneck": (256, 512, 1024, 2048)}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def read_folder(
    name_or_folder: str | Path, num_labels: int | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a Mask2Former in Hugging Face's format.

    Args:
        name_or_folder: a folder, or a name on the hub, which is downloaded.
        num_labels: K that the caller wants; then config.json may name another number of labels
            than the weights have, and the settings say what the weights have.

    Returns:
        settings under the names of `Mask2FormerConfig` (with "do_reduce_labels" and
        "ignore_index" of the preprocessor), and weights under our names; weights that have no
        name here keep theirs.

    Raises:
        ValueError: no such folder or name, a file that is missing or broken, an option that
            Mask2Former has not here, or a number of labels that does not fit the weights.
    """
    folder = find_folder(name_or_folder)
    config = read_json(folder / "config.json")
    settings = read_config(config, str(name_or_folder))
    if (folder / "preprocessor_config.json").is_file():
        settings |= read_preprocessor(read_json(folder / "preprocessor_config.json"))
    channels = (config.get("backbone_config") or {}).get("num_channels", 3)
    if channels != len(settings.get("image_mean", IMAGENET_MEAN)):
        raise ValueError(
            f"from_pretrained: {name_or_folder}: image_mean of preprocessor_config.json must have "
            f"num_channels ({channels}) numbers, got {settings.get('image_mean')}"
        )
    weights = from_huggingface(files.read_weights(folder), _family(settings))
    head = weights.get("query_decoder.class_embed.bias")
    if head is not None and head.shape[0] - 1 != settings["num_labels"]:
        has = head.shape[0] - 1
        if num_labels is None:
            raise ValueError(
                f"from_pretrained: {name_or_folder}: config.json names {settings['num_labels']} "
                f"classes, the weights have {has}; num_labels=... starts the class head anew"
            )
        settings |= {"num_labels": has, "id2label": None, "stuff": ()}
    return settings, weights


def write_folder(folder: str | Path, settings: dict, weights: dict[str, Tensor]) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors
    (`weights.hf_folders.write_folder`).

    Args:
        folder: is made if it is not there; other files in it stay, other weights go.
        settings: names of `Mask2FormerConfig`.
        weights: names of `Mask2Former`.

    Raises:
        OSError: the folder cannot be written to.
    """
    state = to_huggingface(weights, _family(settings))
    files.write_folder(folder, state, write_config(settings), write_preprocessor(settings))


def read_config(config: dict, name: str = "config.json") -> dict:
    """Settings under the names of `Mask2FormerConfig` from a config.json of Hugging Face.

    Args:
        config: what the file holds; a field that is missing has Hugging Face's default.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: another model, or an option that Mask2Former has not here.
    """
    if config.get("model_type") != "mask2former":
        raise ValueError(
            f"from_pretrained: {name}: model_type must be mask2former, "
            f"got {config.get('model_type')}"
        )
    files.check_fixed(config, _FIXED, name)
    own = config.get("segkern") or {}
    labels = files.read_labels(config, name)
    settings = {field: config.get(field, default) for field, default in _SAME.items()}
    settings |= {
        "decoder_layers": config.get("decoder_layers", 10) - 1,
        "num_labels": len(labels),
        "id2label": labels,
        "num_points_encoder": own.get("num_points_encoder", 4),
        "stuff": tuple(own["stuff"]) if "stuff" in own else known_stuff(labels),
    }
    return settings | _read_backbone(config, own, name)


def write_config(settings: dict) -> dict:
    """config.json of Hugging Face from settings under the names of `Mask2FormerConfig`."""
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": _write_backbone(settings)
        | {"num_channels": len(settings.get("image_mean", IMAGENET_MEAN))},
        "decoder_layers": settings["decoder_layers"] + 1,
        **{field: settings[field] for field in _SAME},
        **_FIXED,
        **files.write_labels(settings.get("id2label"), settings["num_labels"]),
        "segkern": {
            "stuff": list(settings.get("stuff", ())),
            "num_points_encoder": settings["num_points_encoder"],
            "backbone": settings["backbone"],
            "backbone_options": settings["backbone_options"],
            "drop_path_rate": settings["drop_path_rate"],
        },
    }


def read_preprocessor(config: dict) -> dict:
    """Settings under the names of `Mask2FormerConfig` from a preprocessor_config.json."""
    settings = {}
    for field in ("image_mean", "image_std"):
        if config.get(field):
            settings[field] = tuple(config[field])
    size = config.get("size")
    if isinstance(size, int):  # files of before 2023
        size = {"shortest_edge": size, "longest_edge": config.get("max_size", size)}
    if size and "height" in size:
        size = {"shortest_edge": min(size.values()), "longest_edge": max(size.values())}
    if size and "shortest_edge" in size:
        settings["shortest_edge"] = size["shortest_edge"]
        settings["longest_edge"] = size.get("longest_edge") or 2 * size["shortest_edge"]
    if config.get("size_divisor", config.get("size_divisibility")):
        settings["size_divisor"] = config.get("size_divisor", config.get("size_divisibility"))
    settings["ignore_index"] = config.get("ignore_index")
    settings["do_reduce_labels"] = config.get(
        "do_reduce_labels", config.get("reduce_labels", False)
    )
    return settings


def write_preprocessor(settings: dict) -> dict:
    """preprocessor_config.json of Hugging Face from settings."""
    return {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": True,
        "size": {k: settings[k] for k in ("shortest_edge", "longest_edge")},
        "size_divisor": settings["size_divisor"],
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings["image_mean"]),
        "image_std": list(settings["image_std"]),
        "ignore_index": settings.get("ignore_index"),
        "do_reduce_labels": settings.get("do_reduce_labels", False),
        "num_labels": settings["num_labels"],
    }


def _family(settings: dict) -> str:
    """Which table of names the backbone's weights follow."""
    return _write_backbone(settings)["model_type"]


def _read_backbone(config: dict, own: dict, name: str) -> dict:
    """backbone, backbone_options and drop_path_rate."""
    if own.get("backbone"):  # written here
        fields = ("backbone", "backbone_options", "drop_path_rate")
        return {field: own[field] for field in fields}
    backbone = config.get("backbone_config")
    if backbone is None and config.get("use_timm_backbone"):
        backbone = {"model_type": "timm_backbone", "backbone": config.get("backbone")}
    family = (backbone or {}).get("model_type")
    stages = (backbone or {}).get("out_features", _STAGES)
    if family in ("swin", "resnet") and list(stages) != _STAGES:
        raise ValueError(
            f"from_pretrained: {name}: out_features must be {', '.join(_STAGES)}, got {stages}"
        )
    if family == "swin":
        files.check_fixed(backbone, _FIXED_SWIN, name)
        rate = backbone.get("drop_path_rate", 0.1)
        return _read_swin(backbone) | {"drop_path_rate": rate}
    if family == "resnet":
        files.check_fixed(backbone, _FIXED_RESNET, name)
        return _read_resnet(backbone) | {"drop_path_rate": 0.0}
    if family == "timm_backbone":
        frozen = {"freeze_norm": True} if backbone.get("freeze_batch_norm_2d") else {}
        return {
            "backbone": backbone["backbone"],
            "backbone_options": frozen,
            "drop_path_rate": 0.0,
        }
    raise ValueError(
        f"from_pretrained: {name}: the backbone must be swin, resnet or timm_backbone, "
        f"got {family}"
    )


def _read_swin(backbone: dict) -> dict:
    values = {f: backbone.get(f, default) for f, default in zip(_SWIN_FIELDS, _SWIN["swin_tiny"])}
    for name, variant in _SWIN.items():
        if tuple(values.values()) == variant:
            return {"backbone": name, "backbone_options": {}}
    return {"backbone": "swin_tiny", "backbone_options": values}


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


def _write_backbone(settings: dict) -> dict:
    """backbone_config of Hugging Face."""
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
