r"""Twice the resolution of a map: a transposed convolution, GELU, a depthwise one, a layer norm.

    y[2i + a, 2j + b] = gelu(W_ab x[i, j] + bias)          a transposed convolution: a product
    out[i, j]         = norm_c(sum_{m, n in 0..2} filter[m, n] y[i + m - 1, j + n - 1])

    masks[q, i, j]    = embeddings[q] . out[i, j]           where they are asked for

Letters: B image, h w size of the map, C channels, Q embedding.

The products' result as it lies, [B, h, w, 2, 2, C], is four times x; PyTorch lays it out as
pixels, convolves and normalises it in a pass each, over memory that is fresh. On a CPU in
inference a band of rows goes through all of it, and the convolution finds its pixels where the
product left them; `out` is never held if only its masks are wanted. Elsewhere, and where gradients
flow, there are the passes.
FLOPs: 8 B h w C^2 and 72 B h w C; bytes: 5 B h w C values.
Source: EoMT (Kerssies et al., CVPR 2025), section 3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._checks import alike, expect
from .linear import linear


def upscale_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    filters: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    embeddings: Tensor | None = None,
) -> Tensor:
    """The specification, in plain PyTorch; arguments as `upscale`."""
    y = F.conv_transpose2d(x.permute(0, 3, 1, 2), weight, stride=2)
    y = F.gelu(y + bias[:, None, None])
    y = F.conv2d(y, filters, padding=1, groups=len(filters))
    out = F.layer_norm(y.permute(0, 2, 3, 1), scale.shape, scale, shift, eps)
    return out if embeddings is None else torch.einsum("bqc,bhwc->bqhw", embeddings, out)


def as_product(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[4 C, C] and [4 C] of the linear layer that a transposed convolution is."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2), bias.repeat(4)


def refined(y: Tensor, filters: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The convolution and the norm of what the product left, [B, h, w, 4 C]."""
    B, h, w, _ = y.shape
    y = y.view(B, h, w, 2, 2, -1).transpose(2, 3).reshape(B, 2 * h, 2 * w, -1)
    y = F.conv2d(y.movedim(3, 1), filters, padding=1, groups=len(filters))
    return F.layer_norm(y.movedim(1, 3), scale.shape, scale, shift, eps)


def masks_of(embeddings: Tensor, maps: Tensor) -> Tensor:
    """[B, Q, C] times [B, h, w, C] as [B, Q, h, w]."""
    if _library.is_exported():
        return (embeddings @ maps.flatten(1, 2).mT).unflatten(2, maps.shape[1:3])
    # image by image: a CPU copies a stack of transposed maps in half precision before its product
    masks = [linear(e, rows.flatten(0, 1)) for e, rows in zip(embeddings, maps)]
    return torch.stack(masks).unflatten(2, maps.shape[1:3])


def _fake(x, weight, bias, filters, scale, shift, eps, embeddings) -> Tensor:
    B, h, w, C = x.shape
    like = (C,) if embeddings is None else ()
    front = (B,) if embeddings is None else embeddings.shape[:2]
    return x.new_empty((*front, 2 * h, 2 * w, *like))


_op = _library.define(
    "upscale(Tensor x, Tensor weight, Tensor bias, Tensor filters, Tensor scale, Tensor shift,"
    " float eps, Tensor? embeddings) -> Tensor",
    _fake,
    cpu_only=True,
)


def upscale(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    filters: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    embeddings: Tensor | None = None,
    impl: str = "kernel",
) -> Tensor:
    """A map of twice the size.

    Args:
        x: [B, h, w, C] floating.
        weight: [C, C, 2, 2] in x's dtype (without autocast), as that of a `ConvTranspose2d` of
            stride 2.
        bias: [C] likewise.
        filters: [C, 1, 3, 3], as the weight of a depthwise `Conv2d`.
        scale: [C], the norm's weight.
        shift: [C], its bias.
        eps: is added to the variance.
        embeddings: [B, Q, C], whose products with the map are wanted in its place. Gradients flow
            to all seven.
        impl: "kernel", or "reference" for plain PyTorch. Where gradients flow, in half precision,
            under autocast and for CUDA tensors "kernel" is PyTorch's ops around `linear`.

    Returns:
        [B, 2 h, 2 w, C], or masks [B, Q, 2 h, 2 w].

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    op, sizes = "upscale", {}
    expect(op, "x", x, "B h w C", "float", sizes)
    expect(op, "weight", weight, "C C 2 2", "float", sizes)
    expect(op, "filters", filters, "C 1 3 3", "float", sizes)
    vectors = {"bias": bias, "scale": scale, "shift": shift}
    for name, vector in vectors.items():
        expect(op, name, vector, "C", "float", sizes)
    given = {"x": x, "weight": weight, "filters": filters} | vectors
    if embeddings is not None:
        expect(op, "embeddings", embeddings, "B Q C", "float", sizes)
        given["embeddings"] = embeddings
    flows = torch.is_grad_enabled() and any(t.requires_grad for t in given.values())
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast:
        alike(op, **given)
    if impl == "kernel" and (flows or autocast or x.is_cuda or x.dtype.itemsize < 4):
        y = linear(x, *as_product(weight, bias), "gelu")
        out = refined(y, filters, scale, shift, eps)
        return out if embeddings is None else masks_of(embeddings, out.to(embeddings.dtype))
    if not _library.use_kernel(op, impl, x):
        return upscale_reference(x, weight, bias, filters, scale, shift, eps, embeddings)
    taps = filters.reshape(-1, 9).mT.contiguous()  # a tap's channels beside each other
    return _op(x, *as_product(weight, bias), taps, scale, shift, eps, embeddings)
