r"""Two linear layers with an activation between them, whose hidden layer is never held.

    y = act(x W1^T + b1) W2^T + b2 + residual        act: gelu (exact) or relu

Letters: R row (all leading dimensions of x together), C channels, F hidden channels.

The hidden layer [R, F] is four to eight times as large as x, and training would keep it twice,
before and after the activation: the largest part of what a Swin holds. Here x alone is kept and
backward computes the hidden layer again, one matrix product more on top of six. On a CPU all of it
goes through blocks of rows, so that the hidden values of a block stay in the cache and no fresh
memory is touched; on a GPU there is one block. A layer norm before them can be part of it: its
result is not kept either.
FLOPs: 4 R C F forward, 10 R C F backward; bytes: 2 R C and 2 C F values.
Source: Attention Is All You Need (Vaswani et al., NeurIPS 2017), section 3.3; keeping inputs only:
Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
The matrix products are those of `linear`: on a CPU its kernel adds the bias and activates while a
piece of the hidden block is in the first cache, in half precision it is oneDNN's; elsewhere
PyTorch's.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import expect, got
from ._half_linear import half_dtype, half_linear
from .linear import INTEL, NUMBERS, linear_op_

_aten = torch.ops.aten
_HIDDEN = 2**22  # bytes of the hidden layer in a block
_ROWS = 512  # the fewest of a block: the weights are read once a block
Norm = tuple[Tensor, Tensor, float]  # weight, bias and epsilon of a layer norm
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


def feed_forward_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: str = "gelu",
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The specification, in plain PyTorch; arguments as `feed_forward`."""
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], *norm).to(weight1.dtype)
    out = F.linear(ACTIVATIONS[activation](F.linear(x, weight1, bias1)), weight2, bias2)
    return out if residual is None else out + residual


def _blocks(x: Tensor, hidden: int) -> Iterator[slice]:
    """Ranges of rows that are computed together."""
    rows = max(len(x), 1)
    if x.device.type == "cpu":
        rows = max(_ROWS, _HIDDEN // max(hidden * x.element_size(), 1))
    return (slice(i, min(i + rows, len(x))) for i in range(0, len(x), rows))


def _layer(
    x: Tensor,  # [R, C]
    weight: Tensor,  # [F, C]
    bias: Tensor,  # [F]
    activation: str,
    out: Tensor,  # [R, F]
    before: Tensor | None = None,  # [R, F]
    residual: Tensor | None = None,  # [R, F]
) -> None:
    """out = act(x W^T + bias) + residual; before, if it is given, = x W^T + bias, for a gelu."""
    if _own(x):
        linear_op_(out, x, weight, bias.contiguous(), NUMBERS[activation], residual, before)
        return
    if activation == "relu":  # on a GPU the product's own end adds the bias and cuts
        torch._addmm_activation(bias, x, weight.t(), out=out)
        return
    total = out if before is None else before
    torch.addmm(bias, x, weight.t(), out=total)
    if activation == "gelu":
        _aten.gelu.out(total, out=out)
    if residual is not None:
        out += residual


def _own(x: Tensor) -> bool:
    """Whether the products are the kernel of `linear`."""
    cpu = x.device.type == "cpu" and "cpu" not in _library.MISSING
    return cpu and x.dtype.itemsize >= 4


def _forward(
    x: Tensor,  # [R, C]
    weight1: Tensor,  # [F, C]
    bias1: Tensor,  # [F]
    weight2: Tensor,  # [C, F]
    bias2: Tensor,  # [C]
    gelu: bool,
    residual: Tensor | None,  # [R, C]
) -> Tensor:  # [R, C]
    activation = "gelu" if gelu else "relu"
    blocks = list(_blocks(x, len(weight1)))
    half = half_dtype(x, weight1, weight2)
    if half is not None:
        parts = []
        for rows in blocks:
            hidden = half_linear(half, x[rows], weight1, bias1, activation)
            beside = None if residual is None else residual[rows]
            parts.append(half_linear(half, hidden, weight2, bias2, "none", beside))
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    memory = x.new_empty(blocks[0].stop if blocks else 0, len(weight1))  # of every block in turn
    for rows in blocks:
        hidden = memory[: rows.stop - rows.start]
        _layer(x[rows], weight1, bias1, activation, hidden)
        beside = None if residual is None else residual[rows]
        _layer(hidden, weight2, bias2, "none", out[rows], residual=beside)
    return out


def _backward(
    grad: Tensor,  # [R, C]
    x: Tensor,  # [R, C]
    weight1: Tensor,  # [F, C]
    bias1: Tensor,  # [F]
    weight2: Tensor,  # [C, F]
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight1, bias1, weight2 and bias2."""
    exact = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = [torch.zeros_like(w, dtype=exact) for w in (weight1, bias1, weight2)]
    blocks = list(_blocks(x, len(weight1)))
    rows = blocks[0].stop if blocks else 0
    memory = x.new_empty(2, rows, len(weight1))  # of every block in turn
    for rows in blocks:
        (before, inner), above = memory[:, : rows.stop - rows.start], grad[rows]
        # where the gradient goes a ReLU's result tells as well as what came before it
        hidden = inner if gelu else before
        kept = before if gelu else None
        _layer(x[rows], weight1, bias1, "gelu" if gelu else "relu", hidden, kept)
        _add_product(sums[2], above.t(), hidden)
        _times(above, weight2, inner)
        if gelu:
            _aten.gelu_backward.grad_input(inner, before, grad_input=inner)
        else:
            _aten.threshold_backward.grad_input(inner, hidden, 0, grad_input=inner)
        _add_product(sums[0], inner.t(), x[rows])
        sums[1] += inner.sum(0, dtype=exact)
        _times(inner, weight1, grad_x[rows])
    first, second, third = (total.to(x.dtype) for total in sums)
    return grad_x, first, second, third, grad.sum(0)


def _times(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, of [R, F] and [F, C]."""
    if _own(a) and not INTEL:
        linear_op_(out, a, b.t(), None, NUMBERS["none"], None, None)
    else:
        torch.mm(a, b, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, of [F, R] and [R, C]."""
    if _own(a) and not INTEL:
        linear_op_(total, a, b.t(), None, NUMBERS["none"], total, None)
    elif total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _fake(x, weight1, bias1, weight2, bias2, gelu, residual) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad, x, weight1, bias1, weight2, gelu) -> tuple[Tensor, ...]:
    likes = (x, weight1, bias1, weight2, grad.new_empty(grad.shape[1]))
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in likes)


_forward_op = _library.define(
    "feed_forward(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2,"
    " bool gelu, Tensor? residual) -> Tensor",
    _fake,
    composed=_forward,
)
_backward_op = _library.define(
    "feed_forward_backward(Tensor grad, Tensor x, Tensor weight1, Tensor bias1, Tensor weight2,"
    " bool gelu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    composed=_backward,
)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, gelu, scale, shift, eps, residual):
        ctx.save_for_backward(x, weight1, bias1, weight2, scale, shift)
        ctx.gelu, ctx.eps = gelu, eps
        if scale is not None:
            x = _normed(x, scale, shift, eps)[0].to(weight1.dtype)
        return _forward_op(x, weight1, bias1, weight2, bias2, gelu, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *weights, scale, shift = ctx.saved_tensors
        beside = grad if ctx.needs_input_grad[9] else None
        if scale is None:
            grads = _backward_op(grad.contiguous(), x, *weights, ctx.gelu)
            return *grads, None, None, None, None, beside
        y, *moments = _normed(x, scale, shift, ctx.eps)
        grad, *grads = _backward_op(grad.contiguous(), y.to(weights[0].dtype), *weights, ctx.gelu)
        grad, *norm = _aten.native_layer_norm_backward(
            grad.to(y.dtype), x, x.shape[1:], *moments, scale, shift, [True, True, True]
        )
        return grad, *grads, None, *norm, None, beside


def _normed(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The layer norm of x [R, C], its means and the inverses of its deviations."""
    return torch.native_layer_norm(x, x.shape[1:], scale, shift, eps)


def feed_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: str = "gelu",
    impl: str = "kernel",
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Two linear layers with an activation between them.

    Under autocast all tensors are cast to its dtype, as for `torch.nn.functional.linear`; the norm
    is then computed in float32, as `torch.nn.functional.layer_norm`.

    Args:
        x: [..., C] floating.
        weight1: [F, C] in x's dtype (without autocast), as `torch.nn.Linear` holds it.
        bias1: [F].
        weight2: [C, F].
        bias2: [C].
        activation: "gelu" (with the error function, not its tanh approximation) or "relu".
        impl: "kernel", or "reference" for plain PyTorch.
        norm: weight [C], bias [C] and epsilon of a layer norm of x that comes first, if any.
        residual: [..., C], added last, if any.

    Returns:
        [..., C] in the dtype of the products, or of their sum with the residual.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"feed_forward: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    sizes = {}
    flat = x.reshape(-1, x.shape[-1]) if isinstance(x, Tensor) and x.ndim else x
    expect("feed_forward", "x", flat, "R C", "float", sizes)
    weights = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    for (name, weight), shape in zip(weights.items(), ("F C", "F", "C F", "C")):
        expect("feed_forward", name, weight, shape, "float", sizes)
    named = list(weights.items())
    if norm is not None:
        named += zip(("norm's weight", "norm's bias"), norm)
        for name, weight in named[4:]:
            expect("feed_forward", name, weight, "C", "float", sizes)
    if residual is not None:
        if not isinstance(residual, Tensor) or residual.shape != x.shape:
            raise ValueError(f"feed_forward: residual must be {got(x)}, got {got(residual)}")
        residual = residual.reshape(flat.shape)
        expect("feed_forward", "residual", residual, "R C", "float", sizes)
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        tensors = [t.to(dtype) for t in weights.values()]
        flat = flat.to(dtype) if norm is None else flat.float()
        norm = norm and (norm[0].float(), norm[1].float(), norm[2])
    else:
        tensors = list(weights.values())
        for name, weight in named:
            if weight.dtype != x.dtype:
                raise TypeError(f"feed_forward: {name} must be {x.dtype} as x, got {weight.dtype}")
    with torch.autocast(device, enabled=False):
        if _library.use_kernel("feed_forward", impl, x):
            options = norm or (None, None, 0.0)
            # a residual of another dtype, as under autocast, is added to the result
            like = residual is not None and residual.dtype == tensors[0].dtype
            inside = residual.contiguous() if like else None
            out = _library.applied(
                _FeedForward, flat, *tensors, activation == "gelu", *options, inside
            )
            if residual is not None and not like:
                out = out + residual
        else:
            out = feed_forward_reference(flat, *tensors, activation, norm, residual)
    return out if x.ndim == 2 else out.view(x.shape)
