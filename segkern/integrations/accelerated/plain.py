"""Whether layers are what their weights alone say, so that a kernel may be handed the weights."""

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.activations import GELUActivation

from ...nn.linear import Linear
from .layers import Conv3x3, PointwiseConv2d

_KINDS = (nn.Linear, Linear, NonDynamicallyQuantizableLinear, nn.MultiheadAttention)
_KINDS += (nn.LayerNorm, nn.BatchNorm2d, nn.Conv2d, nn.ConvTranspose2d)
_KINDS += (PointwiseConv2d, Conv3x3)


def unhooked(*modules: nn.Module) -> bool:
    """Whether nothing happens when the modules are called but their forward."""
    return not any(
        "forward" in m.__dict__
        or m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        for m in modules
    )


def plain(*layers: nn.Module) -> bool:
    """Whether the layers are torch.nn's own, without hooks, with ordinary weights.

    Adapters, quantised or parametrised layers and hooks compute more than the weights say: a
    module that has one runs as transformers wrote it.
    """
    return unhooked(*layers) and all(
        type(layer) in _KINDS
        and all(p is None or type(p) is nn.Parameter for p in layer._parameters.values())
        for layer in layers
    )


def idle(training: bool, *dropouts: float) -> bool:
    """Whether none of the probabilities drops anything."""
    return not training or not any(dropouts)


def is_gelu(activation) -> bool:
    """Whether an activation of transformers is GELU with the error function."""
    if type(activation) is GELUActivation:
        return activation.act is F.gelu
    return activation is F.gelu or (
        type(activation) is nn.GELU and activation.approximate == "none"
    )


def as_transformers(part: type[nn.Module]) -> type[nn.Module]:
    """Of a class of a whole model: what transformers asks the file of a class, such as which names
    its weights have in a checkpoint and which attention it may take, it asks the original's."""
    for name in (
        "is_custom_code",
        "_can_set_attn_implementation",
        "_can_set_experts_implementation",
    ):
        asked = getattr(part.__base__, name, None)
        if asked is not None:
            setattr(part, name, asked)
    return part
