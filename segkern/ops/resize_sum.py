r"""The sum of maps of several sizes, each resized to the first one's, with a bias and a ReLU.

    y = act(sum_l resize(x_l) + bias)        act: none or relu

Letters: B image, h w size of the result, L map of its own size h_l w_l, E channels.

A product by a 1 x 1 filter commutes with a bilinear resize, whose weights sum to 1. So a head that
projects maps, resizes them, lays them side by side and projects them once more is this sum of maps
that were projected once each, where they are small. No resized map is stored: for a row of the
result the two rows that it reads of each map are blended, then two values of each such line go
into a pixel, whose sum is rounded once.
Backward: the gradient of a map is the transpose of its resize: each of its values collects from
the pixels that took of it, rows first, so that two runs give the same bits. What the ReLU let
pass is told from y.
FLOPs: 4 B h w E for each map that is resized; bytes: B h w E values written, and the maps read.
Source: SegFormer (Xie et al., NeurIPS 2021), section 3.2, whose head is such a sum up to its ReLU.
Differs: `F.interpolate` resizes to a map that is stored and, in half precision, rounded.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import alike, exact_dtype, expect, got

_aten = torch.ops.aten
MOST = 8  # maps


def resize_sum_reference(
    maps: Sequence[Tensor], bias: Tensor | None = None, relu: bool = False
) -> Tensor:
    """The specification, in plain PyTorch; arguments as `resize_sum`."""
    first, *others = maps
    total = first.to(exact_dtype(first))
    for x in others:
        x = x.to(total.dtype)
        same = x.shape == total.shape
        total = total + (x if same else F.interpolate(x, total.shape[2:], mode="bilinear"))
    if bias is not None:
        total = total + bias.to(total.dtype)[:, None, None]
    total = F.relu(total) if relu else total
    return total.to(first.dtype).contiguous(memory_format=torch.channels_last)


def _fake(maps: list[Tensor], bias: Tensor | None, relu: bool) -> Tensor:
    return maps[0].new_empty(maps[0].shape)


def _fake_backward(grad: Tensor, sizes: list[int]) -> list[Tensor]:
    (B, _, _, E), pairs = grad.shape, zip(sizes[::2], sizes[1::2])
    return [grad.new_empty((B, h, w, E)) for h, w in pairs]


_forward = _library.define(
    "resize_sum(Tensor[] maps, Tensor? bias, bool relu) -> Tensor", _fake, triton="resize_sum"
)
_backward = _library.define(
    "resize_sum_backward(Tensor grad, int[] sizes) -> Tensor[]",
    _fake_backward,
    triton="resize_sum",
)


class _ResizeSum(torch.autograd.Function):
    """Of rows [B, h_l, w_l, E]."""

    @staticmethod
    def forward(ctx, relu, bias, *maps):
        out = _forward(maps, bias, relu)
        ctx.save_for_backward(*[out] * relu)
        ctx.sizes = [x.shape[1:3] for x in maps]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        for out in ctx.saved_tensors:
            grad = _aten.threshold_backward(grad, out, 0)
        _, of_bias, *wanted = ctx.needs_input_grad
        resized = [w and s != grad.shape[1:3] for w, s in zip(wanted, ctx.sizes)]
        sizes = [n for size, r in zip(ctx.sizes, resized) if r for n in size]
        found = iter(_backward(grad, sizes) if sizes else ())
        of_maps = [next(found) if r else grad if w else None for w, r in zip(wanted, resized)]
        return None, grad.sum((0, 1, 2)) if of_bias else None, *of_maps


def resize_sum(
    maps: Sequence[Tensor],
    bias: Tensor | None = None,
    relu: bool = False,
    impl: str = "kernel",
) -> Tensor:
    """The sum of maps, each resized bilinearly (`align_corners=False`) to the first one's size.

    Args:
        maps: 1 to 8 tensors [B, E, h_l, w_l] floating, of any sizes from one pixel on; each is
            copied unless it is channels last in memory.
        bias: [E], is added if it is there. All are of one dtype (without autocast). Gradients
            flow to all of them.
        relu: whether what is below 0 becomes 0.
        impl: "kernel", or "reference" for plain PyTorch.

    Returns:
        [B, E, h_1, w_1] in the dtype of the maps, channels last in memory; sums are float32
        (float64 where the maps are), and rounded once.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or number of maps.
    """
    listed = isinstance(maps, Sequence)
    if not listed or not 1 <= len(maps) <= MOST:
        found = len(maps) if listed else got(maps)
        raise ValueError(f"resize_sum: maps must be 1 to {MOST} tensors, got {found}")
    sizes, named = {}, {}
    for l, x in enumerate(maps):
        expect("resize_sum", f"maps[{l}]", x, f"B E h_{l} w_{l}", "float", sizes)
        if 0 in x.shape[2:]:
            raise ValueError(
                f"resize_sum: maps[{l}] must have at least one pixel, got {list(x.shape)}"
            )
        named[f"maps[{l}]"] = x
    if bias is not None:
        expect("resize_sum", "bias", bias, "E", "float", sizes)
        named["bias"] = bias
    tensors = alike("resize_sum", **named)
    maps, bias = tensors[: len(maps)], None if bias is None else tensors[-1]
    if not _library.use_kernel("resize_sum", impl, maps[0]):
        return resize_sum_reference(maps, bias, relu)
    rows = (x.permute(0, 2, 3, 1) for x in maps)
    return _library.applied(_ResizeSum, relu, bias, *rows).permute(0, 3, 1, 2)
