"""Folders in Hugging Face's format: config.json, preprocessor_config.json and the weights.

Plain functions on dicts: settings have the names of `OneFormerConfig`, weights those of
`OneFormer`. What Hugging Face has no field for stands under "segkern" in config.json, which
transformers carries along: the tokens of the sentences, so that a model trains again without a
tokenizer. transformers opens what is written here if the backbone is a Swin, a DiNAT, a plain
ResNet or another timm model; "resnet_digits" only opens here.
"""

from pathlib import Path

from torch import Tensor

from ...weights import hf_folders as files
from .. import huggingface as folders
from ..preprocessor import read_preprocessor, write_preprocessor
from .huggingface_keys import TEXT_ENCODER, from_huggingface, to_huggingface

KIND, PROCESSOR = "oneformer", "OneFormerImageProcessor"
_SAME = {  # fields with one name and meaning, and Hugging Face's defaults
    "num_queries": 150,
    "hidden_dim": 256,
    "encoder_layers": 6,
    "query_dec_layers": 2,
    "num_attention_heads": 8,
    "encoder_feedforward_dim": 1024,
    "dim_feedforward": 2048,
    "dropout": 0.1,
    "task_seq_len": 77,
    "is_training": False,
    "text_encoder_width": 256,
    "text_encoder_context_length": 77,
    "text_encoder_num_layers": 6,
    "text_encoder_vocab_size": 49408,
    "text_encoder_proj_layers": 2,
    "text_encoder_n_ctx": 16,
    "train_num_points": 12544,
    "oversample_ratio": 3.0,
    "importance_sample_ratio": 0.75,
    "class_weight": 2.0,
    "mask_weight": 5.0,
    "dice_weight": 5.0,
    "contrastive_weight": 0.5,
    "contrastive_temperature": 0.07,
    "no_object_weight": 0.1,
}
_OTHER = {"conv_dim": "feature_size", "mask_dim": "mask_feature_size"}  # 256 each
_TOKENS = {"tokens": "clip", "prompts": ()}  # ours alone
_FIXED = {  # what the architecture does not leave open here
    "norm": "GN",
    "use_task_norm": True,
    "pre_norm": False,
    "enforce_input_proj": False,
    "common_stride": 4,
    "layer_norm_eps": 1e-5,
    "use_auxiliary_loss": True,
}


def read_folder(
    name_or_folder: str | Path, num_labels: int | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a OneFormer in Hugging Face's format, as
    `models.huggingface.read_folder` describes them. A text encoder is there where its weights are,
    whatever config.json says of training."""
    settings, weights = folders.read_folder(
        name_or_folder,
        num_labels,
        read_config,
        lambda state, settings: from_huggingface(state, folders.family(settings)),
        "query_decoder.class_embed.bias",
        lambda found, _, *given: read_preprocessor(found, PROCESSOR, *given),
    )
    settings["is_training"] = any(name.startswith(TEXT_ENCODER) for name in weights)
    return settings, weights


def write_folder(folder: str | Path, settings: dict, weights: dict[str, Tensor]) -> None:
    """Writes config.json, preprocessor_config.json and model.safetensors, each whole at any time.

    Args:
        folder: is made if it is not there; other files in it stay, other weights go.
        settings: names of `OneFormerConfig`.
        weights: names of `OneFormer`.

    Raises:
        OSError: the folder cannot be written to.
    """
    preprocessor = write_preprocessor(settings, PROCESSOR)
    preprocessor["num_text"] = settings["num_queries"] - settings["text_encoder_n_ctx"]
    state = to_huggingface(weights, folders.family(settings))
    files.write_folder(folder, state, write_config(settings), preprocessor)


def read_config(config: dict, name: str = "config.json") -> dict:
    """Settings under the names of `OneFormerConfig` from a config.json of Hugging Face.

    Args:
        config: what the file holds; a field that is missing has Hugging Face's default.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: another model, or an option that OneFormer has not here.
    """
    settings, own = folders.read_decoders(config, KIND, _SAME, _FIXED, name), config.get("segkern")
    settings |= {ours: config.get(theirs, 256) for theirs, ours in _OTHER.items()}
    settings |= {field: (own or {}).get(field, default) for field, default in _TOKENS.items()}
    return settings


def write_config(settings: dict) -> dict:
    """config.json of Hugging Face from settings under the names of `OneFormerConfig`."""
    config = folders.write_decoders(settings, KIND, _SAME, _FIXED)
    config |= {theirs: settings[ours] for theirs, ours in _OTHER.items()}
    prompts = [list(row) for row in settings["prompts"]]
    config["segkern"] |= {"tokens": settings["tokens"], "prompts": prompts}
    return {"architectures": ["OneFormerForUniversalSegmentation"], **config}
