"""What stands in an exported graph for each of segkern's ops: plain PyTorch operations.

The models are not asked: `torch.export` records the ops as they are, and `decomposed` puts in the
place of each what this table holds, so that any runtime can run the graph. These are not the ops'
references but what makes a small graph: a mask of keys stays one of booleans, in place of packed
bits; deformable attention reads rows by their numbers (`Gather`) or, where that is wanted, by
`GridSample`; no size is asked for, as the answer would hold for the traced one alone; no operation
works in place, and none makes a tensor of the host's numbers, which a decomposition must not.

Letters are those of each op.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _library
from ..ops.feed_forward import feed_forward_reference
from ..ops.linear import ACTIVATIONS
from ..ops.neighborhood_attn import _axis as axis_keys
from ..ops.window_attn import BLOCKED

_NUMBERED = tuple(ACTIVATIONS.values())  # by their numbers in the op


def linear(x, weight, bias, activation, residual, keep):
    """Its second result, which only training reads, is the sum before the activation."""
    before = F.linear(x, weight, bias)
    out = _NUMBERED[activation](before)
    out = out if residual is None else out + residual
    return out, before if keep else x.new_empty(0)


def feed_forward(x, weight1, bias1, weight2, bias2, gelu, residual):
    """The reference without its norm, which comes before the op."""
    kind = "gelu" if gelu else "relu"
    return feed_forward_reference(x, weight1, bias1, weight2, bias2, kind, None, residual)


def attention(q, k, v, scale):
    """[B, Q, H D] of q [B, Q, H, D] and k, v [B, S, H, D]."""
    return _attend(q, k, v, scale, None)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Products and a softmax; `mask` is true where a key is open, [B, 1, Q, S]."""
    scores = (q * scale).transpose(1, 2) @ k.permute(0, 2, 3, 1)  # [B, H, Q, S]
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)


def mask_bits(queries, features, threshold):
    """Booleans [B, Q, S] in place of bits: only `masked_attn` reads them."""
    bits = queries @ features >= threshold
    return bits, bits.any(-1)


def masked_attn(q, k, v, bits, open, scale):
    """Bits and `open` are booleans of `mask_bits`; the second result is for training alone."""
    mask = (bits | ~open.unsqueeze(-1)).unsqueeze(1)
    return _attend(q, k, v, scale, mask), q.new_empty(0)


def conv3x3(x, filters):
    """A direct convolution of [B, h, w, C].

    The filters [16, K, C] are Winograd's, G g G^T; g is read off them: its first and last row are
    there, the middle one is a difference."""
    weight = filters.unflatten(0, (4, 4))
    for side in (0, 1):
        first, one, two, last = weight.split(1, side)
        weight = torch.cat((first, one - two, last), side)  # [3, 3, K, C] in the end
    weight = weight.permute(2, 3, 0, 1)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)


def dwconv3x3_gelu(x, filters, bias):
    """Of [B, h, w, C], filters [9, C]."""
    weight = filters.mT.reshape(-1, 1, 3, 3)
    z = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=filters.shape[1])
    return F.gelu(z.permute(0, 2, 3, 1))


def group_norm(x, weight, bias, groups, eps, relu, up):
    """Of [B, h, w, C]; the moments are for training alone."""
    y = F.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, eps)
    if up is not None:
        y = y + F.interpolate(up.permute(0, 3, 1, 2), y.shape[2:], mode="bilinear")
    y = F.relu(y) if relu else y
    return y.permute(0, 2, 3, 1), x.new_empty(0), x.new_empty(0)


def norm_relu(x, norm, eps, other, other_norm, other_eps):
    """Norms whose moments are kept; `norm` is mean, variance, weight and bias."""
    y = _normed(x, norm, eps)
    if other is not None:
        y = y + (_normed(other, other_norm, other_eps) if other_norm else other)
    return F.relu(y)


def _normed(x: Tensor, norm: list[Tensor], eps: float) -> Tensor:
    return F.batch_norm(x, *norm, False, 0.0, eps)


def resize_sum(maps, bias, relu):
    """Of rows [B, h_l, w_l, E]."""
    first, *others = (x.permute(0, 3, 1, 2) for x in maps)
    for x in others:  # of the same size, too: a question would be one of a dynamic graph's sizes
        first = first + F.interpolate(x, first.shape[2:], mode="bilinear")
    if bias is not None:
        first = first + bias[:, None, None]
    return (F.relu(first) if relu else first).permute(0, 2, 3, 1)


def upscale(x, weight, bias, taps, scale, shift, eps, embeddings):
    """Of [B, h, w, C]: a product with [4 C, C], whose rows are the four pixels of each."""
    C = weight.shape[1]
    y = F.gelu(F.linear(x, weight, bias)).unflatten(3, (2, 2, C))
    y = y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, C, 2 h, 2 w]
    y = F.conv2d(y, taps.mT.reshape(-1, 1, 3, 3), padding=1, groups=C)
    out = F.layer_norm(y.permute(0, 2, 3, 1), (C,), scale, shift, eps)
    if embeddings is None:
        return out
    return (embeddings @ out.flatten(1, 2).mT).unflatten(2, out.shape[1:3])


def window_attn(qkv, qkv_bias, bias, window, shift, scale):
    """Windows as a dimension; where a map is padded its tokens are the projection's bias."""
    (B, h, w), (H, D) = qkv.shape[:3], qkv.shape[4:]
    y, x = ((side + window - 1) // window * window for side in (h, w))  # multiples to PyTorch, too
    tokens = F.pad(qkv.flatten(3), (0, 0, 0, x - w, 0, y - h)) + qkv_bias.flatten()
    if shift:
        tokens = tokens.roll((-shift, -shift), (1, 2))
    tokens = _windows(tokens, window).unflatten(3, (3, H, D))  # [B, N, S, 3, H, D]
    q, k, v = tokens.permute(3, 0, 1, 4, 2, 5).unbind(0)  # each [B, N, H, S, D]
    scores = (q * scale) @ k.mT + bias
    if shift:
        # what the roll brought from the other end of the map is another region
        low = (torch.arange(y, device=qkv.device) >= y - shift)[:, None].to(qkv.dtype)
        far = (torch.arange(x, device=qkv.device) >= x - shift).to(qkv.dtype)
        region = _windows((2 * low + far)[None, :, :, None], window)[0, :, :, 0]  # [N, S]
        apart = region[:, :, None] != region[:, None, :]
        scores = torch.where(apart[:, None], scores + BLOCKED, scores)
    out = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3)  # [B, N, S, H D]
    out = out.reshape(B, y // window, x // window, window, window, H * D)
    out = out.transpose(2, 3).reshape(B, y, x, H * D)
    if shift:
        out = out.roll((shift, shift), (1, 2))
    return out[:, :h, :w]


def _windows(x: Tensor, window: int) -> Tensor:
    """[B, y, x, C] as [B, N, S, C], N windows of S = window^2 tokens."""
    B, high, wide, C = x.shape
    x = x.reshape(B, high // window, window, wide // window, window, C).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def neighborhood_attn(q, k, v, bias, kernel, dilation, scale):
    """Row by row of the kernel: all keys of a pixel at once would be K^2 times the map."""
    h, w = q.shape[1:3]
    rows, rows_of_bias = axis_keys(h, kernel[0], dilation[0], q.device)
    columns, columns_of_bias = axis_keys(w, kernel[1], dilation[1], q.device)
    q = (q * scale).unsqueeze(4)  # [B, h, w, H, 1, D]
    scores = []
    for a in range(kernel[0]):
        table = bias[:, rows_of_bias[:, a]][:, :, columns_of_bias]  # [H, h, w, Kx]
        keys = _row(k, rows[:, a], columns)
        scores.append((q @ keys.mT).squeeze(4) + table.permute(1, 2, 0, 3))
    shares = torch.cat(scores, 4).softmax(4).unsqueeze(4).split(kernel[1], 5)
    return sum(s @ _row(v, rows[:, a], columns) for a, s in enumerate(shares)).squeeze(4)


def _row(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of each pixel the keys of one row of its kernel: [B, h, w, H, Kx, D]."""
    return x[:, rows][:, :, columns].transpose(3, 4)


def _levels(shapes: list) -> list[tuple]:
    return list(zip(shapes[::2], shapes[1::2]))


def deform_attn_by_rows(value, shapes, reference, offsets, logits, normalized):
    """Four reads a sample of rows of D values, by their numbers in all of value."""
    B, S, H, _ = value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    weights = (logits if normalized else logits.flatten(3).softmax(3)).reshape(B, Q, H, L * P)
    centre = reference.expand(-1, -1, L, -1)
    numbers, shares, start = [], [], 0
    image = torch.arange(B, device=value.device)[:, None, None, None] * S
    head = torch.arange(H, device=value.device)[:, None]
    for level, (h, w) in enumerate(_levels(shapes)):
        x, y = (
            centre[:, :, None, level, i, None] * n + offsets[:, :, :, level, :, i] - 0.5
            for i, n in ((0, w), (1, h))
        )
        left, top = x.floor(), y.floor()
        for dy in (0, 1):
            for dx in (0, 1):
                at_x, at_y = left + dx, top + dy
                inside = (at_x >= 0) & (at_x < w) & (at_y >= 0) & (at_y < h)
                part = (x - left if dx else left + 1 - x) * (y - top if dy else top + 1 - y)
                shares.append(torch.where(inside, part, 0))
                place = (
                    torch.where(inside, at_y, 0).long() * w + torch.where(inside, at_x, 0).long()
                )
                numbers.append((image + start + place) * H + head)
        start = start + h * w
    # corner by corner, all levels together: one read of L P rows a query and head
    rows, out = value.flatten(0, 2), 0
    for corner in range(4):
        number = torch.cat(numbers[corner::4], 3)  # [B, Q, H, L P]
        share = torch.cat(shares[corner::4], 3) * weights
        read = F.embedding(number, rows)  # [B, Q, H, L P, D]
        out = out + (share.unsqueeze(3) @ read).squeeze(3)
    return out.flatten(2)


def deform_attn_by_grid(value, shapes, reference, offsets, logits, normalized):
    """A `grid_sample` a level, of maps [B H, D, h, w]."""
    B, _, H, D = value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    weights = (logits if normalized else logits.flatten(3).softmax(3)).reshape(B, Q, H, L, P)
    centre, start, out = reference.expand(-1, -1, L, -1), 0, 0
    for level, (h, w) in enumerate(_levels(shapes)):
        part = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(B * H, D, h, w)
        moved = torch.stack(
            [offsets[:, :, :, level, :, 0] * (2 / w), offsets[:, :, :, level, :, 1] * (2 / h)], -1
        )
        grid = 2 * centre[:, :, None, level, None] - 1 + moved  # [B, Q, H, P, 2]
        grid = grid.transpose(1, 2).flatten(0, 1)
        read = F.grid_sample(part, grid, align_corners=False)  # [B H, D, Q, P]
        share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B H, Q, P]
        out = out + (read * share.unsqueeze(1)).sum(3)
        start = start + h * w
    return out.reshape(B, H * D, Q).mT


def table(grid_sample: bool = False) -> dict[torch._ops.OpOverload, Callable]:
    """Of each op that a model's prediction may hold what stands for it.

    Args:
        grid_sample: deformable attention samples by `GridSample`, which ONNX Runtime and OpenVINO
            have, and which TensorRT has been seen to compile wrongly; else by `Gather`.
    """
    found = {
        "attention": attention,
        "conv3x3": conv3x3,
        "dwconv3x3_gelu": dwconv3x3_gelu,
        "feed_forward": feed_forward,
        "group_norm": group_norm,
        "linear": linear,
        "mask_bits": mask_bits,
        "masked_attn": masked_attn,
        "ms_deform_attn": deform_attn_by_grid if grid_sample else deform_attn_by_rows,
        "neighborhood_attn": neighborhood_attn,
        "norm_relu": norm_relu,
        "query_layer": _library.COMPOSED["query_layer"],
        "query_prediction": _library.COMPOSED["query_prediction"],
        "resize_sum": resize_sum,
        "upscale": upscale,
        "window_attn": window_attn,
    }
    return {getattr(torch.ops.segkern, name).default: made for name, made in found.items()}


def decomposed(
    program: torch.export.ExportedProgram, grid_sample: bool = False
) -> torch.export.ExportedProgram:
    """The program in PyTorch's own operations.

    Raises:
        ValueError: an op of segkern that the table lacks.
    """
    program = program.run_decompositions(table(grid_sample))
    left = {str(n.target) for n in program.graph.nodes if str(n.target).startswith("segkern.")}
    if left:
        raise ValueError(f"export: no decomposition of {', '.join(sorted(left))}")
    return program
