r"""A group norm of a channels-last map, with what a feature pyramid does next, in two passes.

    y = act((x - mean_g) / sqrt(var_g + eps) * weight + bias + resize(up))        act: none or relu

Letters: B image, h w map, C channels, G groups of C / G channels; mean and var over a group's
channels and pixels.

PyTorch's passes are six or seven: two for the norm, one for the resized map and one for its sum or
for the activation. On a GPU it also copies the map to planes, and all maps are float32 under
autocast. Here one reads x for the moments (in float64 from 64 pixels on, or by Welford's
sums on a GPU) and one writes y; the coarser map is resized where it is added. Backward is
PyTorch's on a CPU; on a GPU one pass for the sums, one for the gradient, and each value of the
coarser map collects its own.
Bytes: forward 3 B C h w values, and the coarser map; backward 5, one more for the coarser map.
Source: Group Normalization (Wu and He, ECCV 2018); Feature Pyramid Networks (Lin et al., CVPR
2017).
Differs: on a GPU under autocast the result has x's dtype, where PyTorch's is float32; the sums are
float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import exact_dtype, expect

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
    moments = (x.new_empty((x.shape[0], groups), dtype=exact_dtype(x)) for _ in range(2))
    return x.new_empty(x.shape), *moments


def _fake_backward(grad, x, weight, bias, mean, inverse, groups, relu, up, up_dtype):
    coarse = (0,) if up is None else (x.shape[0], *up, x.shape[3])
    others = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    return x.new_empty(x.shape), *others, x.new_empty(coarse, dtype=up_dtype or x.dtype)


def _of_pytorch(grad, x, weight, bias, mean, inverse, groups, relu, up, up_dtype):
    """The gradients on a CPU."""
    # torch 2.11 takes both as they lie, also where one is channels last and one is not
    x, grad = (t.contiguous().permute(0, 3, 1, 2) for t in (x, grad))
    B, C, h, w = x.shape
    if relu:
        middle, narrow = (t.repeat_interleave(C // groups, 1) for t in (mean, inverse))
        y = (x - middle[..., None, None]) * (narrow * weight)[..., None, None]
        grad = grad.where(y + bias[:, None, None] > 0, 0)
    coarse = x.new_empty(0)
    if up is not None:
        coarse = _aten.upsample_bilinear2d_backward(grad, (h, w), (B, C, *up), False)
        coarse = coarse.permute(0, 2, 3, 1).contiguous()
    of_x, *others = _aten.native_group_norm_backward(
        grad, x, mean, inverse, weight, B, C, h * w, groups, [True, True, True]
    )
    return of_x.permute(0, 2, 3, 1).contiguous(), *others, coarse


_forward = _library.define(
    "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool relu,"
    " Tensor? up) -> (Tensor, Tensor, Tensor)",
    _fake,
    triton="group_norm",
)
_backward = _library.define(
    "group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean,"
    " Tensor inverse, int groups, bool relu, int[]? up, ScalarType? up_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    triton="group_norm",
    composed=_of_pytorch,
)


class _GroupNorm(torch.autograd.Function):
    """Of rows [B, h, w, C]; where gradients flow, a ReLU and a coarser map exclude each other."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, relu, up):
        out, *moments = _forward(x, weight, bias, groups, eps, relu, up)
        ctx.save_for_backward(x, weight, bias, *moments)
        ctx.groups, ctx.relu = groups, relu
        ctx.up = (None, None) if up is None else (up.shape[1:3], up.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        up = ctx.up if ctx.needs_input_grad[6] else (None, None)
        *grads, of_up = _backward(grad, *ctx.saved_tensors, ctx.groups, ctx.relu, *up)
        return *grads, None, None, None, of_up if ctx.needs_input_grad[6] else None


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
        impl: "kernel", or "reference" for plain PyTorch, which on a CPU also runs in half
            precision and under autocast.

    Returns:
        [B, C, h, w] in x's dtype; float32 where plain PyTorch runs under autocast.

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
    # in half precision PyTorch's norm is as fast, but not its resize and sum
    half = not x.is_cuda and (autocast or x.dtype.itemsize < 4)
    fused = up is not None and not (
        torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors.values()))
    )
    if half and not fused and impl == "kernel":
        impl = "reference"
    if not _library.use_kernel("group_norm", impl, x):
        if autocast and not weight.dtype == bias.dtype == x.dtype:
            # which PyTorch takes beside any half precision
            weight, bias = weight.float(), bias.float()
        return group_norm_reference(x, groups, weight, bias, eps, relu, up)
    rows, coarse = (t if t is None else t.permute(0, 2, 3, 1) for t in (x, up))
    # else PyTorch's relu: on a CPU, because it frees its gradient
    cut = relu and (not torch.is_grad_enabled() or (x.is_cuda and up is None))
    out = _library.applied(_GroupNorm, rows, weight, bias, groups, eps, cut, coarse)
    return (out if cut or not relu else out.relu_()).permute(0, 3, 1, 2)
