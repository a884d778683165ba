"""preprocessor_config.json: how Hugging Face's image processors take pictures, read and written.

Plain functions on dicts: settings have the names of a model's config, with a `Processing` for what
the config has no setting for. A file that says nothing of a field means the processor's default.

Where a file was written here, its field "segkern" says whether sizes are computed as in the papers
or as Hugging Face computes them (`Processing.multiple`); transformers carries it along.
"""

import warnings
from dataclasses import fields
from pathlib import Path

from ..structures.labels import IMAGENET_MEAN, IMAGENET_STD
from ..structures.processing import Processing
from ..weights.folders import read_json
from ..weights.hf_folders import SIZES_TOLD

_MASKS = {"size": {"shortest_edge": 800, "longest_edge": 1333}, "size_divisor": 32}
DEFAULTS = {  # of the processors, where they differ; a size_divisor only where they have one
    "Mask2FormerImageProcessor": _MASKS,
    "MaskFormerImageProcessor": _MASKS,
    "OneFormerImageProcessor": {"size": {"shortest_edge": 800, "longest_edge": 1333}},
    "SegformerImageProcessor": {"size": {"height": 512, "width": 512}, "square": True},
    "EomtImageProcessor": {
        "size": {"shortest_edge": 640, "longest_edge": 640},
        "lacks": ("do_reduce_labels",),
    },
}
_OLD = {  # names of before 2023
    "reduce_labels": "do_reduce_labels",
    "size_divisibility": "size_divisor",
}
_SIZES = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)
_SAME = [f.name for f in fields(Processing) if f.name not in ("size", "max_size", "multiple")]


def find_preprocessor(folder: Path) -> dict | None:
    """The fields of an image processor in a model's folder, from preprocessor_config.json, or from
    the part of processor_config.json that holds them; None where there is no such file.

    Raises:
        ValueError: a file is broken.
    """
    if (folder / "processor_config.json").is_file():
        found = read_json(folder / "processor_config.json").get("image_processor")
        if found:
            return found
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    return None


def is_old(config: dict) -> bool:
    """Whether config.json was written here by a version whose preprocessor_config.json does not
    say how sizes are computed."""
    return "segkern" in config and SIZES_TOLD not in config["segkern"]


def known_kind(found: dict, kind: str, name: str) -> str:
    """The class of image processors whose defaults and manners a file follows.

    Args:
        found: the file's fields.
        kind: that of the model, where the file names none; one that is not known here is taken for
            it, with a warning.
        name: begins the messages of errors.

    Raises:
        ValueError: one that is not known here, which crops.
    """
    named = found.get("image_processor_type", found.get("feature_extractor_type"))
    if named is None:
        return kind
    base = str(named).removesuffix("Fast").removesuffix("Pil")
    base = base.replace("FeatureExtractor", "ImageProcessor")
    if base in DEFAULTS:
        return base
    if found.get("do_center_crop"):
        raise ValueError(
            f"{name}: do_center_crop of preprocessor_config.json must be false, "
            f"got {found['do_center_crop']}"
        )
    warnings.warn(
        f"{name}: image_processor_type {named} is not known here: "
        f"preprocessor_config.json is read as that of {kind}",
        stacklevel=4,
    )
    return kind


def read_preprocessor(found: dict, kind: str, name: str, old: bool = False) -> dict:
    """Settings from a preprocessor_config.json.

    Args:
        found: its fields.
        kind: class of image processors of the model, such as "Mask2FormerImageProcessor".
        name: begins the messages of errors.
        old: as `is_old` says of the checkpoint; then sizes are as in the papers' code.

    Returns:
        image_mean, image_std, shortest_edge, longest_edge (None where the size is fixed),
        size_divisor where there is one, do_split_image where it is told, and processing.

    Raises:
        ValueError: a field that matters has a value that is not known here (names it).
    """
    kind = known_kind(found, kind, name)
    default = DEFAULTS[kind]
    found = {_OLD[k]: v for k, v in found.items() if k in _OLD} | found
    given = {k: v for k, v in found.items() if v is not None}  # None is the default there
    settings = {}
    for field, value in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        value = given.get(field, value)
        settings[field] = (value,) * 3 if isinstance(value, (int, float)) else tuple(value)
    size, rest = _read_size(given, default, name), {}
    settings |= {edge: size.get(edge) for edge in ("shortest_edge", "longest_edge")}
    rest["size"] = (size["height"], size["width"]) if "height" in size else None
    rest["max_size"] = (size["max_height"], size["max_width"]) if "max_height" in size else None
    multiple = 1
    if "size_divisor" in default:
        multiple = given.get("size_divisor", default["size_divisor"])
        if type(multiple) is not int:
            raise ValueError(
                f"{name}: size_divisor of preprocessor_config.json must be an integer, "
                f"got {multiple!r}"
            )
        multiple = max(1, multiple)
        settings["size_divisor"] = multiple
    ours = found.get("segkern") or {"sizes": "rounded" if old else "cut"}
    rest["multiple"] = None if ours.get("sizes") == "rounded" else multiple
    if "do_split_image" in given:
        settings["do_split_image"] = bool(given["do_split_image"])
    if isinstance(pad := given.get("pad_size"), dict):
        given["pad_size"] = pad.get("height"), pad.get("width")
    try:
        rest |= {field: given[field] for field in _SAME if field in given}
        settings["processing"] = Processing(**rest)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: preprocessor_config.json: {error}") from error
    return settings


def write_preprocessor(settings: dict, kind: str) -> dict:
    """preprocessor_config.json of Hugging Face, for an image processor of a class.

    Args:
        settings: as `read_preprocessor` returns them; what is missing is not written.
        kind: class of image processors.
    """
    more = Processing.of(settings.get("processing") or {})
    size = {edge: settings.get(edge) for edge in ("shortest_edge", "longest_edge")}
    size = {edge: side for edge, side in size.items() if side is not None}
    if more.size is not None:
        size = dict(zip(("height", "width"), more.size))
    if more.max_size is not None:
        size = dict(zip(("max_height", "max_width"), more.max_size))
    written = {"image_processor_type": kind, "size": size}
    written |= {field: getattr(more, field) for field in _SAME}
    if not size:  # pictures stay as they are, and this is how these files say it
        written |= {"size": None, "do_resize": False}
    written |= {field: list(settings[field]) for field in ("image_mean", "image_std")}
    if more.pad_size is not None:
        written["pad_size"] = dict(zip(("height", "width"), more.pad_size))
    if "size_divisor" in DEFAULTS[kind]:
        written["size_divisor"] = more.multiple or settings["size_divisor"]
    for field in ("do_split_image", "num_labels"):
        if field in settings:
            written[field] = settings[field]
    lacks = DEFAULTS[kind].get("lacks", ())
    written = {k: v for k, v in written.items() if v is not None and k not in lacks}
    return written | {"segkern": {"sizes": "rounded" if more.multiple is None else "cut"}}


def _read_size(given: dict, default: dict, name: str) -> dict[str, int]:
    """The size by its names, without those that say nothing.

    Raises:
        ValueError: of other names, or not of positive integers.
    """
    size = given.get("size", default["size"])
    if isinstance(size, int):
        if given.get("default_to_square", default.get("square", False)):
            size = {"height": size, "width": size}
        else:
            size = {"shortest_edge": size, "longest_edge": given.get("max_size")}
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        size = dict(zip(("height", "width"), size))
    if isinstance(size, dict):
        size = {edge: side for edge, side in size.items() if side is not None}
    good = isinstance(size, dict) and set(size) in _SIZES
    if not good or not all(type(side) is int and side > 0 for side in size.values()):
        raise ValueError(
            f"{name}: size of preprocessor_config.json must have height and "
            "width, shortest_edge and longest_edge, or max_height and max_width, all of them "
            f"positive integers, got {given.get('size')!r}"
        )
    return size
