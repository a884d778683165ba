r"""Bilinear samples of feature maps at points, and the random points of the losses.

    out[b, c, p] = bilinear(features[b, c], points[b, p, 0] * w - 1/2, points[b, p, 1] * h - 1/2)

Letters: B image, C channel, h w map size, P point.

A map is read at its four nearest pixel centres; what lies outside counts as zero (grid_sample with
align_corners=False and padding_mode="zeros", whose points run from -1 to 1 where ours run from 0
to 1). The kernel finds the four offsets and weights of a point once for all channels.
Bytes: 4 reads and 1 write a sample; FLOPs: 8 a sample. On a GPU the gradient is added up with
atomics; under `torch.use_deterministic_algorithms(True)` in an order of its own, more slowly.
Source: PointRend (Kirillov et al., CVPR 2020), section 3.
Differs: bool and uint8 maps are read in place and give float32.

Random points come from Philox4x32-10 (Salmon et al., SC 2011), a counter-based generator: the same
bits in Python, C++, Triton and CUDA, whatever the batch, tile or rank. On a GPU one launch writes
8 bytes a point; on the CPU the kernel is the reference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library
from ._checks import exact_dtype, expect, got

MATCHING = 0xFFFFFFFF  # in place of a target: the points at which a prediction is matched


def random_points_reference(seed: Tensor, ids: Tensor, n: int) -> Tensor:
    """The specification, in plain PyTorch; arguments as `random_points`."""
    word = 0xFFFFFFFF
    shape = (*ids.shape[:-1], n)
    point = torch.arange(n, device=ids.device).expand(shape)
    sample, prediction, target = (ids[..., i, None].expand(shape) & word for i in range(3))
    key = seed.reshape(()).to(ids.device)
    c, k = [point, target, prediction, sample], [key & word, (key >> 32) & word]
    for _ in range(10):
        # a product of two 32-bit words wraps in int64, but its 64 bits are the right ones
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (p1 >> 32 & word) ^ c[1] ^ k[0],
            p1 & word,
            (p0 >> 32 & word) ^ c[3] ^ k[1],
            p0 & word,
        ]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    return torch.stack((c[0] >> 8, c[1] >> 8), -1).float() * 2.0**-24


def _fake_points(seed: Tensor, ids: Tensor, n: int) -> Tensor:
    return ids.new_empty((*ids.shape[:-1], n, 2), dtype=torch.float32)


_draw = _library.define(
    "random_points(Tensor seed, Tensor ids, SymInt n) -> Tensor",
    _fake_points,
    triton="philox",
    composed=random_points_reference,
)


def random_points(seed: Tensor, ids: Tensor, n: int, impl: str = "kernel") -> Tensor:
    """Uniform points that depend on nothing but seed and counter.

    Args:
        seed: [1] int64; its low and high 32 bits are the key.
        ids: [..., 3] int64: sample id, prediction, target; taken modulo 2^32.
        n: number of points of each id; the counter's first word runs from 0 to n - 1.
        impl: "kernel", or "reference" for plain PyTorch: the same bits.

    Returns:
        [..., n, 2] float32, x then y, in [0, 1), multiples of 2^-24.

    Raises:
        TypeError: no tensor, or not int64.
        ValueError: another shape, or a negative n.
    """
    expect("random_points", "seed", seed, "1", "int64", {})  # on whatever device
    message = f"random_points: ids must be [..., 3] int64, got {got(ids)}"
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(message)
    if ids.ndim < 1 or ids.shape[-1] != 3:
        raise ValueError(message)
    if n < 0:
        raise ValueError(f"random_points: n must be at least 0, got {n}")
    if _library.use_kernel("random_points", impl, ids):
        return _draw(seed.to(ids.device), ids, n)
    return random_points_reference(seed, ids, n)


def point_sample_reference(features: Tensor, points: Tensor) -> Tensor:
    """The specification, in plain PyTorch; arguments as `point_sample`."""
    exact = exact_dtype(features)
    points = points.to(exact).nan_to_num(nan=-1.0, posinf=2.0, neginf=-1.0)  # all outside
    grid = (2 * points - 1).unsqueeze(2)  # [B, P, 1, 2]
    # contiguous: torch's CPU grid_sample has been seen to misread strided half-precision maps
    samples = F.grid_sample(features.to(exact).contiguous(), grid, align_corners=False)
    return samples.squeeze(3).to(features.dtype if features.is_floating_point() else exact)


def _fake(features: Tensor, points: Tensor) -> Tensor:
    dtype = features.dtype if features.is_floating_point() else torch.float32
    return features.new_empty((*features.shape[:2], points.shape[1]), dtype=dtype)


def _fake_backward(grad: Tensor, points: Tensor, h: int, w: int, deterministic: bool) -> Tensor:
    return grad.new_empty((*grad.shape[:2], h, w))


_forward = _library.define(
    "point_sample(Tensor features, Tensor points) -> Tensor", _fake, triton="point_sample"
)
_backward = _library.define(
    "point_sample_backward(Tensor grad, Tensor points, SymInt h, SymInt w, bool deterministic)"
    " -> Tensor",
    _fake_backward,
    triton="point_sample",
)


class _PointSample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, points):
        ctx.save_for_backward(points)
        ctx.size = features.shape[2:]
        return _forward(features, points)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        deterministic = torch.are_deterministic_algorithms_enabled()
        return _backward(grad, *ctx.saved_tensors, *ctx.size, deterministic), None


def point_sample(features: Tensor, points: Tensor, impl: str = "kernel") -> Tensor:
    """Bilinear samples of maps at points.

    Args:
        features: [B, C, h, w] floating, bool or uint8.
        points: [B, P, 2] floating, x then y; 0 and 1 are the outer edges of the map, what lies
            outside reads as zero, NaN as well. Computed in float32 (float64 where the features
            are float64). No gradient flows to the points.
        impl: "kernel", or "reference" for plain PyTorch.

    Returns:
        [B, C, P] in the features' dtype; float32 for bool and uint8.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    sizes = {}
    expect("point_sample", "features", features, "B C h w", "float, bool or uint8", sizes)
    expect("point_sample", "points", points, "B P 2", "float", sizes)
    points = points.detach().to(exact_dtype(features))
    if _library.use_kernel("point_sample", impl, features):
        return _library.applied(_PointSample, features, points)
    return point_sample_reference(features, points)
