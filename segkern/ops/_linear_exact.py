r"""A linear layer whose result stays in float32 beside half precision.

    y = x w^T + b                    [N, K] [M, K]^T
    x w^T = x1 w1^T + x2 w1^T + x1 w2^T,    x1 = bfloat16(x), x2 = bfloat16(x - x1), likewise w

On a GPU a product of float32 bypasses the matrix units. They take bfloat16 and sum in float32, so
that two terms for each factor that is wider (x2 w2 is left out) give all but 3 2^-18 of the sum of
|x w|: a result of ten is off by 1e-4. One product forms the three, of rows three times as long.
Two factors in one half precision are multiplied as they are, exactly. Gradients are products in
half precision, as of all layers under autocast.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from .linear import linear


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of half precision in float32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _operands(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of terms whose product is x w^T; [N, n K] and [M, n K] in half precision."""
    if x.dtype == w.dtype and x.dtype.itemsize == 2:
        return x, w
    (N, K), half = x.shape, torch.bfloat16
    high = w.to(half)
    low = (w - high).to(half)
    if x.dtype == half:
        terms, weights = 2, (high, low)
    else:
        terms, weights = 3, (high, low, -high)
    rows = x.new_empty((N, terms, K), dtype=half).copy_(x[:, None])
    if terms == 3:
        rows[:, 2].sub_(x)  # the second term of -x, rounded once
    return rows.flatten(1), torch.cat(weights, 1)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.bias = bias.dtype
        rows, columns = _operands(x, weight)
        return _product(rows, columns.mT).add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        half = x.dtype if x.dtype == weight.dtype != torch.float32 else torch.bfloat16
        of_x = of_weight = of_bias = None
        with torch.autocast(x.device.type, enabled=False):
            rows = grad.to(half)
            if ctx.needs_input_grad[0]:
                of_x = _product(rows, weight.to(half)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                of_weight = _product(rows.mT, x.to(half)).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                of_bias = grad.sum(0).to(ctx.bias)
        return of_x, of_weight, of_bias


def linear_exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer in float32 at least, whatever autocast or the tensors' dtypes say.

    Args:
        x: [..., K] floating.
        weight: [M, K] floating.
        bias: [M] floating.

    Returns:
        [..., M] in float32, float64 where a factor is. Beside half precision on a GPU it is off
        by up to 3 2^-18 of the sum of |x w|, else by float32's rounding.
    """
    exact = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    half = torch.is_autocast_enabled(x.device.type) or 2 in (x.itemsize, weight.itemsize)
    with torch.autocast(x.device.type, enabled=False):
        if x.is_cuda and half and exact == torch.float32:
            return _library.applied(_Split, x.flatten(0, -2), weight, bias).unflatten(
                0, x.shape[:-1]
            )
        return linear(x.to(exact), weight.to(exact), bias.to(exact))
