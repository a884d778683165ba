"""How far rounding moves each element of a result: a reference run again with random rounding.

The reference runs in float64, and the result of each operation in it is moved at random, by as
much as rounding to a lower precision would (Monte Carlo arithmetic: Parker, 1997). What that does
to an element of the result, over some runs, is the condition of that element: it knows which
terms cancel, what is squared, divided or compared, and where an input hardly matters. Nothing in
it depends on the machine or on another library's order of summation.

How much an operation rounds, in units u of half an ulp (Higham and Mary, 2019, for the sums):
- one result of elementwise arithmetic: u |y|, uniform;
- a sum y of n terms t: u (|y| + sqrt(n) (|y| / 3 + |t|_2 / 4)), what one running sum in any order
  adds up to when roundings are independent; products, convolutions and bilinear samples are such
  sums, also in their gradients;
- softmax and norms: as the operations that they are made of;
- copies, comparisons, choices and indexing: nothing.
"""

import functools
import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# data movement, choices and signs; views are recognised by their schema
EXACT = """
    _local_scalar_dense _to_copy _unsafe_view abs amax amin arange cat ceil clamp clone
    constant_pad_nd copy_ detach empty empty_like eye fill_ flip floor full full_like gather index
    index_select lift_fresh masked_fill masked_fill_ max maximum min minimum nan_to_num neg
    new_empty new_empty_strided new_full new_ones new_zeros one_hot ones ones_like prod relu relu_
    repeat roll round scalar_tensor select_backward sign slice_backward sort stack
    threshold_backward topk where zero_ zeros zeros_like
"""
EXACT = frozenset(EXACT.split())

LEAST = 2.0**-92 / (torch.finfo(torch.float32).eps / 2)  # e^-64, in units of float32

MADE_OF_OTHERS = get_decompositions(
    [
        aten._softmax,
        aten._softmax_backward_data,
        aten.native_group_norm,
        aten.native_group_norm_backward,
        aten.native_layer_norm,
        aten.native_layer_norm_backward,
        aten.sigmoid_backward,
        aten.softplus_backward,
    ]
)


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    closed = (x == -torch.inf).all(dim, keepdim=True)
    return torch.where(closed, torch.zeros_like(x), torch.softmax(x, dim))


MADE_OF_OTHERS[aten._safe_softmax.default] = _safe_softmax


def _sum(y: Tensor, squares: Tensor, n: Tensor | float) -> Tensor:
    """The rounding of sums y of n terms, in u; `squares`: the sums of their squares."""
    root = n**0.5
    return y.abs() * (1 + root / 3) + squares.clamp_min(0).sqrt() * (root / 4)


def _reduced(y, x, *args, **kwargs):
    n = x.numel() / max(y.numel(), 1)
    return _sum(y, aten.sum(x.square(), *args, **kwargs), n)


def _mean(y, x, *args, **kwargs):
    n = x.numel() / max(y.numel(), 1)
    squares = aten.mean(x.square(), *args, **kwargs) / max(n, 1)
    return _sum(y, squares, n)


def _variance_and_mean(ys, x, dims, *args, **kwargs):
    n, (variance, mean) = x.numel() / max(ys[0].numel(), 1), ys
    away = x - x.mean(dims, keepdim=True)
    fourth, second = ((t.mean(dims) / max(n, 1)).view_as(mean) for t in (away**4, x.square()))
    return [2 * _sum(variance, fourth, n), _sum(mean, second, n)]


def _product(y, a, b):
    return _sum(y, a.square() @ b.square(), a.shape[-1])


def _shifted_product(y, c, a, b):
    return _sum(y, a.square() @ b.square() + c.square(), a.shape[-1] + 1)


def _convolution(y, x, weight, bias, *rest):
    assert bias is None
    squares = aten.convolution(x.square(), weight.square(), None, *rest)
    return _sum(y, squares, weight[:1].numel())


def _convolution_backward(ys, grad, x, weight, *rest):
    squares = aten.convolution_backward(grad.square(), x.square(), weight.square(), *rest)
    pixels = grad.numel() / max(grad.shape[1], 1)
    groups = rest[-2]
    counts = (weight.numel() / max(weight.shape[1] * groups, 1), pixels, pixels)
    parts = zip(ys, squares, counts)
    return [None if y is None else _sum(y, s, n) for y, s, n in parts]


def _samples(y, x, *rest):
    return 3 * aten.grid_sampler_2d(x.abs(), *rest)


def _samples_backward(ys, grad, x, grid, *rest):
    squares, _ = aten.grid_sampler_2d_backward(grad.square(), x, grid, *rest)
    counts, _ = aten.grid_sampler_2d_backward(torch.ones_like(grad), x, grid, *rest)
    return [2 * _sum(ys[0], squares, counts.clamp_min(1)), ys[1].abs()]


def _put(y, x, places, values, accumulate=False):
    if not accumulate:
        return torch.zeros_like(y)
    squares = aten.index_put(x.square(), places, values.square(), True)
    counts = aten.index_put(torch.ones_like(x), places, torch.ones_like(values), True)
    return _sum(y, squares, counts)


def _exp(y, x):  # weights of a softmax that are next to nothing may be nothing
    return y.abs() + LEAST


def _gelu(y, x, **kwargs):  # x (1 + erf(x)) / 2, whose sum cancels for negative x
    return x.abs()


def _gelu_backward(y, grad, x, **kwargs):
    return grad.abs() * (1 + x.abs() * torch.exp(-x.square() / 2))


RULES = {
    "sum": _reduced,
    "mean": _mean,
    "var_mean": _variance_and_mean,
    "mm": _product,
    "bmm": _product,
    "addmm": _shifted_product,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "grid_sampler_2d": _samples,
    "grid_sampler_2d_backward": _samples_backward,
    "index_put": _put,
    "exp": _exp,
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
}


@functools.cache
def _pool() -> Tensor:
    """Uniform numbers in [-1, 1), of which an operation takes some in a row, from any place on."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2**22, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1


@functools.cache
def _parts_of(func) -> Callable | None:
    """What computes `func` by other operations, if anything does."""
    return MADE_OF_OTHERS.get(func, func.decompose if func._can_decompose() else None)


class RandomRounding(TorchDispatchMode):
    """Every float64 result inside the block is moved by rounding of unit `unit`.

    It may be entered several times around the same computation: how much each operation rounds is
    taken from the first time, as it hardly differs, and the moves are drawn anew.

    Args:
        unit: half an ulp of 1 in the precision that is imitated, for sums and coordinates.
        stored: the same for results that are kept in another precision than sums.
    """

    def __init__(self, unit: float, stored: float | None = None):
        super().__init__()
        self.unit, self.stored = unit, unit if stored is None else stored
        self.random = random.Random(0)
        self.sizes: list[Tensor] = []  # of the moves, in the order of the operations
        self.done = 0

    def __enter__(self):
        self.done = 0
        return super().__enter__()

    def _move(self, y: Tensor, size: Callable[[], Tensor]) -> None:
        """Moves y by up to size(), which is asked for the first time only."""
        if self.done == len(self.sizes):
            self.sizes.append(size().nan_to_num(0, 0, 0))
        size = self.sizes[self.done]
        self.done += 1
        n, pool = y.numel(), _pool()
        if n > len(pool):
            pool = pool.repeat(n // len(pool) + 1)
        start = self.random.randrange(len(pool) - n + 1)
        y.addcmul_(pool[start : start + n].view(y.shape).to(y.device), size)

    def _resized(self, x, size, *rest, back) -> Tensor:
        """Bilinear resizing or its transpose; weights are fractions of places, which round."""
        x_size, corners = (rest[0][2:], rest[1]) if back else (x.shape[2:], rest[0])
        assert not corners, "align_corners is not known here"
        sides = []
        for n, out in zip(x_size, size):
            place = ((torch.arange(out, dtype=x.dtype, device=x.device) + 0.5) * n / out) - 0.5
            self._move(place, lambda place=place: self.unit * (1 + place.abs()))
            away = place.clamp(0, n - 1)[:, None] - torch.arange(n, device=x.device)
            sides.append((1 - away.abs()).clamp_min(0))  # [out, n]
        rows, columns = (s.mT for s in sides) if back else sides
        y = rows @ x @ columns.mT
        self._move(y, lambda: 3 * self.unit * (rows @ x.abs() @ columns.mT) + self._extra(y))
        return y

    def _extra(self, y: Tensor) -> Tensor:
        return (self.stored - self.unit) * y.abs()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        parts = _parts_of(func)
        if parts is not None:
            done = self.done
            with self:  # which begins anew
                self.done = done
                return parts(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "grid_sampler_2d":
            x, grid, *rest = args
            grid = grid.clone()
            self._move(grid, lambda: self.unit * (1 + grid.abs()))
            args = (x, grid, *rest)
        if name in ("upsample_bilinear2d", "upsample_bilinear2d_backward"):
            return self._resized(*args, back=name.endswith("backward"))
        y = func(*args, **kwargs)
        if name in EXACT or func.is_view or not _floating(y):
            return y
        if name not in RULES:
            # a whole number comes of whole numbers: places and counts are exact
            self._move(y, lambda: (self.stored * y.abs()).masked_fill_(y == y.round(), 0))
            return y
        parts = y if isinstance(y, tuple) else (y,)
        sizes = None

        def size(i):
            nonlocal sizes
            sizes = RULES[name](y, *args, **kwargs) if sizes is None else sizes
            size = sizes[i] if isinstance(y, tuple) else sizes
            return self.unit * size + self._extra(parts[i])

        for i, part in enumerate(parts):
            if part is not None:
                self._move(part, lambda i=i: size(i))
        return y


def _floating(y) -> bool:
    first = y[0] if isinstance(y, (tuple, list)) else y
    return isinstance(first, Tensor) and first.dtype == torch.float64
