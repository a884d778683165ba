"""resize_sum: a program takes a tile of pixels and up to 256 channels, and adds up four maps.

Letters: B image, h w size of the result, N = h w pixels, E channels, H W size of another map.

The four values of a map that a pixel reads come from the caches, as its neighbours read them too;
those that have no weight are not read. Of more maps the sum so far is kept in its own precision
and goes through the kernel again. The gradient of a map is collected by rows and then by
columns, by the kernel that does so for group_norm.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FUSED, on
from .group_norm_backward import of_up
from .group_norm_forward import corners_of, load

# Chosen by arithmetic, not yet measured: 16 sums a thread, as group_norm's
VALUES = 4096  # of a tile; half as many in float64
CHANNELS = 256  # of a program
TOGETHER = 3  # maps resized at a time: those of a pyramid beside its first
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
OPTIONS = {"num_warps": 8, "num_stages": 1, **FUSED}


@triton.jit
def _resized(map, image, n, N, h, w, H, W, e, E: tl.constexpr, exact: tl.constexpr):
    """What pixels n of the result read of a map [B, H, W, E]."""
    top, bottom, y = corners_of(n // w, H.to(exact) / h.to(exact), H)
    left, right, z = corners_of(n % w, W.to(exact) / w.to(exact), W)
    real, lower, further = n < N, (n < N) & (y != 0), z != 0
    top, bottom = (image * H + top) * W, (image * H + bottom) * W
    value = ((1 - y) * (1 - z))[:, None] * load(map, top + left, real, e, E, exact)
    value += ((1 - y) * z)[:, None] * load(map, top + right, real & further, e, E, exact)
    value += (y * (1 - z))[:, None] * load(map, bottom + left, lower, e, E, exact)
    value += (y * z)[:, None] * load(map, bottom + right, lower & further, e, E, exact)
    return value


@triton.jit(do_not_specialize=["h", "w", "H1", "W1", "H2", "W2", "H3", "W3"])
def _resize_sum(
    x,  # [B, h, w, E]
    bias,  # [E] or None
    out,  # [B, h, w, E]
    h,
    w,
    map1,  # [B, H1, W1, E] or None, and so on
    map2,
    map3,
    H1,
    W1,
    H2,
    W2,
    H3,
    W3,
    RELU: tl.constexpr,
    E: tl.constexpr,
    exact: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    blocks: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    N = h * w
    program = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_N)
    image = (program // blocks // tiles).to(tl.int64)
    e = program % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    n = program // blocks % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    value = load(x, image * N + n, n < N, e, E, exact)
    if bias is not None:
        value += tl.load(bias + e, e < E, 0.0).to(exact)[None, :]
    if map1 is not None:
        value += _resized(map1, image, n, N, h, w, H1, W1, e, E, exact)
    if map2 is not None:
        value += _resized(map2, image, n, N, h, w, H2, W2, e, E, exact)
    if map3 is not None:
        value += _resized(map3, image, n, N, h, w, H3, W3, e, E, exact)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    to = out + (image * N + n)[:, None] * E + e[None, :]
    tl.store(to, value, mask=(n < N)[:, None] & (e < E)[None, :])


def _exact(x: Tensor) -> torch.dtype:
    """Of sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tile(x: Tensor) -> tuple[int, int]:
    """BLOCK_N and BLOCK_E."""
    channels = min(CHANNELS, triton.next_power_of_2(x.shape[3]))
    return VALUES * 4 // max(x.element_size(), 4) // channels, channels


def resize_sum(maps: list[Tensor], bias: Tensor | None, relu: bool) -> Tensor:
    """As `segkern::resize_sum`."""
    total, *others = (x.contiguous() for x in maps)
    (B, h, w, E), dtype, tile = total.shape, total.dtype, _tile(total)
    if total.numel() == 0:
        return torch.empty(total.shape, dtype=dtype, device=total.device)
    exact = _exact(total)
    bias = bias if bias is None else bias.contiguous()
    for start in range(0, max(len(others), 1), TOGETHER):
        some, last = others[start : start + TOGETHER], start + TOGETHER >= len(others)
        none = TOGETHER - len(some)
        sizes = [n for x in some for n in x.shape[1:3]] + [1] * 2 * none
        kind = dtype if last else exact
        out = torch.empty(total.shape, dtype=kind, device=total.device)
        with on(total):
            _resize_sum[(B * triton.cdiv(h * w, tile[0]) * triton.cdiv(E, tile[1]),)](
                *(total, bias if last else None, out, h, w, *some, *[None] * none, *sizes),
                *(last and relu, E, TYPES[exact], *tile),
                **OPTIONS,
            )
        total = out
    return total


def _collect(grad: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The gradient of a map [B, H, W, E] that was resized to [B, h, w, E]."""
    (B, h, w, E), (H, W), tile = grad.shape, size, _tile(grad)
    out = torch.empty((B, H, W, E), dtype=dtype, device=grad.device)
    rows, columns = (math.ceil(2 * n / m) + 2 for n, m in ((h, H), (w, W)))
    across = triton.cdiv(W, tile[0]) * triton.cdiv(E, tile[1])
    of_up[(B * H * across,)](
        *(grad, out, H / h, W / w, h, w, H, W, rows, columns, h * w),
        *(E, TYPES[_exact(grad)], *tile),
        **OPTIONS,
        maxnreg=96,  # as group_norm's
    )
    return out


def resize_sum_backward(grad: Tensor, sizes: list[int]) -> list[Tensor]:
    """As `segkern::resize_sum_backward`."""
    grad, found = grad.contiguous(), []
    exact = _exact(grad)
    for H, W in zip(sizes[::2], sizes[1::2]):
        B, _, w, E = grad.shape
        if B * E == 0:
            found.append(grad.new_empty((B, H, W, E)))
            continue
        with on(grad):
            found.append(_collect(_collect(grad, (H, w), exact), (H, W), grad.dtype))
    return found
