r"""A group norm of a channels-last map, with what a feature pyramid does next, in two passes.

    y = act((x - mean_g) / sqrt(var_g + eps) * weight + bias + resize(up))        act: none or relu

Letters: B image, h w map, C channels, G groups of C / G channels; mean and var over a group's
channels and pixels.

PyTorch's passes are six or seven: two for the norm, one for the resized map and one for its sum or
for the activation. Here one reads x for the sums, in float64 from 64 pixels on, and one writes y;
the coarser map is resized where it is added. Backward is PyTorch's.
Bytes: 3 B C h w values, and the coarser map.
Source: Group Normalization (Wu and He, ECCV 2018); Feature Pyramid Networks (Lin et al., CVPR
2017).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import expect

_aten = torch.ops.aten


def group_norm_reference(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    relu: bool = False,
    up: Tensor | None = None,
) -> Tensor:
    """The specification, in plain PyTorch; arguments as `group_norm`."""
    y = F.group_norm(x, groups, weight, bias, eps)
    if up is not None:
        y.add_(F.interpolate(up, x.shape[2:], mode="bilinear"))
    return F.relu(y, inplace=True) if relu else y


def _fake(x, weight, bias, groups, eps, relu, up) -> tuple[Tensor, Tensor, Tensor]:
    moments = (x.new_empty((len(x), groups)) for _ in range(2))
    return x.new_empty(x.shape), *moments


_forward = _library.define(
    "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool relu,"
    " Tensor? up) -> (Tensor, Tensor, Tensor)",
    _fake,
    cpu_only=True,
)


class _GroupNorm(torch.autograd.Function):
    """Of rows [B, h, w, C]."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, relu, up):
        out, *moments = _forward(x, weight, bias, groups, eps, relu, up)
        ctx.save_for_backward(x, weight, *moments)
        ctx.groups, ctx.up = groups, up if up is None else up.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # torch 2.11 takes both as they lie, also where one is channels last and one is not
        x, grad = (t.contiguous().permute(0, 3, 1, 2) for t in (ctx.saved_tensors[0], grad))
        weight, mean, inverse = ctx.saved_tensors[1:]
        of_up = None
        if ctx.up is not None and ctx.needs_input_grad[6]:
            b, h, w, c = ctx.up
            of_up = _aten.upsample_bilinear2d_backward(grad, x.shape[2:], (b, c, h, w), False)
            of_up = of_up.permute(0, 2, 3, 1)
        (B, C, h, w), wanted = x.shape, list(ctx.needs_input_grad[:3])
        of_x, *others = _aten.native_group_norm_backward(
            grad, x, mean, inverse, weight, B, C, h * w, ctx.groups, wanted
        )
        of_x = of_x if of_x is None else of_x.permute(0, 2, 3, 1)
        return of_x, *others, None, None, None, of_up


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    relu: bool = False,
    up: Tensor | None = None,
    impl: str = "kernel",
) -> Tensor:
    """A group norm, a resized coarser map added, and a ReLU.

    Args:
        x: [B, C, h, w] floating, at least one pixel; copied unless it is channels last in memory.
        groups: G, which divides C.
        weight: [C] in x's dtype (any under autocast).
        bias: [C]. Gradients flow to all tensors.
        eps: is added to the variance.
        relu: whether what is below 0 becomes 0.
        up: [B, C, *, *] in x's dtype: a map of any size that is resized bilinearly to x's and
            added.
        impl: "kernel", or "reference" for plain PyTorch, which also runs in half precision, under
            autocast and for CUDA tensors, for which there is no kernel.

    Returns:
        [B, C, h, w].

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or number.
    """
    sizes = {}
    expect("group_norm", "x", x, "B C h w", "float", sizes)
    tensors = {"weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        expect("group_norm", name, tensor, "C", "float", sizes)
    if up is not None:
        tensors["up"] = up
        expect("group_norm", "up", up, "B C H W", "float", sizes)
    if groups < 1 or sizes["C"] % groups:
        raise ValueError(f"group_norm: groups must divide C = {sizes['C']}, got {groups}")
    for name, size in sizes.items():
        if name in ("h", "w", "H", "W") and size == 0:
            raise ValueError(f"group_norm: maps must have at least one pixel, got {name} = 0")
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, tensor in tensors.items():
        if not autocast and tensor.dtype != x.dtype:
            raise TypeError(f"group_norm: {name} must be {x.dtype} as x, got {tensor.dtype}")
    if autocast and not weight.dtype == bias.dtype == x.dtype:
        # which PyTorch takes beside any half precision
        weight, bias = weight.float(), bias.float()
    if (x.is_cuda or autocast or x.dtype.itemsize < 4) and impl == "kernel":
        impl = "reference"
    if not _library.use_kernel("group_norm", impl, x):
        return group_norm_reference(x, groups, weight, bias, eps, relu, up)
    rows, coarse = (t if t is None else t.permute(0, 2, 3, 1) for t in (x, up))
    cut = relu and not torch.is_grad_enabled()  # else PyTorch's relu, whose gradient it frees
    out = _GroupNorm.apply(rows, weight, bias, groups, eps, cut, coarse)
    return (out if cut or not relu else out.relu_()).permute(0, 3, 1, 2)
