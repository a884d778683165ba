"""The models: `MODELS` is the one place that lists their kinds.

Adding one: its folder here, its parts in nn/, a recipe, and a line of `MODELS`.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Union

import torch

from ..weights.folders import find_folder, is_single_file, model_type
from ..weights.hub import Place
from ..weights.state_dicts import misfits, with_new_head
from ..weights.unpickling import names
from .eomt import EoMT as EoMT
from .eomt import EoMTConfig as EoMTConfig
from .eomt import EoMTOutput as EoMTOutput
from .mask2former import Mask2Former as Mask2Former
from .mask2former import Mask2FormerConfig as Mask2FormerConfig
from .mask2former import Mask2FormerOutput as Mask2FormerOutput
from .maskformer import MaskFormer as MaskFormer
from .maskformer import MaskFormerConfig as MaskFormerConfig
from .maskformer import MaskFormerOutput as MaskFormerOutput
from .oneformer import OneFormer as OneFormer
from .oneformer import OneFormerConfig as OneFormerConfig
from .oneformer import OneFormerOutput as OneFormerOutput
from .protocol import ModelConfig as ModelConfig
from .protocol import SegmentationModel as SegmentationModel
from .segformer import SegFormer as SegFormer
from .segformer import SegFormerConfig as SegFormerConfig
from .segformer import SegFormerOutput as SegFormerOutput
from .segmenter import Segmenter as Segmenter
from .segmenter import SegmenterConfig as SegmenterConfig
from .segmenter import SegmenterOutput as SegmenterOutput
from .seq2seg import Seq2Seg as Seq2Seg
from .seq2seg import Seq2SegConfig as Seq2SegConfig
from .two_heads import TwoHeadOutput as TwoHeadOutput
from .unet import UNet as UNet
from .unet import UNetConfig as UNetConfig


class Kind(NamedTuple):
    """A row of `MODELS`.

    Attributes:
        config: class of its settings.
        model: class of the model.
        files: names that tell a checkpoint of its original code; Hugging Face's format and ours
            say the kind in config.json.
        suffixes: of checkpoints of its original code that are one file.
        marks: ends of names of weights, of which such a file holds one, as no other model's does.
        types: what config.json calls it; () for its kind.
    """

    config: type
    model: type
    files: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    types: tuple[str, ...] = ()


MODELS = {
    "mask2former": Kind(
        Mask2FormerConfig,
        Mask2Former,
        suffixes=(".pkl", ".pth"),
        marks=("predictor.query_feat.weight", "predictor.static_query.weight"),
    ),
    "segmenter": Kind(SegmenterConfig, Segmenter, files=("variant.yml",)),
    "maskformer": Kind(MaskFormerConfig, MaskFormer),
    "segformer": Kind(
        SegFormerConfig,
        SegFormer,
        suffixes=(".pth",),
        marks=("patch_embed1.proj.weight",),
    ),
    "seq2seg": Kind(Seq2SegConfig, Seq2Seg),
    "unet": Kind(UNetConfig, UNet),
    "eomt": Kind(
        EoMTConfig,
        EoMT,
        suffixes=(".bin", ".ckpt", ".pth"),
        marks=("network.q.weight",),
        types=("eomt", "eomt_dinov3"),
    ),
    "oneformer": Kind(
        OneFormerConfig,
        OneFormer,
        suffixes=(".pth", ".pkl"),
        marks=("task_mlp.layers.0.weight",),
    ),
}
Config = Union[tuple(kind.config for kind in MODELS.values())]  # noqa: UP007


def default_config() -> Config:
    """Of the model that is trained when none is named: small, for scenes of digits."""
    return Mask2FormerConfig.tiny(11)


def model_config(settings: dict) -> Config:
    """The config of plain settings with their `kind`.

    Raises:
        KeyError: no such kind.
        TypeError, ValueError: settings that it does not know or allow.
    """
    settings = dict(settings)
    return MODELS[settings.pop("kind")].config(**settings)


def build_model(config: ModelConfig, pretrained: bool = True) -> SegmentationModel:
    """A model with random weights.

    Args:
        config: what to build.
        pretrained: False leaves out the backbone's weights that the config asks for, where those
            of a checkpoint will be loaded over them.

    Raises:
        TypeError: no model has such a config.
    """
    kind = getattr(config, "kind", None)
    if kind not in MODELS:
        raise TypeError(f"segkern has no model for a {type(config).__name__}")
    wanted = config
    if config.backbone_pretrained and not pretrained:
        wanted = replace(config, backbone_pretrained=False)
    model = MODELS[kind].model(wanted)
    model.config = config
    return model


def open_model(
    name: str | Path,
    num_labels: int | None = None,
    id2label: dict[int, str] | None = None,
    label2id: dict[str, int] | None = None,
    ignore_mismatched_sizes: bool = False,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> SegmentationModel:
    """Opens a checkpoint of any model, in eval mode.

    Args:
        name: a folder that a model's `save_pretrained`, transformers or a model's original code
            wrote, or a file in it, or a file of an original code: .pkl or .pth of Mask2Former's
            or OneFormer's, .pth of SegFormer's, .bin, .ckpt or .pth of EoMT's; the folder of a
            training run; or a name on the hub.
        num_labels, id2label, label2id: of a new task; as of `manners.from_pretrained`, which the
            others are of, too.
        ignore_mismatched_sizes: weights of another shape start anew.
        dtype: of the model's floating weights; "auto" takes the checkpoint's. None is float32.
        revision, cache_dir, token, local_files_only: of a name on the hub.
        subfolder: of the folder, or of the repository on the hub.

    Raises:
        ValueError: of no kind that segkern has; or see `manners.from_pretrained`.
    """
    options = {
        "num_labels": num_labels,
        "id2label": id2label,
        "label2id": label2id,
        "ignore_mismatched_sizes": ignore_mismatched_sizes or None,
        "dtype": dtype,
    }
    options = {name: value for name, value in options.items() if value is not None}
    place = Place(revision, cache_dir, token, local_files_only, subfolder)
    kind, path = _found(name, place)
    return MODELS[kind].model.from_pretrained(path, **options)


def find_kind(name: str | Path) -> str:
    """The kind, a name in `MODELS`, of the model that `open_model` opens; no weights are read.

    Raises:
        ValueError: of no kind that segkern has.
    """
    return _found(name, Place())[0]


def _found(name: str | Path, place: Place) -> tuple[str, Path]:
    """The kind of a model, and its folder or file."""
    path = Path(name).expanduser()
    if is_single_file(path) and (kind := _kind_of_file(path)):
        return kind, path
    folder = find_folder(name, place)
    kinds = [
        kind
        for kind, row in MODELS.items()
        if row.files and all((folder / file).is_file() for file in row.files)
    ]
    if not kinds:
        found = model_type(folder)
        kinds = [kind for kind, row in MODELS.items() if found in (row.types or (kind,))]
        if not kinds:
            raise ValueError(
                f"open_model: {name}: model_type must be one of {', '.join(MODELS)}, got {found}"
            )
    return kinds[0], folder


def _kind_of_file(path: Path) -> str | None:
    """The model whose original code writes such a file; None for another suffix, or a folder.

    Raises:
        ValueError: a file of weights that is of no model here, or cannot be read.
    """
    kinds = [kind for kind, row in MODELS.items() if path.suffix in row.suffixes]
    if len(kinds) < 2 or path.is_dir():
        return kinds[0] if kinds and not path.is_dir() else None
    try:
        found = names(path)
    except ValueError as error:
        raise ValueError(f"open_model: {path}: {error}") from error
    for kind in kinds:
        if any(name.endswith(MODELS[kind].marks) for name in found):
            return kind
    marks = "; ".join(f"{' or '.join(MODELS[kind].marks)} ({kind})" for kind in kinds)
    beside = " or ".join(f"{row.files[0]} ({kind})" for kind, row in MODELS.items() if row.files)
    raise ValueError(
        f"open_model: {path} must hold weights of a model of these: {marks}; or lie beside "
        f"{beside}"
    )


# settings that change what the weights compute and show in no shape
_UNSEEN = (
    *("num_heads", "num_attention_heads", "num_points_encoder", "strides", "skip", "rope_theta"),
)


def initialize(model: SegmentationModel, source: str | Path, fresh_head: bool = False) -> str:
    """Starts a model from the weights of a checkpoint of its kind.

    Where the numbers of labels differ, the class head stays as it is; all else must fit. What the
    loss counts with (its seed, its class weights) stays the model's.

    Args:
        model: keeps its mode, device and dtype.
        source: as `open_model` takes it.
        fresh_head: the class head stays as it is in any case.

    Returns:
        a line that says what was taken and what is new.

    Raises:
        ValueError: no such checkpoint, of another kind, or weights that do not fit (names them);
            nothing is loaded then.
    """
    donor = open_model(source)
    kind, config = model.config.kind, donor.config
    if config.kind != kind:
        raise ValueError(f"initialize: {source} is a {config.kind}, the model a {kind}")
    faults = [
        f"{name} is {getattr(config, name)} there, {getattr(model.config, name)} here"
        for name in _UNSEEN
        if getattr(config, name, None) != getattr(model.config, name, None)
    ]
    here, there = model.config.num_labels, config.num_labels
    fresh = fresh_head or here != there
    own = model.state_dict()
    kept = [name for name in own if name.startswith("criterion.")]
    weights = donor.state_dict()
    for part in getattr(model, "training_parts", ()):  # checkpoints may do without
        if getattr(model, part) is None or getattr(donor, part) is None:
            weights = {k: v for k, v in weights.items() if not k.startswith(f"{part}.")}
            kept += [name for name in own if name.startswith(f"{part}.")]
    weights = with_new_head(weights, own, (*kept, *model.class_head) if fresh else kept)
    if faults := faults + misfits(weights, own):
        raise ValueError(f"initialize: {source} does not fit the model; {'; '.join(faults)}")
    model.load_state_dict(weights)
    count = len(own.keys() - kept)
    if fresh:
        new = len((set(model.class_head) & own.keys()) - set(kept))
        text = (
            f"{count - new} of {count} weights are those of {source}; new is the class head "
            f"({there} labels there, {here} here)"
        )
    else:
        text = f"all {count} weights are those of {source}"
        if renamed := _renamed(config, model.config):
            text += f"; its class head, too, where {renamed} (--fresh-head: a new one)"
    return text


def _renamed(there: ModelConfig, here: ModelConfig) -> str | None:
    """The first label that has another name in another model, and how many have."""
    before, now = (config.id2label or {} for config in (there, here))
    changed = [k for k in now if before.get(k) != now[k]]
    if not changed:
        return None
    more = f" and {len(changed) - 1} more names differ" if len(changed) > 1 else ""
    k = changed[0]
    return f"label {k} was {before.get(k, k)!r} and is {now[k]!r} now{more}"


def __getattr__(name: str):
    """Tells who asks for what was here under another name."""
    moved = {"CLASSES": "segkern.models.MODELS", "kind_of": "the attribute `kind` of a config"}
    if name in moved:
        raise AttributeError(f"segkern.models.{name} is now {moved[name]}")
    raise AttributeError(f"module 'segkern.models' has no attribute {name!r}")
