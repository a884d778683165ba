"""Checkpoints of OneFormer's original code: one .pth file, or a .pkl file of NumPy arrays.

Plain functions on dicts, as mask2former/original.py, whose names of backbone, pixel decoder and
query decoder are the same. The file holds weights alone: sizes are read off their shapes, and how
pictures are resized off the numbers of classes and queries, which tell the data set in the
published ones.
Source: the names of the weights are those of the published checkpoints (SHI-Labs/OneFormer).
"""

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ...structures.labels import CLASS_NAMES, DATASETS
from ...weights import unpickling
from ..mask2former import original as shared
from .huggingface_keys import LOGIT_SCALE, TEXT_ENCODER

SUFFIXES = (".pth", ".pkl")  # of the file

_PREDICTOR = r"sem_seg_head\.predictor"
_START = rf"{_PREDICTOR}\.class_transformer\.decoder"
_TEXT = r"text_encoder\.transformer\.resblocks\.(\d+)"
_NAMES = [  # the first that fits
    (re.compile(rf"^{pattern}"), replacement)
    for pattern, replacement in (
        (rf"{_START}\.layers\.(\d+)\.multihead_attn\.", r"task_queries.layers.\1.cross_attn."),
        (rf"{_START}\.layers\.(\d+)\.norm1\.", r"task_queries.layers.\1.self_norm."),
        (rf"{_START}\.layers\.(\d+)\.norm2\.", r"task_queries.layers.\1.cross_norm."),
        (rf"{_START}\.layers\.(\d+)\.norm3\.", r"task_queries.layers.\1.norm."),
        (rf"{_START}\.", "task_queries."),
        (rf"{_PREDICTOR}\.class_input_proj\.", "task_queries.input_proj."),
        (r"task_mlp\.layers\.", "task_queries.task_mlp."),
        (r"text_encoder\.token_embedding\.", "text_encoder.token_embed."),
        (r"text_encoder\.positional_embedding", "text_encoder.position_embed"),
        (r"text_encoder\.ln_final\.", "text_encoder.norm."),
        (rf"{_TEXT}\.attn\.in_proj_", r"text_encoder.layers.\1.qkv."),
        (rf"{_TEXT}\.attn\.out_proj\.", r"text_encoder.layers.\1.proj."),
        (rf"{_TEXT}\.ln_(\d)\.", r"text_encoder.layers.\1.norm\2."),
        (rf"{_TEXT}\.mlp\.c_fc\.", r"text_encoder.layers.\1.fc1."),
        (rf"{_TEXT}\.mlp\.c_proj\.", r"text_encoder.layers.\1.fc2."),
        (r"text_projector\.layers\.", "text_encoder.projector."),
        (r"prompt_ctx\.", "text_encoder.learned."),
        (r"criterion\.logit_scale", LOGIT_SCALE),
    )
]
_TELLS = "task_mlp.layers.0.weight"  # which no other model has
# by its kernel, in the publishers' configurations of DiNAT-L; those of ADE20K at 896 and 1280
# pixels have others, which weights do not show
_DILATIONS = {
    11: [[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 5], [1, 2, 1, 2, 1]],
    7: [[1, 18, 1], [1, 5, 1, 9], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]],
}
_LEVELS = 3  # of the pixel decoder: the code reads no other number


def read_file(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a file.

    Args:
        path: of the file.

    Returns:
        settings under the names of `OneFormerConfig`, and weights under our names; weights that
        have no name here keep theirs.

    Raises:
        ValueError: no such checkpoint, or a backbone that is not here.
    """
    if Path(path).suffix == ".pkl":
        content = unpickling.load_arrays(path)
    else:
        try:
            content = unpickling.load(path)
        except ValueError as error:
            raise ValueError(f"from_pretrained: {path}: {error}") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or _TELLS not in state:
        raise ValueError(f"from_pretrained: {path} is no checkpoint of OneFormer's original code")
    try:
        weights = from_original({name: torch.as_tensor(value) for name, value in state.items()})
        settings = read_sizes(weights, str(path))
    except (KeyError, TypeError, RuntimeError) as error:  # not whole, or no numbers
        raise ValueError(
            f"from_pretrained: {path} is no checkpoint of OneFormer's original code ({error})"
        ) from error
    for name in [name for name in weights if name.endswith(".running_var")]:  # frozen there
        count = name.replace("running_var", "num_batches_tracked")
        weights.setdefault(count, torch.zeros((), dtype=torch.int64))
    return settings, weights


def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and products for the weights of the original code."""
    rest, own = {}, {}
    for name, value in state.items():
        for pattern, replacement in _NAMES:
            new, count = pattern.subn(replacement, name)
            if count:
                break
        else:
            rest[name] = value
            continue
        if found := re.fullmatch(r"(task_queries\..*_attn\.)in_proj_(weight|bias)", new):
            for part, piece in zip("qkv", value.chunk(3)):
                own[f"{found[1]}{part}_proj.{found[2]}"] = piece
        else:
            own[new] = value.reshape(1) if new == LOGIT_SCALE else value
    return shared.from_original(rest) | own


def read_sizes(weights: dict[str, Tensor], name: str) -> dict:
    """Settings under the names of `OneFormerConfig` that weights under our names show; a warning
    says what the number of classes alone tells.

    Args:
        weights: of `from_original`.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: a backbone that is not here.
    """

    def rows(path: str) -> int:
        return weights[f"{path}.weight"].shape[0]

    def count(pattern: str) -> int:
        return len({found[0] for key in weights if (found := re.match(pattern, key))})

    labels = rows("query_decoder.class_embed") - 1
    queries, width = weights["query_decoder.query_embed.weight"].shape
    points = rows("pixel_decoder.layers.0.attn.sampling_offsets")
    weighed = rows("pixel_decoder.layers.0.attn.attention_weights")
    if points != 2 * weighed:
        raise KeyError("sampling_offsets")
    settings = {
        "num_labels": labels,
        "num_queries": queries,
        "hidden_dim": width,
        "feature_size": width,
        "mask_feature_size": rows("pixel_decoder.mask_features"),
        "encoder_layers": count(r"pixel_decoder\.layers\.\d+\."),
        "decoder_layers": count(r"query_decoder\.layers\.\d+\."),
        "query_dec_layers": count(r"task_queries\.layers\.\d+\."),
        "encoder_feedforward_dim": rows("pixel_decoder.layers.0.linear1"),
        "dim_feedforward": rows("query_decoder.layers.0.linear1"),
        "num_attention_heads": weighed // (_LEVELS * 4),
        "task_seq_len": weights["task_queries.task_mlp.0.weight"].shape[1],
        "is_training": any(key.startswith(TEXT_ENCODER) for key in weights),
        **_dataset(labels, queries, name),
        **shared.read_backbone(weights, count, name, _DILATIONS),
    }
    told = "dilations" in settings["backbone_options"]
    if shared.family_of(weights) == "dinat" and (labels == 150 or not told):
        warnings.warn(
            f"{name}: its dilations (backbone_options) are in no weights: they are taken to be "
            + ("those for ADE20K at 640 pixels" if told else "a classifier's"),
            stacklevel=2,
        )
    if settings["is_training"]:
        vocabulary, text_width = weights["text_encoder.token_embed.weight"].shape
        learned = weights.get("text_encoder.learned.weight", ())
        settings |= {
            "text_encoder_width": text_width,
            "text_encoder_context_length": len(weights["text_encoder.position_embed"]),
            "text_encoder_num_layers": count(r"text_encoder\.layers\.\d+\."),
            "text_encoder_vocab_size": vocabulary,
            "text_encoder_proj_layers": count(r"text_encoder\.projector\.\d+\."),
            "text_encoder_n_ctx": len(learned),
        }
    return settings


def _dataset(labels: int, queries: int, name: str) -> dict:
    """What the published checkpoints with so many classes are trained on."""
    for dataset, names in CLASS_NAMES.items():
        facts = DATASETS[dataset]
        if facts.labels["panoptic"] == labels:
            shortest, longest = facts.edges
            if dataset == "ade20k" and queries > 150:  # of the large backbones
                shortest, longest = 640, 2560
            return {
                "id2label": dict(enumerate(names)),
                "stuff": facts.stuff,
                "shortest_edge": shortest,
                "longest_edge": longest,
            }
    warnings.warn(
        f"{name}: has {labels} classes, of which segkern knows no names: pictures are resized as "
        "COCO's (shortest_edge, longest_edge), and no class is stuff",
        stacklevel=2,
    )
    return {}
