r"""The likeliest class of each pixel, from small maps of class logits and how they are resized.

    label[b, y, x] = argmax_k sum_{i, j} rows[y, i] maps[b, k, i, j] columns[x, j]

Letters: B image, K class, h w size of the maps, H W size of the result.

Any resize that treats rows and columns apart is such a pair of matrices: bilinear, several of them
one after the other, a crop, the mean over windows that overlap (the maps then stand side by side).
Their entries that are 0 cost nothing. The kernel blends the rows that an output row reads, then
16 pixels at a time over all classes; the resized logits are never stored.
Of equal logits the first wins; NaN never does, and where nothing wins the label is 0. A logit that
is not finite also reaches pixels of its tile or line that give it no weight: 0 times it is NaN.
Bytes: K h w values read, 4 H W written. FLOPs: 2 n K H W with n columns read by 16 pixels (3 or 4
where patches of 16 are resized bilinearly).
Source: Segmenter (Strudel et al., ICCV 2021): its logits go to the image's size before the argmax.
"""

import torch
from torch import Tensor

from . import _library
from ._bands import rows_at_once
from ._checks import exact_dtype, expect


def resize_argmax_reference(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The specification, in plain PyTorch, a band of output rows after another; arguments as
    `resize_argmax`."""
    exact = exact_dtype(maps)
    (B, K, _, _), H, W = maps.shape, rows.shape[0], columns.shape[0]
    step = rows_at_once(maps, B * K * W)
    out = maps.new_empty((B, H, W), dtype=torch.int32)
    with torch.autocast(maps.device.type, enabled=False):
        maps, rows, columns = maps.to(exact), rows.to(exact), columns.to(exact).mT
        for top in range(0, H, step):
            band = torch.einsum("yi,bkij->bkyj", rows[top : top + step], maps) @ columns
            out[:, top : top + step] = band.nan_to_num(nan=-torch.inf).argmax(1)
    return out


def _fake(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return maps.new_empty((maps.shape[0], rows.shape[0], columns.shape[0]), dtype=torch.int32)


_forward = _library.define(
    "resize_argmax(Tensor maps, Tensor rows, Tensor columns) -> Tensor",
    _fake,
    triton="resize_argmax",
)


def resize_argmax(maps: Tensor, rows: Tensor, columns: Tensor, impl: str = "kernel") -> Tensor:
    """The likeliest class of each pixel of resized class logits.

    Args:
        maps: [B, K, h, w] floating: class logits, K at least 1.
        rows: [H, h] floating: how much of each row of the maps an output row takes.
        columns: [W, w] floating: likewise. Both are taken in float32 (float64 where maps is).
        impl: "kernel", or "reference" for plain PyTorch, which holds a band of rows at a time.

    Returns:
        [B, H, W] int32 in [0, K), without gradient; sums are float32 (float64 where maps is).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, or no class.
    """
    sizes = {}
    expect("resize_argmax", "maps", maps, "B K h w", "float", sizes)
    expect("resize_argmax", "rows", rows, "H h", "float", sizes)
    expect("resize_argmax", "columns", columns, "W w", "float", sizes)
    if sizes["K"] == 0:
        raise ValueError("resize_argmax: maps must have at least one class, got K = 0")
    exact = exact_dtype(maps)
    maps, rows, columns = maps.detach(), rows.detach().to(exact), columns.detach().to(exact)
    if _library.use_kernel("resize_argmax", impl, maps):
        return _forward(maps, rows, columns)
    return resize_argmax_reference(maps, rows, columns)
