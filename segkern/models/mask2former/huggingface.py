"""Folders in Hugging Face's format: config.json, preprocessor_config.json and the weights.

Plain functions on dicts: settings have the names of `Mask2FormerConfig`, weights those of
`Mask2Former`. What Hugging Face has no field for stands under "segkern" in config.json, which
transformers carries along. transformers opens what is written here if the backbone is a Swin, a
plain ResNet or another timm model; "resnet_digits" only opens here.
"""

from pathlib import Path

from torch import Tensor

from ...weights import hf_folders as files
from .. import huggingface as folders
from ..preprocessor import write_preprocessor
from .huggingface_keys import from_huggingface, to_huggingface

KIND = "mask2former"
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


def read_folder(
    name_or_folder: str | Path, num_labels: int | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a Mask2Former in Hugging Face's format.

    Args:
        name_or_folder: a folder, or a name on the hub, which is downloaded.
        num_labels: K that the caller wants; then config.json may name another number of labels
            than the weights have, and the settings say what the weights have.

    Returns:
        settings under the names of `Mask2FormerConfig`, and weights under our names; weights that
        have no name here keep theirs.

    Raises:
        ValueError: no such folder or name, a file that is missing or broken, an option that
            Mask2Former has not here, or a number of labels that does not fit the weights.
    """
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
        settings: names of `Mask2FormerConfig`.
        weights: names of `Mask2Former`.

    Raises:
        OSError: the folder cannot be written to.
    """
    preprocessor = write_preprocessor(settings, "Mask2FormerImageProcessor")
    state = to_huggingface(weights, folders.family(settings))
    files.write_folder(folder, state, write_config(settings), preprocessor)


def read_config(config: dict, name: str = "config.json") -> dict:
    """Settings under the names of `Mask2FormerConfig` from a config.json of Hugging Face.

    Args:
        config: what the file holds; a field that is missing has Hugging Face's default.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: another model, or an option that Mask2Former has not here.
    """
    return folders.read_decoders(config, KIND, _SAME, _FIXED, name)


def write_config(settings: dict) -> dict:
    """config.json of Hugging Face from settings under the names of `Mask2FormerConfig`."""
    config = folders.write_decoders(settings, KIND, _SAME, _FIXED)
    return {"architectures": ["Mask2FormerForUniversalSegmentation"], **config}
