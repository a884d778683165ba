r"""What follows a convolution of a residual network in inference, in one pass on a GPU.

    y = relu(norm(x) + other)    or    relu(norm(x) + norm'(other))    or    relu(norm(x))
    norm(x) = (x - mean) / sqrt(variance + eps) weight + bias

The moments are those that a batch norm kept. Folding the norm into the convolution's weights would
gain nothing on a GPU: PyTorch adds the bias of cuDNN's convolutions by a kernel of its own, which
moves what a norm moves; and folded weights that are kept go stale where weights change without a
trace, as in a replayed CUDA graph. Here norm, sum and ReLU are that one kernel, and nothing is
kept.
Bytes: x read and y written once, where PyTorch reads and writes the map for each of the three.
"""

import torch.nn.functional as F
from torch import Tensor

from . import _library

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


def _fake(x, norm, eps, other, other_norm, other_eps):
    return x.new_empty([x.shape[i] for i in (0, 2, 3, 1)]).permute(0, 3, 1, 2)


_forward = _library.define(
    "norm_relu(Tensor x, Tensor[] norm, float eps, Tensor? other, Tensor[] other_norm,"
    " float other_eps) -> Tensor",
    _fake,
    triton="norm_relu",
    composed=_of_pytorch,
)


def norm_relu(
    x: Tensor, norm: Norm, other: Tensor | None = None, other_norm: Norm | None = None
) -> Tensor:
    """A ReLU of a norm, and of what is added to it; without gradient.

    Args:
        x: [B, C, h, w] floating; copied unless it is channels last in memory.
        norm: mean, variance, weight and bias, and eps.
        other: [B, C, h, w] in x's dtype: is added.
        other_norm: of `other`, before it is added.

    Returns:
        [B, C, h, w] in x's dtype, channels last in memory; computed in float32 (float64 where x
        is) and rounded once, on a CPU as its layers are.
    """
    run = _forward if _library.use_kernel("norm_relu", "kernel", x) else _of_pytorch
    return run(x, *norm, other, *(other_norm or ([], 0.0)))
