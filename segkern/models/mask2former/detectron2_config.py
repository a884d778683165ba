"""config.yaml of detectron2, as Mask2Former's original code writes it beside its weights.

Settings have the names of `Mask2FormerConfig`. What the weights show is not read from here: a file
that says otherwise is of other weights.
Source: the names of the fields are those of the published configurations (facebookresearch/
Mask2Former on detectron2).
"""

import warnings
from ast import literal_eval
from contextlib import suppress
from pathlib import Path

from ...weights.yaml_files import read_yaml

_SHOWN = {  # what the weights show, too; those of the decoders are counted otherwise there
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "num_labels",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": "feature_size",
    "MODEL.SEM_SEG_HEAD.MASK_DIM": "mask_feature_size",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": "encoder_layers",
    "MODEL.MASK_FORMER.HIDDEN_DIM": "hidden_dim",
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": "num_queries",
    "MODEL.MASK_FORMER.NHEADS": "num_attention_heads",
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": "dim_feedforward",
}
_TOLD = {  # by nothing else
    "MODEL.MASK_FORMER.DROPOUT": "dropout",
    "MODEL.MASK_FORMER.CLASS_WEIGHT": "class_weight",
    "MODEL.MASK_FORMER.MASK_WEIGHT": "mask_weight",
    "MODEL.MASK_FORMER.DICE_WEIGHT": "dice_weight",
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": "no_object_weight",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": "train_num_points",
    "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": "oversample_ratio",
    "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": "importance_sample_ratio",
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": "size_divisor",
    "INPUT.MIN_SIZE_TEST": "shortest_edge",
    "INPUT.MAX_SIZE_TEST": "longest_edge",
}
_EDGES = ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST")
_PIXELS = {"MODEL.PIXEL_MEAN": "image_mean", "MODEL.PIXEL_STD": "image_std"}  # of 0 to 255 there
_LAYERS = "MODEL.MASK_FORMER.DEC_LAYERS"  # one more than here
_RATE, _DINAT_RATE = "MODEL.SWIN.DROP_PATH_RATE", "MODEL.DINAT.DROP_PATH_RATE"
_DILATIONS = "MODEL.DINAT.DILATIONS"
_LEVELS = ["res2", "res3", "res4", "res5"]
_FIXED = {  # what the architecture does not leave open here
    "MODEL.META_ARCHITECTURE": "MaskFormer",
    "MODEL.SEM_SEG_HEAD.NAME": "MaskFormerHead",
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": _LEVELS,
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": _LEVELS[1:],
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    "MODEL.SEM_SEG_HEAD.NORM": "GN",
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder",
    "MODEL.MASK_FORMER.PRE_NORM": False,
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": False,
    "INPUT.FORMAT": "RGB",
}
_FIXED_SWIN = {
    "MODEL.BACKBONE.NAME": "D2SwinTransformer",
    "MODEL.SWIN.PATCH_SIZE": 4,
    "MODEL.SWIN.MLP_RATIO": 4.0,
    "MODEL.SWIN.QKV_BIAS": True,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.PATCH_NORM": True,
    "MODEL.SWIN.OUT_FEATURES": _LEVELS,
}
_FIXED_DINAT = {
    "MODEL.BACKBONE.NAME": "D2DiNAT",
    "MODEL.DINAT.QKV_BIAS": True,
    "MODEL.DINAT.QK_SCALE": None,
    "MODEL.DINAT.OUT_FEATURES": _LEVELS,
}
_FIXED_RESNET = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.STEM_TYPE": "basic",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.OUT_FEATURES": _LEVELS,
}
_LISTS = ("depths", "num_heads")  # of a Swin's sizes
_DEPTHS = {"resnet50": 50, "resnet101": 101, "resnet152": 152}


_OF_FAMILY = {"swin": _FIXED_SWIN, "dinat": _FIXED_DINAT, "resnet": _FIXED_RESNET}


def read(path: Path, shown: dict, family: str) -> dict:
    """Settings of a config.yaml; {} and a warning where it is of other weights.

    Args:
        path: of the file, whose _BASE_ is not followed: what training writes needs none.
        shown: settings that the weights show.
        family: of the backbone: "swin", "dinat" or "resnet".

    Raises:
        ValueError: it is no YAML, has words where numbers belong, or an option that Mask2Former
            has not here.
    """
    content = read_yaml(path)
    found = dict(_flat(content)) if isinstance(content, dict) else {}
    if "_BASE_" in found:
        warnings.warn(
            f"{path}: its _BASE_, {found['_BASE_']}, is not read: what is said there alone is "
            "taken to be as in the published configurations",
            stacklevel=2,
        )
    _check_numbers(found, path)
    there = {ours: found[name] for name, ours in _SHOWN.items() if name in found}
    if _LAYERS in found:
        there["decoder_layers"] = found[_LAYERS] - 1
    if other := [f"{k} is {v} there, {shown[k]} here" for k, v in there.items() if v != shown[k]]:
        warnings.warn(
            f"{path} is not read: it is of other weights; {'; '.join(other)}", stacklevel=2
        )
        return {}
    for name, value in (_FIXED | _OF_FAMILY[family]).items():
        if found.get(name, value) != value:
            raise ValueError(f"from_pretrained: {path}: {name} must be {value}, got {found[name]}")
    settings = {ours: found[name] for name, ours in _TOLD.items() if name in found}
    if settings.get("shortest_edge") == 0:  # there pictures then keep their size
        settings |= {"shortest_edge": None, "longest_edge": None}
    for name, ours in _PIXELS.items():
        if name in found:
            settings[ours] = tuple(round(value / 255, 9) for value in found[name])
    if family == "swin" and _RATE in found:
        settings["drop_path_rate"] = found[_RATE]
    if family == "dinat" and _DINAT_RATE in found:
        settings["drop_path_rate"] = found[_DINAT_RATE]
    if family == "dinat" and _DILATIONS in found:
        dilations = {"dilations": found[_DILATIONS]}
        settings["backbone_options"] = shown["backbone_options"] | dilations
    return settings


def _check_numbers(found: dict, path: Path) -> None:
    """Raises ValueError where what is read is no number; an edge that is None is no limit."""
    for name in {*_TOLD, *_PIXELS, _LAYERS, _RATE} & found.keys():
        value, several = found[name], name in _PIXELS
        values = value if several and isinstance(value, list) else [value]
        good = several == isinstance(value, list) and all(type(v) in (int, float) for v in values)
        if not good and not (value is None and name in _EDGES):
            rule = "a list of numbers" if several else "a number"
            raise ValueError(f"from_pretrained: {path}: {name} must be {rule}, got {value!r}")


def _flat(tree: dict, prefix: str = ""):
    """Pairs of dotted names and values; tuples and numbers in strings are what they say."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
            continue
        if isinstance(value, str) and value[:1] in "([0123456789.":
            with suppress(ValueError, SyntaxError):  # a word like any other
                value = literal_eval(value)
        yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def write(settings: dict, swin: dict | None) -> dict:
    """What config.yaml holds.

    Args:
        settings: under the names of `Mask2FormerConfig`.
        swin: sizes of a Swin by the names of its arguments; None for a ResNet.
    """
    flat = _FIXED | (_FIXED_RESNET if swin is None else _FIXED_SWIN)
    known = {name: settings[ours] for name, ours in (_SHOWN | _TOLD).items()}
    flat |= {name: value for name, value in known.items() if value is not None}
    flat[_LAYERS] = settings["decoder_layers"] + 1
    for name, ours in _PIXELS.items():
        flat[name] = [round(value * 255, 9) for value in settings[ours]]
    if swin is None:
        frozen = settings["backbone_options"].get("freeze_norm")
        flat["MODEL.RESNETS.DEPTH"] = _DEPTHS[settings["backbone"]]
        flat["MODEL.RESNETS.NORM"] = "FrozenBN" if frozen else "SyncBN"
    else:
        flat[_RATE] = settings["drop_path_rate"]
        for name, value in swin.items():
            flat[f"MODEL.SWIN.{name.upper()}"] = list(value) if name in _LISTS else value
    tree = {"VERSION": 2}
    for name, value in flat.items():
        *sections, field = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[field] = value
    return tree
