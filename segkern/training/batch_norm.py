"""Batch norms whose moments are those of the images of all processes.

    y = w (x - mean) / sqrt(M / n + eps) + b,    mean = sum of x / n,    M = sum of (x - mean)^2

of n values a channel. Each process sends its own mean, M and n, from which all find the same ones
without a difference of large sums: M = sum of M_i + n_i (mean_i - mean)^2. torch's SyncBatchNorm
is for GPUs alone; this one runs wherever collectives do.
Source: Batch Normalization (Ioffe & Szegedy, ICML 2015); joined moments: Chan et al., 1979.
"""

import contextlib
from collections.abc import Iterator
from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ..runtime.processes import Processes


@contextlib.contextmanager
def synchronised(model: nn.Module, processes: Processes) -> Iterator[None]:
    """Inside, batch norms take their moments over all processes, which all call the model
    together, while they are in training; in evaluation, and copies of the model there, each
    process is by itself.

    Args:
        model: with whatever batch norms, also timm's with an activation behind.
        processes: of the run; without effect on one alone.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    norms = norms if processes.count > 1 else []

    def forward(norm: _BatchNorm, x: Tensor) -> Tensor:
        return _forward(norm, processes.count, x) if norm.training else type(norm).forward(norm, x)

    for norm in norms:
        norm.forward = MethodType(forward, norm)  # of a copy it is the copy's
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: _BatchNorm, count: int, x: Tensor) -> Tensor:
    y, mean, variance = _Joined.apply(x, norm.weight, norm.bias, norm.eps, count)
    if norm.running_mean is not None:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            share = norm.momentum
            if share is None:
                share = 1 / norm.num_batches_tracked.to(mean.dtype)
            for kept, new in ((norm.running_mean, mean), (norm.running_var, variance)):
                kept += share * (new.to(kept.dtype) - kept)
    if hasattr(norm, "act"):
        y = norm.act(norm.drop(y))
    return y


class _Joined(torch.autograd.Function):
    """The normed values, and mean and unbiased variance [C]."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, count):
        exact = torch.promote_types(x.dtype, torch.float32)
        dims = [i for i in range(x.ndim) if i != 1]
        squares, mean = torch.var_mean(x.to(exact), dims, correction=0)
        own = torch.full_like(mean, x.numel() // x.shape[1])
        own = torch.stack((mean, squares * own, own))
        found = own.new_empty(count, *own.shape)
        dist.all_gather_into_tensor(found.view(-1, own.shape[1]), own)
        means, squares, numbers = found.unbind(1)  # [count, C] each
        total = numbers.sum(0)
        mean = (means * numbers).sum(0) / total
        squares = (squares + numbers * (means - mean) ** 2).sum(0)
        narrow = (squares / total + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, narrow, total)
        ctx.dims = dims
        shape = [1, -1] + [1] * (x.ndim - 2)
        y = (x.to(exact) - mean.view(shape)) * narrow.view(shape)
        if weight is not None:
            y = y * weight.to(exact).view(shape) + bias.to(exact).view(shape)
        ctx.mark_non_differentiable(mean, variance := squares / (total - 1).clamp(min=1))
        return y.to(x.dtype), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, weight, mean, narrow, total = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.ndim - 2)
        g = grad.to(mean.dtype)
        normed = (x.to(mean.dtype) - mean.view(shape)) * narrow.view(shape)
        own = torch.stack((g.sum(ctx.dims), (g * normed).sum(ctx.dims)))
        sums = own.clone()
        dist.all_reduce(sums)
        level, slope = (s.view(shape) for s in sums / total)
        scale = narrow if weight is None else narrow * weight.to(narrow.dtype)
        of_x = ((g - level - normed * slope) * scale.view(shape)).to(x.dtype)
        if weight is None:
            return of_x, None, None, None, None
        return of_x, own[1].to(weight.dtype), own[0].to(weight.dtype), None, None
