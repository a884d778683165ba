"""SegFormer's folders in Hugging Face's format: config.json, preprocessor_config.json, weights.

Plain functions on dicts: settings have the names of `SegFormerConfig`, weights those of
`SegFormer`. What Hugging Face has no field for stands under "segkern" in config.json, which
transformers carries along. Written are the names that transformers 5 writes, which are those of
the hub; read are also the names that it has in memory. Keys and values are one product here.
"""

import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...structures.labels import IMAGENET_MEAN
from ...structures.processing import Processing
from ...weights import hf_folders
from ...weights.folders import find_folder, read_json
from ...weights.hf_folders import check_fixed, read_labels, read_weights, write_labels
from ...weights.state_dicts import name_rules, renamed
from ..preprocessor import find_preprocessor, is_old, read_preprocessor, write_preprocessor

KIND = "SegformerImageProcessor"
EDGES = ("shortest_edge", "longest_edge")
_SAME = {  # fields with one name and meaning, and Hugging Face's defaults
    "hidden_sizes": (32, 64, 160, 256),
    "depths": (2, 2, 2, 2),
    "num_attention_heads": (1, 2, 5, 8),
    "sr_ratios": (8, 4, 2, 1),
    "mlp_ratios": (4, 4, 4, 4),
    "patch_sizes": (7, 3, 3, 3),
    "strides": (4, 2, 2, 2),
    "decoder_hidden_size": 256,
    "drop_path_rate": 0.1,
    "classifier_dropout_prob": 0.1,
}
_FIXED = {"num_encoder_blocks": 4, "hidden_act": "gelu"}  # the architecture's, here
_TRAINING = {  # what training does not leave open here; inference does not read it
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "semantic_loss_ignore_index": 255,
}
# settings that Hugging Face has no place for; layer_norm_eps has one there that nothing reads
_OWN = (
    *("layer_norm_eps", "backbone", "image_size", "window_size", "window_stride"),
    *EDGES,
)
_STAGE, _DISK, _MEMORY = "backbone.stages.#", "segformer.encoder", "segformer.stages.#"
_NAMES = (  # ours; on disk; in the memory of transformers 5
    ("head.linears.#", "decode_head.linear_c.#.proj", "decode_head.linear_projections.#.proj"),
    ("head.fuse", "decode_head.linear_fuse", "decode_head.linear_fuse"),
    ("head.norm", "decode_head.batch_norm", "decode_head.batch_norm"),
    ("head.classifier", "decode_head.classifier", "decode_head.classifier"),
    (f"{_STAGE}.norm", f"{_DISK}.layer_norm.#", f"{_MEMORY}.layer_norm"),
    *(
        (
            f"{_STAGE}.patch_embed.{ours}",
            f"{_DISK}.patch_embeddings.#.{theirs}",
            f"{_MEMORY}.patch_embeddings.{theirs}",
        )
        for ours, theirs in (("proj", "proj"), ("norm", "layer_norm"))
    ),
    *(
        (f"{_STAGE}.blocks.#.{ours}", f"{_DISK}.block.#.#.{disk}", f"{_MEMORY}.blocks.#.{memory}")
        for ours, disk, memory in (
            ("norm1", "layer_norm_1", "layernorm_before"),
            ("attn.q", "attention.self.query", "attention.q_proj"),
            ("attn.key", "attention.self.key", "attention.k_proj"),
            ("attn.value", "attention.self.value", "attention.v_proj"),
            (
                "attn.sr",
                "attention.self.sr",
                "attention.sequence_reduction.sequence_reduction",
            ),
            (
                "attn.norm",
                "attention.self.layer_norm",
                "attention.sequence_reduction.layer_norm",
            ),
            ("attn.proj", "attention.output.dense", "attention.o_proj"),
            ("norm2", "layer_norm_2", "layernorm_after"),
            ("mlp.fc1", "mlp.dense1", "mlp.fc1"),
            ("mlp.dwconv", "mlp.dwconv.dwconv", "mlp.dwconv.dwconv"),
            ("mlp.fc2", "mlp.dense2", "mlp.fc2"),
        )
    ),
)
_OURS = name_rules((theirs, ours) for ours, *spellings in _NAMES for theirs in spellings)
_THEIRS = name_rules((ours, disk) for ours, disk, _ in _NAMES)
_FILTERS = ("decode_head.linear_fuse.weight", "decode_head.classifier.weight")  # 1 x 1 there


def read_folder(name_or_folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a SegFormer, or of an image classifier with its encoder.

    Args:
        name_or_folder: a folder, or a name on the hub, which is downloaded.

    Returns:
        settings under the names of `SegFormerConfig`, and weights under our names, those of an
        image classifier without its classifier; weights that have no name here keep theirs.

    Raises:
        ValueError: no such folder or name, a file that is missing or broken, or an option that
            SegFormer has not here.
    """
    folder = find_folder(name_or_folder)
    config = read_json(folder / "config.json")
    settings = read_config(config, str(name_or_folder))
    if found := find_preprocessor(folder):
        given = f"from_pretrained: {name_or_folder}", is_old(config)
        settings |= read_pictures(found, settings, *given)
    channels = config.get("num_channels", 3)
    if channels != len(settings.get("image_mean", IMAGENET_MEAN)):
        raise ValueError(
            f"from_pretrained: {name_or_folder}: image_mean of preprocessor_config.json must have "
            f"num_channels ({channels}) numbers, got {settings.get('image_mean')}"
        )
    return settings, from_huggingface(read_weights(folder))


def write_folder(folder: str | Path, settings: dict, weights: dict[str, Tensor]) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors, each whole.

    Args:
        folder: is made if it is not there; other files in it stay, other weights go.
        settings: names of `SegFormerConfig`.
        weights: names of `SegFormer`.

    Raises:
        OSError: the folder cannot be written to.
    """
    config, preprocessor = write_config(settings), write_pictures(settings)
    hf_folders.write_folder(folder, to_huggingface(weights), config, preprocessor)


def read_config(config: dict, name: str = "config.json") -> dict:
    """Settings under the names of `SegFormerConfig` from a config.json of Hugging Face.

    Args:
        config: what the file holds; a field that is missing has Hugging Face's default.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: another model, or an option that SegFormer has not here; where only training
            would notice, a warning says so.
    """
    if config.get("model_type") != "segformer":
        raise ValueError(
            f"from_pretrained: {name}: model_type must be segformer, "
            f"got {config.get('model_type')}"
        )
    check_fixed(config, _FIXED, name)
    for field, value in _TRAINING.items():
        if config.get(field, value) != value:
            warnings.warn(
                f"from_pretrained: {name}: {field} is {config[field]}; training here has {value}",
                stacklevel=4,
            )
    own, labels = config.get("segkern") or {}, read_labels(config, name)
    settings = {field: config.get(field, default) for field, default in _SAME.items()}
    settings |= {field: own[field] for field in _OWN if field in own}
    return settings | {"num_labels": len(labels), "id2label": labels}


def write_config(settings: dict) -> dict:
    """config.json of Hugging Face from settings under the names of `SegFormerConfig`."""
    return {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        "num_channels": len(settings["image_mean"]),
        **{field: settings[field] for field in _SAME},
        **_FIXED,
        **_TRAINING,
        "layer_norm_eps": settings["layer_norm_eps"],
        "reshape_last_stage": True,
        **write_labels(settings.get("id2label"), settings["num_labels"]),
        "segkern": {field: settings[field] for field in _OWN},
    }


def read_pictures(found: dict, settings: dict, name: str, old: bool) -> dict:
    """Settings under the names of `SegFormerConfig` from a preprocessor_config.json
    (`models.preprocessor.read_preprocessor`).

    Args:
        found: its fields.
        settings: those of config.json.
        name: begins the messages of errors.
        old: as `models.preprocessor.is_old` says of the checkpoint.

    A checkpoint that was written here has sizes in config.json, too, which hold unless the file
    was changed since.
    """
    shortest, image_size = settings.get("shortest_edge"), settings.get("image_size", (512, 512))
    square = dict.fromkeys(("height", "width"), shortest or min(image_size))
    # such a square once stood in files of ours, whatever the size
    old = old and found.get("size") == square
    read = read_preprocessor(found, KIND, name, old)
    more, edges = read["processing"], {edge: read[edge] for edge in EDGES}
    read["processing"] = replace(more, do_reduce_labels=False)  # a setting of the config
    read["do_reduce_labels"] = more.do_reduce_labels
    if old:
        read["processing"] = replace(read["processing"], size=None)
    own = "image_size" in settings
    if old or (own and edges == _edges(settings | {"processing": more})):
        return {k: v for k, v in read.items() if k not in EDGES}
    side = min((side for side in edges.values() if side is not None), default=None)
    size = more.size or more.max_size or (side, side)
    return {"image_size": settings.get("image_size", size)} | read


def write_pictures(settings: dict) -> dict:
    """preprocessor_config.json of Hugging Face from settings."""
    written = write_preprocessor(settings | _edges(settings), KIND)
    return written | {"do_reduce_labels": settings["do_reduce_labels"]}


def _edges(settings: dict) -> dict[str, int | None]:
    """The edges that settings mean, where a size is one of edges."""
    more, (short, long) = Processing.of(settings["processing"]), map(settings.get, EDGES)
    if more.size is None and more.max_size is None and more.multiple is None:
        short = short or min(settings["image_size"])
        long = long or 4 * short
    return dict(zip(EDGES, (short, long)))


def from_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and products.

    Args:
        state: under the names of the hub, or of transformers 4 or 5, on disk or in memory. The
            classifier of an image classifier is left out.

    Returns:
        The weights under our names; those that have none keep theirs.
    """
    out = {}
    for name, value in state.items():
        if name not in ("classifier.weight", "classifier.bias"):
            value = value.flatten(1) if name in _FILTERS else value
            out[renamed(name, _OURS) or name] = value
    for name in list(out):
        if match := re.fullmatch(r"(.*\.attn\.)key(\.weight|\.bias)", name):
            parts = [f"{match[1]}{part}{match[2]}" for part in ("key", "value")]
            if all(part in out for part in parts):
                out[f"{match[1]}kv{match[2]}"] = torch.cat([out.pop(part) for part in parts])
    return out


def to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names and products that transformers finds on disk, from our weights."""
    out = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(.*\.attn\.)kv(\.weight|\.bias)", name):
            for part, piece in zip(("key", "value"), value.chunk(2)):
                out[renamed(f"{match[1]}{part}{match[2]}", _THEIRS)] = piece
        else:
            name = renamed(name, _THEIRS)
            out[name] = value[..., None, None] if name in _FILTERS else value
    return out
