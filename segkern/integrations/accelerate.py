"""`accelerate`: a model of transformers on our kernels, in place, and `restore`, which undoes it.

A module is accelerated by taking another class, whose forward runs a kernel over the module's own
weights; nothing else of it changes, so copies, checkpoints, casts, hooks and the classes of
transformers are as they were. Each class of `accelerated/` has its original's name and arguments.
Where a kernel does not say what a module was asked for, such as attention weights, dropout inside
of a kernel or an adapter in a layer, that module runs transformers' code.
"""

import warnings
from importlib import import_module
from importlib.metadata import version

from torch import nn

from ..nn.linear import Linear

VERSIONS = ("5.17", "5.23", "5.24")  # of transformers, that this is tested with

_DEFORMABLE = ("deformable_detr", "grounding_dino", "lw_detr", "mm_grounding_dino", "omdet_turbo")
_DEFORMABLE += ("pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4", "rf_detr", "rt_detr")
_OWN = ("mask2former", "maskformer", "oneformer", "segformer", "eomt", "swin")
_OWN += ("d_fine", "deimv2", "rt_detr_v2")
# module of transformers to the file of accelerated/ that has its classes
_HOMES = {f"transformers.models.{name}.modeling_{name}": name for name in _OWN}
_HOMES |= {f"transformers.models.{name}.modeling_{name}": "deformable" for name in _DEFORMABLE}
_HOMES["transformers.models.maskformer.modeling_maskformer_swin"] = "swin"
_BEFORE = "_class_before_acceleration"  # and the class since then


def accelerate(
    model: nn.Module,
    *,
    window_attention: bool = True,
    deformable_attention: bool = True,
    masked_attention: bool = True,
    attention: bool = True,
    feed_forward: bool = True,
    convolution: bool = True,
    linear: bool = True,
    loss: bool = True,
) -> nn.Module:
    """Makes a model of transformers run on our kernels, in place.

    The same object with the same weights gives the same outputs, losses and gradients, in training
    and in inference; other instances and transformers itself are left as they are. Accelerating a
    model again sets the switches anew.

    Args:
        model: a Mask2Former, MaskFormer, OneFormer, SegFormer, EoMT or Swin of transformers, or a
            model with its deformable attention (Deformable DETR, Grounding DINO, LW-DETR,
            OmDet-Turbo, PP-DocLayout, RF-DETR, RT-DETR, D-FINE, DEIMv2). Of a wrapper give the
            model inside.
        window_attention: Swin's blocks.
        deformable_attention: multi-scale deformable attention, and the layers of pixel decoders
            around it.
        masked_attention: the decoders of Mask2Former's and OneFormer's queries.
        attention: attention of all tokens in SegFormer and EoMT.
        feed_forward: SegFormer's, EoMT's and MaskFormer's networks of two layers.
        convolution: convolutions, group norms and resized sums of pixel decoders and heads.
        linear: products of torch.nn.Linear.
        loss: matching and losses.

    Returns:
        The model.

    Raises:
        TypeError: not a model of a known family.
        ValueError: as `restore`, of a model that is accelerated already.

    Warns:
        UserWarning: a version of transformers that is not in `VERSIONS`.
    """
    if not any(c.__module__ in _HOMES for c in type(model).__mro__):
        known = ", ".join(sorted({name.split(".")[2] for name in _HOMES}))
        came = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(
            f"accelerate: model must be one of transformers' {known}, got {came}"
            + " (give the model inside of it)" * (isinstance(model, nn.Module) and _wraps(model))
        )
    _check_version()
    switches = {
        "window_attention": window_attention,
        "deformable_attention": deformable_attention,
        "masked_attention": masked_attention,
        "attention": attention,
        "feed_forward": feed_forward,
        "convolution": convolution,
        "linear": linear,
        "loss": loss,
    }
    restore(model)
    for module in list(model.modules()):
        home = _HOMES.get(type(module).__module__)
        if home is None:
            continue
        file = import_module(f".accelerated.{home}", __package__)
        name = type(module).__name__
        if convolution and name in getattr(file, "CONVOLUTIONS", ()):
            _swap_convolutions(module)
        for switch, parts in file.PARTS.items():
            if switches[switch] and name in parts:
                _swap(module, parts[name])
    if linear:
        for module in model.modules():
            if type(module) is nn.Linear:
                _swap(module, Linear)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Gives every module of an accelerated model its own class back.

    Args:
        model: any module; what is not accelerated stays as it is.

    Returns:
        The model.

    Raises:
        ValueError: something else has changed a module's class since then, as parametrizations
            and `fully_shard` do; nothing is restored.
    """
    accelerated = [(n, m) for n, m in model.named_modules() if _BEFORE in vars(m)]
    for name, module in accelerated:
        part = vars(module)[_BEFORE][1]
        if type(module) is not part:
            raise ValueError(
                f"restore: {name or 'model'} must be the {part.__name__} that accelerate made it, "
                f"got {type(module).__name__}: undo first what was done to it since"
            )
    for _, module in accelerated:
        module.__class__ = vars(module).pop(_BEFORE)[0]
    return model


def _swap(module: nn.Module, part: type[nn.Module]) -> None:
    vars(module)[_BEFORE] = type(module), part
    module.__class__ = part


def _swap_convolutions(module: nn.Module) -> None:
    from .accelerated.layers import convolution

    for layer in module.modules():
        part = convolution(layer)
        if part is not None:
            _swap(layer, part)


def _wraps(model: nn.Module) -> bool:
    return any(c.__module__ in _HOMES for m in model.modules() for c in type(m).__mro__)


def _check_version() -> None:
    found = version("transformers")
    if ".".join(found.split(".")[:2]) not in VERSIONS:
        warnings.warn(
            f"accelerate: transformers must be {', '.join(VERSIONS)} to be known, got {found}; "
            "compare outputs before and after",
            stacklevel=3,
        )
