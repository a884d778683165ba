"""resize_sum: a program takes a tile of pixels and up to 256 channels, and adds up all maps.

Letters: B image, h w size of the result, N = h w pixels, E channels, H W size of another map.

The four values of a map that a pixel reads come from the caches, as its neighbours read them too;
those that have no weight are not read. The gradient of a map is collected by rows and then by
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


SIZES = [f"{side}{l}" for l in range(1, 8) for side in "HW"]


@triton.jit(do_not_specialize=["h", "w", *SIZES])
def _resize_sum(
    x,  # [B, h, w, E]
    bias,  # [E] or None
    out,  # [B, h, w, E]
    h,
    w,
    map1,  # [B, H1, W1, E] or None, and so on
    map2,
    map3,
    map4,
    map5,
    map6,
    map7,
    H1,
    W1,
    H2,
    W2,
    H3,
    W3,
    H4,
    W4,
    H5,
    W5,
    H6,
    W6,
    H7,
    W7,
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
    if map4 is not None:
        value += _resized(map4, image, n, N, h, w, H4, W4, e, E, exact)
    if map5 is not None:
        value += _resized(map5, image, n, N, h, w, H5, W5, e, E, exact)
    if map6 is not None:
        value += _resized(map6, image, n, N, h, w, H6, W6, e, E, exact)
    if map7 is not None:
        value += _resized(map7, image, n, N, h, w, H7, W7, e, E, exact)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    to = out + (image * N + n)[:, None] * E + e[None, :]
    tl.store(to, value, mask=(n < N)[:, None] & (e < E)[None, :])


def _tile(x: Tensor) -> tuple[int, int]:
    """BLOCK_N and BLOCK_E."""
    channels = min(CHANNELS, triton.next_power_of_2(x.shape[3]))
    return VALUES * 4 // max(x.element_size(), 4) // channels, channels


def resize_sum(maps: list[Tensor], bias: Tensor | None, relu: bool) -> Tensor:
    """As `segkern::resize_sum`."""
    x, *others = (m.contiguous() for m in maps)
    (B, h, w, E), tile = x.shape, _tile(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    none = 7 - len(others)
    sizes = [n for m in others for n in m.shape[1:3]]
    exact = tl.float64 if x.dtype == torch.float64 else tl.float32
    with on(x):
        _resize_sum[(B * triton.cdiv(h * w, tile[0]) * triton.cdiv(E, tile[1]),)](
            *(x, bias if bias is None else bias.contiguous(), out, h, w),
            *(*others, *[None] * none, *sizes, *[1] * 2 * none),
            *(relu, E, exact, *tile),
            **OPTIONS,
        )
    return out


def _collect(grad: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The gradient of a map [B, H, W, E] that was resized to [B, h, w, E]."""
    (B, h, w, E), (H, W), tile = grad.shape, size, _tile(grad)
    out = torch.empty((B, H, W, E), dtype=dtype, device=grad.device)
    rows, columns = (math.ceil(2 * n / m) + 2 for n, m in ((h, H), (w, W)))
    across = triton.cdiv(W, tile[0]) * triton.cdiv(E, tile[1])
    of_up[(B * H * across,)](
        *(grad, out, H / h, W / w, h, w, H, W, rows, columns, h * w),
        *(E, tl.float64 if grad.dtype == torch.float64 else tl.float32, *tile),
        **OPTIONS,
        maxnreg=96,  # as group_norm's
    )
    return out


def resize_sum_backward(grad: Tensor, sizes: list[int]) -> list[Tensor]:
    """As `segkern::resize_sum_backward`."""
    grad, found = grad.contiguous(), []
    exact = torch.float64 if grad.dtype == torch.float64 else torch.float32
    for H, W in zip(sizes[::2], sizes[1::2]):
        B, _, w, E = grad.shape
        if B * E == 0:
            found.append(grad.new_empty((B, H, W, E)))
            continue
        with on(grad):
            found.append(_collect(_collect(grad, (H, w), exact), (H, W), grad.dtype))
    return found
