"""Folders in Hugging Face's format: config.json, preprocessor_config.json and the weights.

Plain functions on dicts: settings have the names of `EoMTConfig`, weights those of `EoMT`. What
Hugging Face has no field for stands under "segkern" in config.json, which transformers carries
along.
"""

import warnings
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...structures.labels import known_stuff
from ...weights import hf_folders as files
from .. import huggingface as folders
from ..preprocessor import read_preprocessor, write_preprocessor
from .huggingface_keys import from_huggingface, to_huggingface

KIND = "EomtImageProcessor"
KINDS = {"eomt": "dinov2", "eomt_dinov3": "dinov3"}  # the model types of config.json
_ARCHITECTURES = {
    "eomt": "EomtForUniversalSegmentation",
    "eomt_dinov3": "EomtDinov3ForUniversalSegmentation",
}
_SAME = {  # fields with one name and meaning, and Hugging Face's defaults
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 640,
    "patch_size": 16,
    "num_register_tokens": 4,
    "layerscale_value": 1.0,
    "layer_norm_eps": 1e-6,
    "drop_path_rate": 0.0,
    "num_queries": 200,
    "num_blocks": 4,
    "num_upscale_blocks": 2,
    "train_num_points": 12544,
    "oversample_ratio": 3.0,
    "importance_sample_ratio": 0.75,
    "class_weight": 2.0,
    "mask_weight": 5.0,
    "dice_weight": 5.0,
    "no_object_weight": 0.1,
}
_TURNED = {"pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": 2.0}
_FIXED = {"hidden_dropout_prob": 0.0, "attention_dropout": 0.0}
_FIXED_TURNED = {"query_bias": True, "value_bias": True, "proj_bias": True, "mlp_bias": True}
_OWN = ("stuff", "mask_annealing", "intermediate_size")


def read_folder(
    name_or_folder: str | Path, num_labels: int | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of an EoMT in Hugging Face's format.

    Args:
        name_or_folder: a folder, or a name on the hub, which is downloaded.
        num_labels: K that the caller wants; then config.json may name another number of labels
            than the weights have, and the settings say what the weights have.

    Returns:
        settings under the names of `EoMTConfig`, and weights under our names; weights that have no
        name here keep theirs.

    Raises:
        ValueError: no such folder or name, a file that is missing or broken, an option that EoMT
            has not here, or a number of labels that does not fit the weights.
    """
    settings, weights = folders.read_folder(
        name_or_folder,
        num_labels,
        read_config,
        lambda state, settings: from_huggingface(state, settings["encoder"]),
        "class_predictor.bias",
        read_pictures,
    )
    shares = weights.get("attn_mask_probs")
    if "mask_annealing" not in settings and shares is not None and (shares > 0).any():
        warnings.warn(  # of a file from elsewhere: it does not say how its masks were to fade
            f"{name_or_folder}: its masks of attention have not faded (attn_mask_probs "
            f"{shares.tolist()}), with which transformers predicts at random; without them, as "
            "here, a model that is not trained to its end predicts worse",
            stacklevel=3,
        )
    return settings, weights


def write_folder(folder: str | Path, settings: dict, weights: dict[str, Tensor]) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors
    (`weights.hf_folders.write_folder`).

    Args:
        folder: is made if it is not there; other files in it stay, other weights go.
        settings: names of `EoMTConfig`.
        weights: names of `EoMT`.

    Raises:
        OSError: the folder cannot be written to.
    """
    state = to_huggingface(weights, settings["encoder"], settings["gated"])
    files.write_folder(folder, state, write_config(settings), write_pictures(settings))


def read_config(config: dict, name: str = "config.json") -> dict:
    """Settings under the names of `EoMTConfig` from a config.json of Hugging Face.

    Args:
        config: what the file holds; a field that is missing has Hugging Face's default.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: another model, or an option that EoMT has not here.
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ValueError(
            f"from_pretrained: {name}: model_type must be {' or '.join(KINDS)}, got {kind}"
        )
    turned = KINDS[kind] == "dinov3"
    own = config.get("segkern") or {}
    settings = {field: config.get(field, default) for field, default in _SAME.items()}
    for field in ("image_size", "patch_size"):
        settings[field] = _side(settings[field], field, name)
    gated = bool(config.get("use_gated_mlp" if turned else "use_swiglu_ffn", False))
    act = "silu" if gated and turned else "gelu"
    files.check_fixed({"hidden_act": "gelu"} | config, _FIXED | {"hidden_act": act}, name)
    if turned:
        files.check_fixed(config, _FIXED_TURNED, name)
        rope = config.get("rope_parameters") or {}
        settings |= {field: config.get(field, default) for field, default in _TURNED.items()}
        settings["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 100.0))
        settings["intermediate_size"] = config.get("intermediate_size", 4096)
        settings["key_bias"] = config.get("key_bias", False)
    else:
        hidden = int(settings["hidden_size"] * config.get("mlp_ratio", 4))
        settings["intermediate_size"] = _gated_size(hidden) if gated else hidden
    labels = files.read_labels(config, name)
    settings |= {
        "encoder": KINDS[kind],
        "gated": gated,
        "num_labels": len(labels),
        "id2label": labels,
        "stuff": known_stuff(labels),
    }
    settings |= {field: own[field] for field in _OWN if field in own}
    return settings | {"stuff": tuple(settings["stuff"])}


def write_config(settings: dict) -> dict:
    """config.json of Hugging Face from settings under the names of `EoMTConfig`."""
    kind = next(kind for kind, encoder in KINDS.items() if encoder == settings["encoder"])
    turned, gated = settings["encoder"] == "dinov3", settings["gated"]
    if turned:
        form = {
            **{field: settings[field] for field in _TURNED},
            "rope_parameters": {"rope_type": "default", "rope_theta": settings["rope_theta"]},
            "intermediate_size": settings["intermediate_size"],
            "use_gated_mlp": gated,
            "key_bias": settings["key_bias"],
            **_FIXED_TURNED,
        }
    else:
        form = {"use_swiglu_ffn": gated, "mlp_ratio": _ratio(settings)}
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "num_channels": len(settings["image_mean"]),
        **{field: settings[field] for field in _SAME},
        **form,
        **_FIXED,
        "hidden_act": "silu" if turned and gated else "gelu",
        **files.write_labels(settings["id2label"], settings["num_labels"]),
        "segkern": {field: settings[field] for field in _OWN},
    }


def read_pictures(found: dict, settings: dict, name: str, old: bool) -> dict:
    """Settings under the names of `EoMTConfig` from a preprocessor_config.json and those of the
    checkpoint's config.json (`models.preprocessor.read_preprocessor`).

    Raises:
        ValueError: pictures are resized to other sides than the model takes.
    """
    S, whole = settings["image_size"], not found.get("do_split_image")
    read = read_preprocessor({"size": {"shortest_edge": S}} | found, KIND, name, old)
    fixed = read["processing"].size
    short, long = read.pop("shortest_edge"), read.pop("longest_edge")
    fits = short == S and (not whole or long in (None, S))
    if read["processing"].max_size or (fixed != (S, S) if fixed else not fits):
        raise ValueError(
            f"{name}: size of preprocessor_config.json must be image_size "
            f"({S}), got {found.get('size')}"
        )
    if read["processing"].do_pad is whole:  # as a model does it by itself
        read["processing"] = replace(read["processing"], do_pad=None)
    return read | {"windows": read.pop("do_split_image", False)}


def write_pictures(settings: dict) -> dict:
    """preprocessor_config.json of Hugging Face from settings."""
    windows, S = settings["windows"], settings["image_size"]
    sides = {"shortest_edge": S, "longest_edge": None if windows else S, "do_split_image": windows}
    return {"do_pad": not windows} | write_preprocessor(settings | sides, KIND)


def _side(value, field: str, name: str) -> int:
    """A side in pixels, which Hugging Face also writes as a pair."""
    pair = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(set(pair)) != 1:
        raise ValueError(f"from_pretrained: {name}: {field} must be square, got {value}")
    return pair[0]


def _gated_size(hidden: int) -> int:
    """Hidden channels of DINOv2's gated networks: two thirds, rounded up to a multiple of 8."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def _ratio(settings: dict) -> int | float:
    """mlp_ratio, which transformers wants whole; where none is, it cannot open the folder."""
    D, wanted = settings["hidden_size"], settings["intermediate_size"]
    for ratio in range(1, 17):
        if (_gated_size(D * ratio) if settings["gated"] else D * ratio) == wanted:
            return ratio
    return wanted / D
