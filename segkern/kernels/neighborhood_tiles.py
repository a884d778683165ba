"""What the kernels of neighborhood_attn share: tiles of a map's groups, and who attends to whom.

Letters as in neighborhood_attn.py. Along an axis of a group, place p of n attends to the places s
to s + K - 1, s = clamp(p - K div 2, 0, n - K).
"""

import triton
import triton.language as tl

ACROSS = tl.constexpr(8)  # places of a tile's row
# arguments that are never specialised
SIZES = ["h", "w", "H", "Ky", "Kx", "ty", "tx", "rows", "columns", "N", "run"]
SIZES += ["q_step", "k_step", "v_step"]


@triton.jit
def tile_at(tile, h, w, ty, tx, rows, columns, TALL: tl.constexpr):
    """Where a tile of TALL x ACROSS places lies.

    Args:
        tile: its number, of image, group of rows, group of columns, row and column of tiles.
        rows, columns: of the tiles of a group; some of a smaller group are empty.

    Returns:
        its image (int64), the group of its rows and how many places that has, the same of its
        columns, and the row and column of its first place.
    """
    column, rest = tile % columns, tile // columns
    row, rest = rest % rows, rest // rows
    gx, rest = rest % tx, rest // tx
    gy, image = rest % ty, rest // ty
    ny, nx = (h - gy + ty - 1) // ty, (w - gx + tx - 1) // tx
    return image.to(tl.int64), gy, ny, gx, nx, row * TALL, column * ACROSS


@triton.jit
def first_key(p, n, K):
    return tl.minimum(tl.maximum(p - K // 2, 0), n - K)


@triton.jit
def first_query(key, K):
    """The first place that attends to `key`."""
    return tl.where(key < K, 0, key - K // 2)


@triton.jit
def last_query(key, n, K):
    return tl.where(key >= n - K, n - 1, key + K // 2)


@triton.jit
def pixels(y, x, gy, gx, ty, tx, w):
    """Pixels of places y and x of a group."""
    return (y * ty + gy) * w + x * tx + gx


@triton.jit
def related(py, px, ky, kx, ny, nx, Ky, Kx):
    """Of queries and keys that broadcast to each other whether one attends to the other, and the
    element of the bias that belongs to the two."""
    dy, dx = ky - first_key(py, ny, Ky), kx - first_key(px, nx, Kx)
    near = (dy >= 0) & (dy < Ky) & (dx >= 0) & (dx < Kx)
    return near, (ky - py + Ky - 1) * (2 * Kx - 1) + kx - px + Kx - 1
