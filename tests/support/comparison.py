"""The one comparison of a kernel with its reference: what rounding may move each element by.

The rule, for every element of a result and of a gradient by itself:

    |kernel - exact| <= |exact| ulp / 2 + moved

`exact` is the reference in float64 on the same inputs. The first term is the rounding of the
result to its own precision, which nothing can avoid. `moved` is the condition of that element:
the most that it moves in 16 runs of the float64 reference in which every operation rounds at
random, C times as much as the kernel's precision does (tests/support/rounding.py). It is computed
from the inputs alone, so it is the same on every machine, and knows neither the kernel nor plain
PyTorch.

C = 12 for all. A kernel rounds other values in another order than the reference, so its error is
another draw of the same distribution: about as wide, never beyond a few of its widths. The most
of 16 draws is 1.8 widths and above 0.3 widths but once in 10^10, so that `moved` is 21 widths of
the error for a usual element and 4 for the luckiest one. Where a result jumps (at the zero of a
ReLU, at a choice of points), draws C times as wide jump wherever a kernel may. In float64 the
reference itself is such a draw, and what it may be off by is added.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .rounding import RandomRounding

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
C = 12
RUNS = 16
COARSE = 2.0**20  # float64 is imitated with coarser roundings, far above those of the run itself
shares: list[float] = []  # of `moved` that each comparison used, since a test emptied it


def promote(values, dtype: torch.dtype = torch.float64):
    """The same values with every floating tensor in `dtype`; walks lists, tuples and dicts."""
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, dict):
        return {k: promote(v, dtype) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(promote(v, dtype) for v in values)
    return values


def _unit(dtype: torch.dtype) -> float:
    """Half an ulp of 1: the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


@contextlib.contextmanager
def one_thread():
    """A reference takes one: the other cores run other tests, and threads would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def moved(
    run: Callable[[], Sequence[Tensor | None]],
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
    coarse: float = 1.0,
) -> Iterator[Sequence[Tensor | None]]:
    """The results of `run`, which computes in float64, under C times its rounding, RUNS times.

    Args:
        dtype: the precision of sums that is imitated.
        stored: that of results between operations, where it is another.
        coarse: times the roundings.
    """
    rounding = RandomRounding(*(C * coarse * _unit(t) for t in (dtype, stored or dtype)))
    for _ in range(RUNS):
        with rounding, one_thread():
            results = run()
        yield results


class Yardstick:
    """The exact results of a reference on some inputs, and how far rounding moves each element.

    Args:
        reference: takes `*inputs`, returns a tensor or a tuple of tensors.
        inputs: tensors in the precision under test, and anything else.
        grads: places of the inputs whose gradients are results too.
        stored: the precision in which a kernel keeps what it multiplies, where that is not the
            precision of its sums (float32; float64 for float64 inputs).
        algorithm: the reference's mathematics by the kernel's way in plain PyTorch, where that
            rounds elsewhere than the reference's; it takes the reference's place under rounding.
    """

    def __init__(
        self,
        reference: Callable,
        inputs: Sequence,
        grads: Sequence[int] = (),
        stored: torch.dtype | None = None,
        algorithm: Callable | None = None,
    ):
        exact_inputs = promote(list(inputs))
        floats = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
        dtypes = {t.dtype for t in floats}
        double = dtypes == {torch.float64}
        sums = torch.float64 if double else torch.float32
        coarse = COARSE if double else 1.0

        def run(function):
            return results(function, exact_inputs, grads, floats[0].dtype)

        def most_moved(function):
            most = [torch.zeros_like(t, dtype=torch.float64) for t in self.exact]
            for drawn in moved(lambda: run(function), sums, stored, coarse):
                for m, t, x in zip(most, drawn, self.exact):
                    away = (t - x).double().abs().nan_to_num(0.0, 0.0, 0.0) / coarse
                    torch.maximum(m, away, out=m)
            return most

        with one_thread():
            self.exact = run(reference)
        self.moved = most_moved(algorithm or reference)
        if double:
            own = most_moved(reference) if algorithm else self.moved
            self.moved = [a + b for a, b in zip(self.moved, own)]

    def check(self, actual: Sequence[Tensor], names: Sequence[str] = ()) -> None:
        """Raises AssertionError where an element of `actual` is further away than it may be."""
        assert len(actual) == len(self.exact), f"{len(actual)} results, want {len(self.exact)}"
        for i, (a, x, m) in enumerate(zip(actual, self.exact, self.moved)):
            assert_within(a, x, m, names[i] if names else f"result {i}")


def assert_within(actual: Tensor, exact: Tensor, moved: Tensor, name: str) -> None:
    """Raises AssertionError where `actual` is further from `exact` than rounding explains."""
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, want {exact.shape}"
    if not actual.is_floating_point():
        assert torch.equal(actual, exact.to(actual.dtype)), f"{name}: not equal"
        return
    info = torch.finfo(actual.dtype)
    actual, finite = actual.detach().double(), exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: finite in other places than float64"
    same = finite | (actual == exact) | (actual.isnan() & exact.isnan())
    assert same.all(), f"{name}: not the infinity of float64"
    rounding = exact.abs() * (info.eps / 2) + info.smallest_normal * info.eps  # of subnormals too
    beyond = ((actual - exact).abs() - rounding)[finite].clamp_min(0)
    share = (beyond / moved[finite]).nan_to_num(0.0)  # nothing beyond where nothing moves
    if share.numel() == 0:
        return
    if share.max() > 1:
        at = share.argmax()
        found, want, most = (t[finite][at].item() for t in (actual, exact, moved + rounding))
        raise AssertionError(
            f"{name}: error {abs(found - want):.3e}, allowed {most:.3e}"
            f" (element {at} of the finite ones: {found:.9g}, exact {want:.9g};"
            f" {(share > 1).sum()} of {len(share)} are too far away)"
        )
    shares.append(share.max().item())


def results(function: Callable, inputs: Sequence, grads: Sequence[int], dtype: torch.dtype):
    """The outputs of `function`, and the gradients of a weighted sum of them.

    The weights are the same numbers for every precision: normal, rounded to `dtype`.
    """
    values = [
        v.detach().clone().requires_grad_(i in grads) if isinstance(v, Tensor) else v
        for i, v in enumerate(inputs)
    ]
    outputs = function(*values)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not grads:
        return outputs
    generator = torch.Generator().manual_seed(7)
    floats = [o for o in outputs if o.is_floating_point()]
    weights = [torch.randn(o.shape, generator=generator, device="cpu") for o in floats]
    torch.autograd.backward(floats, [w.to(dtype).to(o) for o, w in zip(floats, weights)])
    return [o.detach() for o in outputs] + [values[i].grad for i in grads]


def assert_same(
    kernel: Callable, other: Callable, inputs: Sequence, grads: Sequence[int] = ()
) -> None:
    """Raises AssertionError unless both give the same bits: the one runs the other."""
    dtype = next(v.dtype for v in inputs if isinstance(v, Tensor) and v.is_floating_point())
    both = (results(f, inputs, grads, dtype) for f in (kernel, other))
    for i, (a, b) in enumerate(zip(*both, strict=True)):
        assert a.dtype == b.dtype, f"result {i}: {a.dtype}, want {b.dtype}"
        assert torch.equal(a, b), f"result {i}: not the same"


def compare(
    kernel: Callable,
    reference: Callable,
    inputs: Sequence,
    grads: Sequence[int] = (),
    stored: torch.dtype | None = None,
    algorithm: Callable | None = None,
) -> None:
    """Runs the kernel on `inputs` and the reference in float64, and compares every element.

    Args:
        kernel, reference: take `*inputs`, return a tensor or a tuple of tensors.
        inputs: tensors in the precision under test, and anything else.
        grads: places of the inputs whose gradients are compared too.
        stored, algorithm: as in `Yardstick`.
    """
    grads = list(grads)
    dtype = next(v.dtype for v in inputs if isinstance(v, Tensor) and v.is_floating_point())
    actual = results(kernel, inputs, grads, dtype)
    outputs = len(actual) - len(grads)
    with torch.no_grad(), one_thread():
        eager = reference(*inputs)
    for i, e in enumerate(eager if isinstance(eager, tuple) else [eager]):
        assert actual[i].dtype == e.dtype, f"output {i}: {actual[i].dtype}, want {e.dtype}"
    names = [f"output {i}" for i in range(outputs)] + [f"gradient of input {i}" for i in grads]
    Yardstick(reference, inputs, grads, stored, algorithm).check(actual, names)
