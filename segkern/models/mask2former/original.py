"""Checkpoints of Mask2Former's original code, as detectron2 writes them: one .pkl or .pth file.

Plain functions on dicts, as huggingface.py. The file holds weights: sizes are read off their
shapes; what no shape tells, off config.yaml beside it where there is one, or else off the number
of classes, which tells the data set in the published ones. A file that was written here holds our
settings, too, under "segkern", which detectron2 passes over.
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from ...io.atomic_files import atomic
from ...nn.backbones import dinat
from ...nn.backbones.swin import VARIANTS
from ...structures.labels import DATASETS
from ...structures.processing import Processing
from ...weights import unpickling
from ...weights.pickling import dump_arrays
from ...weights.state_dicts import on_disk, unwrapped
from ...weights.yaml_files import yaml_text
from . import detectron2_config
from .original_keys import from_original, to_original

SUFFIXES = (".pkl", ".pth")  # of the file
CONFIG = "config.yaml"  # beside it

_MARK = "sem_seg_head.predictor.class_embed.weight"
_STATISTICS = {"pixel_mean": "image_mean", "pixel_std": "image_std"}  # of 0 to 255, in old files
_RESNETS = {6: "resnet50", 23: "resnet101", 36: "resnet152"}  # by the blocks of the third stage
# by its kernel, in the publishers' configurations of DiNAT-L: weights do not show them
_DILATIONS = {11: [[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3] * 4 + [1, 3], [1] * 5]}
_LEVELS, _POINTS = 3, 4  # of the pixel decoder: the code reads no other number
_FEEDFORWARD = 1024  # likewise
_AUTHOR = "segkern"  # without one detectron2 takes a .pkl for one of Caffe2


def is_file(path: str | Path) -> bool:
    """Whether a path names such a file, also one that is not there."""
    path = Path(path)
    return path.suffix in SUFFIXES and not path.is_dir()


def read_file(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a .pkl or .pth file.

    Args:
        path: of the file.

    Returns:
        settings under the names of `Mask2FormerConfig`, and weights under our names; weights that
        have no name here keep theirs.

    Raises:
        ValueError: no such checkpoint, one that holds code, or a backbone that is neither Swin,
            DiNAT nor ResNet.
    """
    path = Path(path).expanduser()
    state, own = read_state(path)
    other = f"from_pretrained: {path} is no checkpoint of Mask2Former's original code"
    if _MARK not in state:
        raise ValueError(other)
    settings = {}
    for name, ours in _STATISTICS.items():
        if name in state:
            settings[ours] = tuple(round(v, 9) for v in (state.pop(name).flatten() / 255).tolist())
    try:
        weights = from_original(state)
        shown = read_sizes(weights, str(path))
    except (KeyError, TypeError, RuntimeError) as error:  # of MaskFormer or MaskDINO
        raise ValueError(f"{other} ({error})") from error
    settings |= shown | own
    if (path.parent / CONFIG).is_file():
        settings |= detectron2_config.read(path.parent / CONFIG, shown, family_of(weights))
    if family_of(weights) == "dinat" and "dilations" not in settings["backbone_options"]:
        warnings.warn(
            f"{path}: a DiNAT of other sizes than the published, whose dilations are in no"
            f" {CONFIG}: it gets those of classifiers (backbone_options)",
            stacklevel=3,
        )
    if not own:
        edges = [name for name in ("shortest_edge", "longest_edge") if name in settings]
        settings = dataset_of(settings["num_labels"], str(path), bool(edges)) | settings
    for name in [name for name in weights if name.endswith(".running_var")]:  # frozen there
        count = name.replace("running_var", "num_batches_tracked")
        weights.setdefault(count, torch.zeros((), dtype=torch.int64))
    return settings, weights


def read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Weights under the names in the file, and the settings that were written here, if they were.

    Raises:
        ValueError: it cannot be read, or holds code.
    """
    try:
        content = unpickling.load_arrays(path) if path.suffix == ".pkl" else unpickling.load(path)
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path}: {error}") from error
    content = content if isinstance(content, dict) else {}
    state, _ = unpickling.weights_of(content)
    own = content.get("segkern")
    return unwrapped(state), own if isinstance(own, dict) and _known(own) else {}


def _known(own: dict) -> bool:
    """Whether settings name no other backbone than this format has: of a foreign file they might
    name one that is downloaded."""
    options = own.get("backbone_options")
    return (
        own.get("backbone") in (*VARIANTS, *_RESNETS.values())
        and isinstance(options, dict)
        and not options.keys() - {"freeze_norm", *VARIANTS["swin_tiny"]}
    )


def write_file(path: str | Path, settings: dict, weights: dict[str, Tensor]) -> None:
    """Writes the weights, and config.yaml beside them, each whole or not at all.

    Args:
        path: of the file; a .pkl holds NumPy's arrays, a .pth torch's tensors. Its folder is made
            if it is not there.
        settings: names of `Mask2FormerConfig`.
        weights: names of `Mask2Former`.

    Raises:
        ValueError: another suffix, or settings that the original code has not.
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"save_original: path must end in {' or '.join(SUFFIXES)}, got {path}")
    backbone, options = settings["backbone"], settings["backbone_options"]
    swin = VARIANTS[backbone] | options if backbone in VARIANTS else None
    plain = backbone in _RESNETS.values() and not options.keys() - {"freeze_norm"}
    points, channels = settings["num_points_encoder"], len(settings["image_mean"])
    rules = (
        ("backbone", "a Swin or a plain ResNet-50, -101 or -152", swin or plain, backbone),
        ("num_points_encoder", f"{_POINTS}", points == _POINTS, points),
        ("image_mean", "of 3 channels", channels == 3, f"{channels}"),
    )
    for name, rule, kept, found in rules:
        if not kept:
            raise ValueError(f"save_original: {name} must be {rule}, got {found}")
    if settings["encoder_feedforward_dim"] != _FEEDFORWARD:
        warnings.warn(
            f"{path}: the original code itself opens models with encoder_feedforward_dim "
            f"{_FEEDFORWARD} alone, this one has {settings['encoder_feedforward_dim']}",
            stacklevel=3,
        )
    if settings["processing"] != asdict(Processing()):
        warnings.warn(
            f"{path}: the original code itself resizes pictures between two edges, not as "
            f"{settings['processing']}",
            stacklevel=3,
        )
    state = OrderedDict(on_disk(to_original(weights, bool(options.get("freeze_norm")))))
    # without versions the original takes names for those of its first version
    versions = {"": 1, "sem_seg_head": 2, "sem_seg_head.predictor": 2}
    state._metadata = OrderedDict((name, {"version": v}) for name, v in versions.items())
    content = {"model": state, "__author__": _AUTHOR, "segkern": settings}
    with atomic(path) as temporary:
        if path.suffix == ".pkl":
            for name, value in state.items():  # of which NumPy has no bfloat16
                exact = value.float() if value.dtype == torch.bfloat16 else value
                state[name] = exact.numpy()
            dump_arrays(temporary, content)
        else:
            torch.save(content, temporary)
    with atomic(path.parent / CONFIG) as temporary:
        text = yaml_text(detectron2_config.write(settings, swin), sort_keys=False)
        temporary.write_text(text, encoding="utf-8")


def read_sizes(weights: dict[str, Tensor], name: str) -> dict:
    """Settings under the names of `Mask2FormerConfig` that weights under our names show.

    Args:
        weights: of `from_original`.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: a backbone that is neither Swin, DiNAT nor ResNet.
    """

    def rows(path: str) -> int:
        return weights[f"{path}.weight"].shape[0]

    def count(pattern: str) -> int:
        return len({found[0] for key in weights if (found := re.match(pattern, key))})

    queries, width = weights["query_decoder.query_feat.weight"].shape
    heads = rows("pixel_decoder.layers.0.attn.attention_weights") // (_LEVELS * _POINTS)
    return {
        "num_labels": rows("query_decoder.class_embed") - 1,
        "num_queries": queries,
        "hidden_dim": width,
        "feature_size": width,
        "mask_feature_size": rows("pixel_decoder.mask_features"),
        "encoder_layers": count(r"pixel_decoder\.layers\.\d+\."),
        "decoder_layers": count(r"query_decoder\.layers\.\d+\."),
        "encoder_feedforward_dim": rows("pixel_decoder.layers.0.linear1"),
        "dim_feedforward": rows("query_decoder.layers.0.linear1"),
        "num_attention_heads": heads,
        **read_backbone(weights, count, name, _DILATIONS),
    }


def dataset_of(labels: int, name: str, sized: bool = False) -> dict:
    """What the published checkpoints with so many classes are trained on; a warning where none is.

    Args:
        labels: K.
        name: of the checkpoint, for messages.
        sized: how pictures are resized is known otherwise.
    """
    known = [
        (facts, task)
        for facts in DATASETS.values()
        for task, number in facts.labels.items()
        if number == labels and facts.edges is not None
    ]
    if not known:
        resized = "" if sized else "pictures are resized as COCO's (shortest_edge, longest_edge), "
        warnings.warn(
            f"{name}: has {labels} classes, which no published checkpoint has: {resized}"
            f"{'and ' * (not sized)}no class is stuff",
            stacklevel=4,
        )
        return {}
    facts, task = known[0]
    stuff = facts.stuff if task == "panoptic" else ()
    return {"shortest_edge": facts.edges[0], "longest_edge": facts.edges[1], "stuff": stuff}


def family_of(weights: dict[str, Tensor]) -> str:
    """Of the backbone of weights under our names: "swin", "dinat" or "resnet"."""
    if "backbone.layers.0.blocks.0.attn.rpb" in weights:
        return "dinat"
    return "swin" if "backbone.patch_embed.proj.weight" in weights else "resnet"


def read_backbone(
    weights: dict[str, Tensor],
    count: Callable[[str], int],
    name: str,
    dilations: dict[int, list[list[int]]],
) -> dict:
    """backbone, backbone_options and drop_path_rate that weights under our names show.

    Args:
        weights: of `from_original`.
        count: of the different beginnings of names that a pattern finds.
        name: of the checkpoint, for messages.
        dilations: of published DiNATs, by the kernel; others are left open.

    Raises:
        ValueError: neither Swin, DiNAT nor ResNet.
    """
    if family_of(weights) == "dinat":
        return dinat.settings(_dinat(weights, count, dilations)) | {"drop_path_rate": 0.3}
    if family_of(weights) == "swin":
        tables = [
            weights[f"backbone.layers.{i}.blocks.0.attn.relative_position_bias_table"].shape
            for i in range(4)
        ]
        sizes = {
            "embed_dim": weights["backbone.patch_embed.proj.weight"].shape[0],
            "depths": tuple(count(rf"backbone\.layers\.{i}\.blocks\.\d+\.") for i in range(4)),
            "num_heads": tuple(heads for _, heads in tables),
            "window_size": (isqrt(tables[0][0]) + 1) // 2,
        }
        names = [variant for variant, known in VARIANTS.items() if known == sizes]
        return {
            "backbone": names[0] if names else "swin_tiny",
            "backbone_options": {} if names else sizes,
            "drop_path_rate": 0.3,  # that of all published ones; the file does not hold it
        }
    blocks = count(r"backbone\.body\.layer3\.\d+\.")
    if blocks not in _RESNETS:
        raise ValueError(
            f"from_pretrained: {name}: the backbone must be a Swin, DiNAT, ResNet-50, -101 or -152"
        )
    frozen = "backbone.body.bn1.num_batches_tracked" not in weights
    return {
        "backbone": _RESNETS[blocks],
        "backbone_options": {"freeze_norm": True} if frozen else {},
    }


def _dinat(
    weights: dict[str, Tensor], count: Callable[[str], int], dilations: dict[int, list[list[int]]]
) -> dict:
    """Arguments of a `Dinat`."""
    blocks = [f"backbone.layers.{i}.blocks" for i in range(4)]
    tables = [weights[f"{block}.0.attn.rpb"].shape for block in blocks]
    depths = [count(rf"{re.escape(block)}\.\d+\.") for block in blocks]
    hidden, width = weights[f"{blocks[0]}.0.mlp.fc1.weight"].shape
    kernel = (tables[0][1] + 1) // 2
    known = dilations.get(kernel, [])
    fits = [len(stage) for stage in known] == depths
    return {
        "embed_dim": width,
        "depths": depths,
        "num_heads": [table[0] for table in tables],
        "kernel_size": kernel,
        "mlp_ratio": hidden / width,
        "layer_scale": 1e-5 if f"{blocks[0]}.0.gamma1" in weights else 0.0,
        **({"dilations": known} if fits else {}),
    }
