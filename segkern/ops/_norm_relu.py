r"""What follows a convolution of a residual network whose norms are frozen, in one pass on a GPU.

    y = relu(norm(x) + other)    or    relu(norm(x) + norm'(other))    or    relu(norm(x))
    norm(x) = (x - mean) / sqrt(variance + eps) weight + bias

The moments are those that a batch norm kept. Folding the norm into the convolution's weights would
gain nothing on a GPU: PyTorch adds the bias of cuDNN's convolutions by a kernel of its own, which
moves what a norm moves; and folded weights that are kept go stale where weights change without a
trace, as in a replayed CUDA graph. Here norm, sum and ReLU are that one kernel, and nothing is
kept.
Backward is one pass as well: where y > 0 the gradient goes to x and to `other`, times what each
was scaled by. It needs y, which the next convolution keeps anyway, and x and `other` only where
weight or bias of their norm train; their sums over pixels join in the order of programs: the same
bits each run.
Bytes: x read and y written once, where PyTorch reads and writes the map for each of the three;
backward the gradient and y read and the results written once, where PyTorch reads and writes the
gradient for ReLU and norm, reads x, and keeps it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import exact_dtype

Norm = tuple[list[Tensor], float]  # mean, variance, weight and bias, each [C]; eps


def _of_pytorch(x, norm, eps, other, other_norm, other_eps):
    """Plain PyTorch, which runs on a CPU, in the order of the layers."""
    mean, variance, weight, bias = norm
    y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
    if other is not None:
        if other_norm:
            mean, variance, weight, bias = other_norm
            other = F.batch_norm(other, mean, variance, weight, bias, False, 0.0, other_eps)
        y += other
    return F.relu(y, inplace=True)


def _gradients_of_pytorch(grad, out, summed, x, norm, eps, other, other_norm, other_eps):
    """The gradients in plain PyTorch."""
    exact = exact_dtype(out)
    g = torch.where(out <= 0, 0.0, grad.to(exact))

    def of(value, norm, eps):
        mean, variance, weight, _ = (t.to(exact)[:, None, None] for t in norm)
        narrow = (variance + eps).rsqrt()
        if value is None:
            return g * (narrow * weight), g.new_empty(0)
        weighted = (g * (value.to(exact) - mean) * narrow).sum((0, 2, 3))
        return g * (narrow * weight), torch.stack((weighted, g.sum((0, 2, 3))))

    of_x, of_norm = of(x, norm, eps)
    of_other, of_other_norm = out.new_empty(0), g.new_empty(0)
    if summed:
        of_other, of_other_norm = (
            of(other, other_norm, other_eps) if other_norm else (g.clone(), of_other_norm)
        )
        of_other = of_other.to(out.dtype).contiguous(memory_format=torch.channels_last)
    of_x = of_x.to(out.dtype).contiguous(memory_format=torch.channels_last)
    return of_x, of_other, of_norm, of_other_norm


def _map_like(x):
    return x.new_empty([x.shape[i] for i in (0, 2, 3, 1)]).permute(0, 3, 1, 2)


def _fake(x, norm, eps, other, other_norm, other_eps):
    return _map_like(x)


def _fake_backward(grad, out, summed, x, norm, eps, other, other_norm, other_eps):
    exact = exact_dtype(out)
    sums = (
        out.new_empty((0,) if t is None else (2, out.shape[1]), dtype=exact) for t in (x, other)
    )
    return _map_like(out), _map_like(out) if summed else out.new_empty(0), *sums


_forward = _library.define(
    "norm_relu(Tensor x, Tensor[] norm, float eps, Tensor? other, Tensor[] other_norm,"
    " float other_eps) -> Tensor",
    _fake,
    triton="norm_relu",
    composed=_of_pytorch,
)
_backward = _library.define(
    "norm_relu_backward(Tensor grad, Tensor out, bool summed, Tensor? x, Tensor[] norm, float eps,"
    " Tensor? other, Tensor[] other_norm, float other_eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    triton="norm_relu_backward",
    composed=_gradients_of_pytorch,
)


class _NormRelu(torch.autograd.Function):
    """`norms` are the four tensors of the norm, and those of the other one if there is one."""

    @staticmethod
    def forward(ctx, x, other, eps, other_eps, trained, *norms):
        out = _forward(x, norms[:4], eps, other, norms[4:], other_eps)
        values = (t if needed else None for t, needed in zip((x, other), trained))
        ctx.save_for_backward(out, *values, *norms)
        ctx.eps, ctx.summed, ctx.trained = (eps, other_eps), other is not None, trained
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (out, x, other, *norms), (eps, other_eps) = ctx.saved_tensors, ctx.eps
        of_x, of_other, *of_norms = _backward(
            grad, out, ctx.summed, x, norms[:4], eps, other, norms[4:], other_eps
        )
        given = []
        for i in range(0, len(norms), 4):
            pair = of_norms[i // 4] if ctx.trained[i // 4] else (None, None)
            given += [None, None, *pair]
        given = [g if g is None else g.to(t.dtype) for g, t in zip(given, norms)]
        return of_x, of_other if ctx.summed else None, None, None, None, *given


def trains(x: Tensor) -> bool:
    """Whether the gradients have a kernel on x's device, which beats those of the layers."""
    return x.is_cuda and "triton" not in _library.MISSING


def norm_relu(
    x: Tensor, norm: Norm, other: Tensor | None = None, other_norm: Norm | None = None
) -> Tensor:
    """A ReLU of a norm, and of what is added to it.

    Args:
        x: [B, C, h, w] floating; copied unless it is channels last in memory.
        norm: mean, variance, weight and bias, and eps.
        other: [B, C, h, w] in x's dtype: is added.
        other_norm: of `other`, before it is added.

    Returns:
        [B, C, h, w] in x's dtype, channels last in memory; computed in float32 (float64 where x
        is) and rounded once, on a CPU as its layers are. Gradients flow to x and `other`, and to
        weights and biases that require them.
    """
    (tensors, eps), (others, other_eps) = norm, other_norm or ([], 0.0)
    if not _library.use_kernel("norm_relu", "kernel", x):
        return _of_pytorch(x, tensors, eps, other, others, other_eps)
    trained = [any(t.requires_grad for t in ts[2:]) for ts in (tensors, others)]
    flows = any(trained) or any(t is not None and t.requires_grad for t in (x, other))
    if not (flows and torch.is_grad_enabled()):
        return _forward(x, tensors, eps, other, others, other_eps)
    return _library.applied(_NormRelu, x, other, eps, other_eps, trained, *tensors, *others)
