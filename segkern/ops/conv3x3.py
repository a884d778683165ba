r"""A 3 x 3 convolution of a channels-last map, border of zeros, by Winograd's minimal filters.

    y[b, i, j, k] = sum_{c, m, n in 0..2} weight[k, c, m, n] x[b, i + m - 1, j + n - 1, c]
    each 2 x 2 of it:  A^T ((G g G^T) * (B^T d B)) A        F(2 x 2, 3 x 3)

Letters: B image, h w map, C channels in, K channels out, T = B ceil(h/2) ceil(w/2) tiles of 2 x 2
pixels, d the 4 x 4 pixels that a tile reads, g a filter; the product * goes value by value and is
summed over C: 16 matrix products [T, C] [C, K] where the sum over places would be 36 for as many
pixels. Each sums over C alone, not 9 C: the result rounds less than a direct sum.
Backward of the map is the convolution of the gradient with turned filters, that of the filters
B^T d B times A dy A^T, 16 products again: 2.25 times fewer operations each.
FLOPs: 32 T C K forward, twice that backward; bytes: 4 B h w (C + K) and the filters once a band.
Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import alike, expect

# G: [4, 3]
_FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def conv3x3_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The specification, in plain PyTorch; arguments as `conv3x3`."""
    out = F.conv2d(x, weight, padding=1)
    return out.contiguous(memory_format=torch.channels_last)


def _sides(like: Tensor) -> Tensor:
    """[16, 9]: G on both sides of a 3 x 3 filter."""
    g = torch.tensor(_FILTER, dtype=like.dtype, device=like.device)
    return torch.kron(g, g)


def _filters(weight: Tensor) -> Tensor:
    """[K, C, 3, 3] to G g G^T, [16, K, C]."""
    return (_sides(weight) @ weight.reshape(-1, 9).mT).unflatten(1, weight.shape[:2])


def _weights(filters: Tensor) -> Tensor:
    """The transposed map: [16, K, C] to [K, C, 3, 3]."""
    return (filters.flatten(1).mT @ _sides(filters)).view(*filters.shape[1:], 3, 3)


def _fake(x: Tensor, filters: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], filters.shape[1]))


def _fake_backward(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((16, grad.shape[3], x.shape[3]))


_forward = _library.define("conv3x3(Tensor x, Tensor filters) -> Tensor", _fake, cpu_only=True)
_backward = _library.define(
    "conv3x3_backward(Tensor grad, Tensor x) -> Tensor", _fake_backward, cpu_only=True
)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _forward(x, _filters(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _forward(grad, _filters(weight.flip(2, 3).transpose(0, 1)))
        if ctx.needs_input_grad[1]:
            of_weight = _weights(_backward(grad, x))
        return of_x, of_weight


def conv3x3(x: Tensor, weight: Tensor, impl: str = "kernel") -> Tensor:
    """A convolution by 3 x 3 filters, with stride 1 and a border of zeros, without a bias.

    Args:
        x: [B, C, h, w] floating; copied unless it is channels last in memory.
        weight: [K, C, 3, 3] in x's dtype (without autocast). Gradients flow to both.
        impl: "kernel", or "reference" for PyTorch's convolution, which also runs in half
            precision, under autocast and for CUDA tensors: it uses the matrix units there.

    Returns:
        [B, K, h, w] in the dtype of the products, channels last in memory.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    sizes = {}
    expect("conv3x3", "x", x, "B C h w", "float", sizes)
    expect("conv3x3", "weight", weight, "K C 3 3", "float", sizes)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    x, weight = alike("conv3x3", x=x, weight=weight)
    if (x.is_cuda or autocast or x.dtype.itemsize < 4) and impl == "kernel":
        impl = "reference"
    if not _library.use_kernel("conv3x3", impl, x):
        return conv3x3_reference(x, weight)
    return _library.applied(_Conv3x3, x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
