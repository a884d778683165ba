r"""A depthwise 3 x 3 convolution of channels-last rows, border of zeros, with bias and GELU.

    z[b, i, j, c] = bias[c] + sum_{m, n in 0..2} weight[c, m, n] x[b, i + m - 1, j + n - 1, c]
    y = z Phi(z)        Phi: the normal distribution (GELU with the error function)

Letters: B image, h w map, C channels.

Tokens [B, h w, C] are such a map as they lie. PyTorch's convolution wants planes: around it stand
two copies, and the activation is a pass of its own, which training keeps both sides of. Here one
pass reads x and writes y, channels beside each other in vector registers, and x alone is kept:
backward computes z again, row by row, and from it the gradient d of z, with which

    dx[i, j] = sum_{m, n} weight[m, n] d[i - m + 1, j - n + 1]
    dweight[m, n] = sum_{i, j} d[i, j] x[i + m - 1, j + n - 1],   dbias = sum d
FLOPs: 18 B h w C and the activation forward, three times that backward; bytes: 2 B h w C values
forward, 3 backward (on a GPU 5: d is stored).
Source: SegFormer (Xie et al., NeurIPS 2021), section 3.1, equation 3 (Mix-FFN).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import alike, exact_dtype, expect


def dwconv3x3_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The specification, in plain PyTorch; arguments as `dwconv3x3_gelu`."""
    exact = exact_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        planes, filters = x.permute(0, 3, 1, 2).to(exact), weight.to(exact)
        z = F.conv2d(planes, filters, padding=1, groups=len(weight))
        y = F.gelu(z + bias.to(exact)[:, None, None])
    return y.permute(0, 2, 3, 1).to(x.dtype).contiguous()


def _fake(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad: Tensor, x: Tensor, filters: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), filters.new_empty(filters.shape), bias.new_empty(bias.shape)


def _weight(filters: Tensor) -> Tensor:
    """[9, C] to [C, 1, 3, 3]."""
    return filters.mT.reshape(-1, 1, 3, 3)


_forward = _library.define(
    "dwconv3x3_gelu(Tensor x, Tensor filters, Tensor bias) -> Tensor",
    _fake,
    triton="dwconv3x3_gelu",
)
_backward = _library.define(
    "dwconv3x3_gelu_backward(Tensor grad, Tensor x, Tensor filters, Tensor bias)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    triton="dwconv3x3_gelu",
)


class _DepthwiseGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        filters = weight.reshape(-1, 9).mT.contiguous()  # a tap's channels beside each other
        ctx.save_for_backward(x, filters, bias)
        return _forward(x, filters, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        of_x, of_filters, of_bias = _backward(grad, *ctx.saved_tensors)
        return of_x, _weight(of_filters), of_bias


def dwconv3x3_gelu(x: Tensor, weight: Tensor, bias: Tensor, impl: str = "kernel") -> Tensor:
    """GELU of a convolution of each channel by a 3 x 3 filter of its own, with stride 1 and a
    border of zeros.

    Args:
        x: [B, h, w, C] floating, copied unless it is contiguous: tokens [B, h w, C] viewed as a
            map.
        weight: [C, 1, 3, 3] in x's dtype (without autocast), as that of a depthwise `Conv2d`.
        bias: [C] likewise. Gradients flow to all three.
        impl: "kernel", or "reference" for plain PyTorch.

    Returns:
        [B, h, w, C] in x's dtype, contiguous; sums are float32 (float64 where x is), and the
        result is rounded once.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    sizes = {}
    expect("dwconv3x3_gelu", "x", x, "B h w C", "float", sizes)
    expect("dwconv3x3_gelu", "weight", weight, "C 1 3 3", "float", sizes)
    expect("dwconv3x3_gelu", "bias", bias, "C", "float", sizes)
    x, weight, bias = alike("dwconv3x3_gelu", x=x, weight=weight, bias=bias)
    if not _library.use_kernel("dwconv3x3_gelu", impl, x):
        return dwconv3x3_gelu_reference(x, weight, bias)
    return _library.applied(_DepthwiseGelu, x, weight, bias)
