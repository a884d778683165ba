"""What models do to maps: 1 x 1 convolutions, group norms, weights that lie as maps do.

Letters: B image, C channels, h w map size.
"""

import torch
from torch import Tensor, nn

from ..ops import group_norm, linear

GROUPS = 32


def pointwise(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution [B, C, h, w] as the matrix product that it is."""
    weight = convolution.weight.flatten(1)
    return linear(x.permute(0, 2, 3, 1), weight, convolution.bias).permute(0, 3, 1, 2)


def normed(x: Tensor, norm: nn.GroupNorm, **then) -> Tensor:
    """The norm of a map [B, C, h, w], with what `ops.group_norm` does after it."""
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **then)


def keep_channels_last(module: nn.Module) -> None:
    """Lays the weights of convolutions out as they read maps. In the module's state dict they are
    contiguous, as a copy: safetensors writes no others, nor does who saves models with it."""
    module.to(memory_format=torch.channels_last)
    module.register_state_dict_post_hook(_contiguous)


def _contiguous(module: nn.Module, state: dict[str, Tensor], prefix: str, _) -> None:
    for name, value in state.items():
        if name.startswith(prefix) and isinstance(value, Tensor):
            state[name] = value.contiguous()
