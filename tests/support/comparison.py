"""The one comparison of a kernel with its reference, in float64 and in the kernel's own precision.

The rule: a kernel's error against float64 is at most twice the error of plain PyTorch in the
kernel's own precision, plus the rounding of the result. No tolerance is chosen by hand.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def promote(values, dtype: torch.dtype = torch.float64):
    """The same values with every floating tensor in `dtype`; walks lists, tuples and dicts."""
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, dict):
        return {k: promote(v, dtype) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(promote(v, dtype) for v in values)
    return values


def assert_accurate(actual: Tensor, eager: Tensor, exact: Tensor, name: str = "output") -> None:
    """`max |actual - exact| <= 2 max |eager - exact| + 2 roundings of actual's dtype`.

    Args:
        actual: the kernel's result.
        eager: the reference's result in the same precision; for a float64 kernel, which has no
            better yardstick, the float32 result, whose error is scaled by the ratio of roundings.
        exact: the reference's result in float64 on the same (promoted) inputs.
        name: says which tensor failed.

    Raises:
        AssertionError: another shape, not finite in other places, or too large an error.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, want {exact.shape}"
    if actual.numel() == 0:
        return
    actual, eager, exact = actual.detach(), eager.detach(), exact.detach().double()
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: finite in other places than float64"
    if not finite.any():
        return

    def error(t):
        return (t.double() - exact)[finite].abs().max().item()

    eps = torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0.0
    ratio = eps / torch.finfo(eager.dtype).eps if eager.is_floating_point() else 1.0
    bound = 2 * error(eager) * ratio + 2 * eps * exact[finite].abs().max().item()
    assert error(actual) <= bound, f"{name}: error {error(actual):.3e}, allowed {bound:.3e}"


def compare(
    kernel: Callable, reference: Callable, inputs: Sequence, grads: Sequence[int] = ()
) -> None:
    """Runs kernel and reference on `inputs`, the reference again in float64, and compares.

    Args:
        kernel, reference: take `*inputs`, return a tensor or a tuple of tensors.
        inputs: tensors in the precision under test, and anything else.
        grads: places of the inputs whose gradients are compared too.
    """

    def run(function, values):
        values = [
            v.detach().clone().requires_grad_(i in grads) if isinstance(v, Tensor) else v
            for i, v in enumerate(values)
        ]
        out = function(*values)
        out = out if isinstance(out, tuple) else (out,)
        if grads:
            generator = torch.Generator().manual_seed(7)
            weights = [torch.randn(o.shape, generator=generator, device="cpu") for o in out]
            floats = [(o, w) for o, w in zip(out, weights) if o.is_floating_point()]
            sum((o * w.to(o)).sum() for o, w in floats).backward()
        return out, [values[i].grad for i in grads]

    inputs = list(inputs)
    dtype = next(v.dtype for v in inputs if isinstance(v, Tensor) and v.is_floating_point())
    actual, actual_grads = run(kernel, inputs)
    exact, exact_grads = run(reference, promote(inputs))
    single = promote(inputs, torch.float32) if dtype == torch.float64 else inputs
    eager, eager_grads = run(reference, single)
    for i, (a, e, x) in enumerate(zip(actual, eager, exact)):
        assert a.dtype == (x if dtype == torch.float64 else e).dtype, f"output {i}: {a.dtype}"
        assert_accurate(a, e, x, f"output {i}")
    for i, a, e, x in zip(grads, actual_grads, eager_grads, exact_grads):
        assert_accurate(a, e, x, f"gradient of input {i}")
