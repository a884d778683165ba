"""A linear layer in half precision on a CPU: oneDNN's product with its ends inside.

PyTorch's linear layer copies the bias into the result before the product, and activates and adds
in passes of their own over values that were rounded. Here bias, activation or residual belong to
the product, before its one rounding. The op is the one that torch.compile puts in place of linear
layers; it has no gradient.
"""

import functools

import torch
from torch import Tensor

_SUPPORTED = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


@functools.cache
def takes(dtype: torch.dtype) -> bool:
    """Whether this torch has the op and this CPU the dtype."""
    op = torch.ops.mkldnn
    if dtype not in _SUPPORTED or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(op, "_linear_pointwise") and getattr(op, _SUPPORTED[dtype])()


def half_dtype(x: Tensor, *others: Tensor) -> torch.dtype | None:
    """The half precision in which `half_linear` has to be formed.

    Args:
        x, others: the factors and what is added: of one dtype, or of any under autocast.

    Returns:
        a dtype, or None where PyTorch's own layers do it: elsewhere than on a CPU, in float32 and
        float64, with gradients, without values, and in a graph that is being recorded, which would
        then be of this CPU alone.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    given = (x, *others)
    dtype = x.dtype
    if torch.is_autocast_enabled("cpu") and torch.float64 not in {t.dtype for t in given}:
        dtype = torch.get_autocast_dtype("cpu")
    if not takes(dtype) or not torch.backends.mkldnn.enabled:
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return None
    return dtype if all(t.numel() for t in given) else None


def half_linear(
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """act(x W^T + b), or x W^T + b + residual, of [M, K], [N, K], [N] and [M, N] in the dtype that
    `half_dtype` said; a residual of another dtype is added to the result."""
    op, x, weight = torch.ops.mkldnn._linear_pointwise, x.to(dtype), weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()  # read without its stride
    if residual is not None and residual.dtype == dtype:
        return op.binary(x, residual.contiguous(), weight, bias, "add")
    out = op(x, weight, bias, activation, [], "none" if activation == "gelu" else "")
    return out if residual is None else out + residual
