r"""A linear layer whose bias, activation and residual are part of the product.

    y = act(x W^T + b) + residual        act: none, relu or gelu (exact)

Letters: M row (all leading dimensions of x together), K channels in, N channels out.

On a CPU the product is a kernel of its own for float32 and float64: a thread copies a group of
W's rows to dense panels, takes its rows of x through tiles of 12 x 32 values that stay in
registers, and finishes each tile while it is in the first cache. A panel costs one pass over W for
hundreds of rows, so that no copy of W is kept: nothing is stale when W changes, training runs
at the same speed as inference, and no memory is held. The sums over K come in pieces of 256, which
also rounds less. PyTorch's product (MKL) takes its path for AVX2 on AMD's CPUs; on Intel's it is
as fast, and the products of backward and of few rows are left to it there.
In half precision it is oneDNN's product on a CPU, with activation or residual inside where there
are no gradients. Elsewhere the products are PyTorch's, with the ends as ops of their own.
Backward: dx = dz W, dW = dz^T x, db = sum of dz; dz = dy act'(x W^T + b), whose argument is kept
for gelu; a ReLU's result tells as much where no residual was added.
FLOPs: 2 M K N forward, 4 M K N backward; bytes: M (K + N) and K N values.
Source of the blocking: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication,
ACM TOMS 2008.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import alike, expect, got
from ._half_linear import half_dtype, half_linear

_aten = torch.ops.aten
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}
NUMBERS = {name: i for i, name in enumerate(ACTIVATIONS)}  # as the kernel has them


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The specification, in plain PyTorch; arguments as `linear`."""
    out = ACTIVATIONS[activation](F.linear(x, weight, bias))
    return out if residual is None else out + residual


def _made_by_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


INTEL = _made_by_intel()  # MKL takes its fastest path on this CPU
_FEW = 128  # rows, for which copying the weight to panels is a tenth of the product


def _fake(x, weight, bias, activation, residual, keep) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape[0], weight.shape[0])
    return out, torch.empty_like(out) if keep else x.new_empty(0)


_linear_op = _library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, int activation, Tensor? residual, bool keep)"
    " -> (Tensor, Tensor)",
    _fake,
    cpu_only=True,
)

linear_op_ = _library.define(
    "linear_(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, int activation,"
    " Tensor? residual, Tensor(b!)? before) -> ()",
    lambda *args: None,
    cpu_only=True,
)


def flops(x: torch.Size, weight: torch.Size, *_, out_shape=None, **__) -> int:
    """Operations of the product, for `torch.utils.flop_counter`, which takes too long to import
    here: `FlopCounterMode(custom_mapping={torch.ops.segkern.linear: flops})`."""
    return 2 * math.prod(x) * weight[0]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of [M, K] and [N, K] with any strides, by the kernel."""
    return _linear_op(a, b, None, 0, None, False)[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation, residual):
        cut = activation == NUMBERS["relu"] and residual is None  # the result tells where
        keep = activation != NUMBERS["none"] and not cut
        out, before = _linear_op(x, weight, bias, activation, residual, keep)
        ctx.save_for_backward(x, weight, out if cut else before if keep else None)
        ctx.activation = activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, before = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        above = grad
        if ctx.activation == NUMBERS["gelu"]:
            above = _aten.gelu_backward(grad, before)
        elif ctx.activation == NUMBERS["relu"]:
            above = _aten.threshold_backward(grad, before, 0)
        if ctx.needs_input_grad[0]:
            of_x = above @ weight if INTEL else product(above, weight.t())
        if ctx.needs_input_grad[1]:
            of_weight = above.t() @ x if INTEL else product(above.t(), x.t())
        if ctx.needs_input_grad[2]:
            of_bias = above.sum(0)
        return of_x, of_weight, of_bias, None, grad if ctx.needs_input_grad[4] else None


def _flat(x: Tensor) -> Tensor:
    """[..., K] to [M, K], also where K = 0."""
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    impl: str = "kernel",
) -> Tensor:
    """A linear layer, its activation and a sum with what lies beside it.

    Under autocast the tensors are cast to its dtype, as for `torch.nn.functional.linear`.

    Args:
        x: [..., K] floating, any strides.
        weight: [N, K] in x's dtype (without autocast), any strides.
        bias: [N], if any.
        activation: "none", "relu" or "gelu" (with the error function, not its tanh approximation).
        residual: [..., N], added last, if any. Gradients flow to all four tensors.
        impl: "kernel", or "reference" for PyTorch's product, which also runs for CUDA tensors and
            where half precision has gradients, or an activation and a residual: it uses the matrix
            units there.

    Returns:
        [..., N] in the dtype of the product, or of its sum with the residual.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"linear: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    sizes = {}
    flat = _flat(x) if isinstance(x, Tensor) and x.ndim else x
    expect("linear", "x", flat, "M K", "float", sizes)
    expect("linear", "weight", weight, "N K", "float", sizes)
    named = {"x": flat, "weight": weight}
    if bias is not None:
        expect("linear", "bias", bias, "N", "float", sizes)
        named["bias"] = bias
    shape = (*x.shape[:-1], len(weight))
    if residual is not None:
        if not isinstance(residual, Tensor) or residual.shape != shape:
            raise ValueError(f"linear: residual must be {list(shape)}, got {got(residual)}")
        expect("linear", "residual", _flat(residual), "M N", "float", sizes)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) if device in ("cpu", "cuda") else False
    flat, weight, *rest = alike("linear", **named)
    one_end = activation == "none" or residual is None  # oneDNN rounds between two of them
    half = half_dtype(flat, weight, *rest) if impl == "kernel" and one_end else None
    if half is not None:
        beside = None if residual is None else _flat(residual)
        out = half_linear(half, flat, weight, *rest or (None,), activation, beside)
        return out if x.ndim == 2 else out.view(shape)
    # an exported graph is for any number of rows, which the question would make one for good
    few = INTEL and not _library.is_exported() and flat.shape[0] < _FEW
    pytorchs = device != "cpu" or autocast or x.dtype.itemsize < 4 or few
    if pytorchs and impl == "kernel":
        impl = "reference"
    if not _library.use_kernel("linear", impl, x):
        return linear_reference(x, weight, *rest or (None,), activation, residual)
    # a residual of another dtype is added to the result
    like = residual is not None and residual.dtype == x.dtype
    beside = _flat(residual).contiguous() if like else None
    bias = rest[0].contiguous() if rest else None
    arguments = flat, weight, bias, NUMBERS[activation], beside
    given = (flat, weight, bias, beside)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        out = _library.applied(_Linear, *arguments)
    else:
        out = _linear_op(*arguments, False)[0]
    out = out if x.ndim == 2 else out.view(shape)
    return out if like or residual is None else out + residual
