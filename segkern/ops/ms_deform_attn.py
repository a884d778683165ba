r"""Multi-scale deformable attention: a few bilinear samples a query, of every level, weighted.

    out[b, q, h] = sum_{l, p} a[b, q, h, l, p] * bilinear(level l of value[b, :, h], x, y)
    a = softmax over all L * P of logits[b, q, h]
    x = reference[b, q, l, 0] * w_l + offsets[b, q, h, l, p, 0] - 1/2       (y alike, with h_l)

Letters: B image, Q query, S pixels of all levels, H head, D channels a head, L level, P point.

Levels lie one after the other in value, row by row. A level is read at the four pixel centres
nearest to (x, y); what lies outside it counts as zero, and so does a sample whose place is NaN.
The kernel makes softmax, places and bilinear weights of a query in registers, then adds 4 rows of
D channels a sample; nothing of size Q * L * P * D is ever stored. The backward computes them anew.
On a GPU the gradient of value is gathered: samples are sorted by pixel (a counting sort), then
each pixel adds up its own. Deterministic algorithms also sort the samples of each pixel.
Bytes: value, offsets, logits and output once; 4 * D reads a sample from cache. FLOPs: 8 * D a
sample forward, 16 * D more backward.
Source: Deformable DETR (Zhu et al., ICLR 2021), equation 3.
Differs: offsets come in pixels of their level and weights as logits, so that the division by the
level's size and the softmax are not passes of their own; any dtype; no limit on B.
"""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import exact_dtype, expect, got

Shapes = Sequence[tuple[int, int]]  # (h, w) of each level


def ms_deform_attn_reference(
    value: Tensor,  # [B, S, H, D]
    shapes: Shapes,
    reference: Tensor,  # [B|1, Q, L|1, 2]
    offsets: Tensor,  # [B, Q, H, L, P, 2]
    logits: Tensor,  # [B, Q, H, L, P]
    normalized: bool = False,
) -> Tensor:
    """The specification, in plain PyTorch; arguments as `ms_deform_attn`."""
    exact = exact_dtype(value)
    B, _, H, D = value.shape
    L = len(shapes)
    maps, offsets, weights = value.to(exact), offsets.to(exact), logits.to(exact)
    if not normalized:
        weights = weights.flatten(3).softmax(3).view_as(logits)
    centre = reference.to(exact).expand(-1, -1, L, -1)[:, :, None, :, None]  # [B, Q, 1, L, 1, 2]
    image = torch.arange(B, device=value.device)[:, None, None, None]
    head = torch.arange(H, device=value.device)[:, None]
    out = maps.new_zeros(*offsets.shape[:3], D)
    start = 0
    for level, (h, w) in enumerate(shapes):
        size = torch.tensor((w, h), dtype=exact, device=value.device)
        place = centre[:, :, :, level] * size + offsets[:, :, :, level] - 0.5  # [B, Q, H, P, 2]
        near = ((place > -1) & (place < size)).all(-1, keepdim=True)  # False for NaN
        place = torch.where(near, place, -2)
        base = place.detach().floor()
        for step in ((0, 0), (1, 0), (0, 1), (1, 1)):
            step = torch.tensor(step, device=value.device)
            inside = ((base + step >= 0) & (base + step < size)).all(-1, keepdim=True)
            x, y = torch.where(inside, base + step, 0).long().unbind(-1)
            pixels = torch.where(inside, maps[image, start + y * w + x, head], 0)
            weight = torch.where(step == 1, place - base, 1 - (place - base)).prod(-1)
            out = out + ((weights[:, :, :, level] * weight)[..., None] * pixels).sum(3)
        start += h * w
    return out.flatten(2).to(value.dtype)


def _fake(value, shapes, reference, offsets, logits, normalized):
    B, Q = offsets.shape[:2]
    return value.new_empty((B, Q, value.shape[2] * value.shape[3]))


def _fake_backward(grad, value, shapes, reference, offsets, logits, normalized, deterministic):
    grad_value = value.new_empty(value.shape)
    grad_offsets = offsets.new_empty(offsets.shape, dtype=exact_dtype(value))
    return grad_value, grad_offsets, logits.new_empty(logits.shape)


_forward = _library.define(
    "ms_deform_attn(Tensor value, SymInt[] shapes, Tensor reference, Tensor offsets, "
    "Tensor logits, bool normalized) -> Tensor",
    _fake,
)
_backward = _library.define(
    "ms_deform_attn_backward(Tensor grad, Tensor value, SymInt[] shapes, Tensor reference, "
    "Tensor offsets, Tensor logits, bool normalized, bool deterministic) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


class _MsDeformAttn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, shapes, reference, offsets, logits, normalized):
        ctx.save_for_backward(value, reference, offsets, logits)
        ctx.shapes, ctx.normalized = shapes, normalized
        return _forward(value, shapes, reference, offsets, logits, normalized)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        value, reference, offsets, logits = ctx.saved_tensors
        grad_value, grad_offsets, grad_logits = _backward(
            grad,
            value,
            ctx.shapes,
            reference,
            offsets,
            logits,
            ctx.normalized,
            torch.are_deterministic_algorithms_enabled(),
        )
        grad_reference = None
        if ctx.needs_input_grad[2]:
            # a reference moves all heads and points of its level, by its size in pixels
            moved = grad_offsets.sum((2, 4))  # [B, Q, L, 2]
            for level, (h, w) in enumerate(zip(ctx.shapes[::2], ctx.shapes[1::2])):
                moved[:, :, level, 0] *= w
                moved[:, :, level, 1] *= h
            grad_reference = moved.sum_to_size(reference.shape).to(reference.dtype)
        return grad_value, None, grad_reference, grad_offsets.to(offsets.dtype), grad_logits, None


def _int_pairs(op: str, shapes, L: int, S: int) -> list[tuple[int, int]]:
    """The levels' sizes in Python's ints, checked."""
    rows = shapes
    if isinstance(shapes, Tensor):
        if shapes.device.type != "cpu":
            raise ValueError(f"{op}: shapes must be on the CPU, got {shapes.device}")
        rows = shapes.tolist()
    try:
        # a size that is being traced is an int already
        pairs = [
            tuple(n if isinstance(n, (int, torch.SymInt)) else index(n) for n in row)
            for row in rows
        ]
    except TypeError:
        pairs = [()]
    if not all(len(pair) == 2 and min(pair) > 0 for pair in pairs):
        came = got(shapes) if isinstance(shapes, Tensor) else repr(shapes)
        raise TypeError(f"{op}: shapes must be (h, w) pairs of positive ints, got {came}")
    area = sum(h * w for h, w in pairs)
    if len(pairs) != L or area != S:
        raise ValueError(
            f"{op}: shapes must be L = {L} pairs (h, w) whose areas sum to S = {S}, "
            f"got {pairs} with the sum {area}"
        )
    return pairs


def ms_deform_attn(
    value: Tensor,
    shapes: Shapes | Tensor,
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    normalized: bool = False,
    impl: str = "kernel",
) -> Tensor:
    """Multi-scale deformable attention.

    Args:
        value: [B, S, H, D] floating; the levels one after the other, row by row.
        shapes: L pairs (h, w) of ints, whose areas sum to S: a sequence, an array or a tensor
            [L, 2] on the CPU (on a GPU reading it would wait; it cannot be compiled).
        reference: [B or 1, Q, L or 1, 2] floating, x then y; 0 and 1 are the outer edges of a
            level.
        offsets: [B, Q, H, L, P, 2] floating, x then y, in pixels of their level.
        logits: [B, Q, H, L, P] floating; softmax runs over L and P together.
        normalized: take `logits` as the weights themselves, without softmax.
        impl: "kernel", or "reference" for plain PyTorch.

    Reference, offsets and weights are computed in float32 (float64 where value is float64), as
    are the sums. Gradients flow to all four tensors.

    Returns:
        [B, Q, H * D] in value's dtype.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or level sizes.
    """
    sizes = {}
    expect("ms_deform_attn", "value", value, "B S H D", "float", sizes)
    expect("ms_deform_attn", "offsets", offsets, "B Q H L P 2", "float", sizes)
    expect("ms_deform_attn", "logits", logits, "B Q H L P", "float", sizes)
    expect("ms_deform_attn", "reference", reference, "B|1 Q L|1 2", "float", sizes)
    shapes = _int_pairs("ms_deform_attn", shapes, sizes["L"], sizes["S"])
    if _library.use_kernel("ms_deform_attn", impl, value):
        flat = [n for size in shapes for n in size]
        return _library.applied(_MsDeformAttn, value, flat, reference, offsets, logits, normalized)
    return ms_deform_attn_reference(value, shapes, reference, offsets, logits, normalized)


def multi_scale_deformable_attention(
    value: Tensor,
    value_spatial_shapes: Shapes | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    impl: str = "kernel",
) -> Tensor:
    """The classic signature of the same op.

    Args:
        value: [B, S, H, D] floating.
        value_spatial_shapes: L pairs (h, w), or an integer tensor [L, 2]. A tensor on a GPU is
            read once, which waits for the device; pass a list to avoid it.
        sampling_locations: [B, Q, H, L, P, 2] floating, x then y; 0 and 1 are the outer edges.
        attention_weights: [B, Q, H, L, P] floating, taken as they are.
        impl: "kernel", or "reference" for plain PyTorch.

    Returns:
        [B, Q, H * D] in value's dtype.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or level sizes.
    """
    op = "multi_scale_deformable_attention"
    shapes = value_spatial_shapes
    if isinstance(shapes, Tensor):
        if shapes.is_floating_point() or shapes.ndim != 2 or shapes.shape[1] != 2:
            raise ValueError(f"{op}: value_spatial_shapes must be [L, 2] int, got {got(shapes)}")
        shapes = shapes.tolist()
    sizes = {}
    expect(op, "value", value, "B S H D", "float", sizes)
    expect(op, "sampling_locations", sampling_locations, "B Q H L P 2", "float", sizes)
    expect(op, "attention_weights", attention_weights, "B Q H L P", "float", sizes)
    shapes = _int_pairs(op, shapes, sizes["L"], sizes["S"])
    locations = sampling_locations.to(exact_dtype(value))
    # per level by numbers: a tensor of sizes would have to be copied to the device
    pixels = [
        torch.stack((x * w, y * h), -1)
        for (h, w), (x, y) in zip(shapes, (level.unbind(-1) for level in locations.unbind(3)))
    ]
    offsets = torch.stack(pixels, 3) if pixels else locations
    corner = locations.new_zeros(1, sizes["Q"], 1, 2)
    return ms_deform_attn(value, shapes, corner, offsets, attention_weights, True, impl)
