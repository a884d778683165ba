"""linear_assignment against a loop of SciPy over the same problems (on the CPU on one thread; on a
GPU with the transfers), and against torch-linear-assignment, which needs a GPU to be more than
that loop."""

import pytest
import torch
from _measure import DEVICE, Work, package, pick
from scipy.optimize import linear_sum_assignment

from segkern.ops import linear_assignment
from support.inputs import linear_assignment_inputs

SCIPY = pick("scipy", "scipy", "scipy with its transfers")
IMPLS = ("segkern", SCIPY, "torch-linear-assignment")
CASES = pick(  # N, Q, T
    [(3, 10, 4)],
    [(160, 100, 20), (160, 100, 100), (160, 300, 100)],
    [(10, 100, 20), (160, 100, 20), (160, 100, 50), (160, 100, 100), (160, 300, 100)],
)


def scipys(cost):
    return [linear_sum_assignment(matrix) for matrix in cost.numpy()]


def scipys_with_transfers(cost):
    pairs = [torch.as_tensor(p) for p in scipys(cost.cpu())]  # N times [2, min(Q, T)]
    return torch.stack(pairs).to(cost.device)


def torchs(cost):
    """The package, or why it is not timed."""
    if DEVICE == "cpu":
        return "loops over SciPy without a GPU"
    if not package("torch-linear-assignment"):
        return "not installed (pip install torch-linear-assignment)"
    from torch_linear_assignment import batch_linear_assignment

    return lambda: batch_linear_assignment(cost)


def build(N, Q, T, kind):
    cost, _ = linear_assignment_inputs(N, Q, T, kind, device=DEVICE)
    loop = scipys if DEVICE == "cpu" else scipys_with_transfers
    impls = (lambda: linear_assignment(cost), lambda: loop(cost), torchs(cost))
    threads = 1 if DEVICE == "cpu" else None
    moved = 4 * cost.numel() + 8 * N * (Q + T)
    return Work(dict(zip(IMPLS, impls)), moved, threads=threads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["uniform", "degenerate"])
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: "{}x({}x{})".format(*s))
def test_linear_assignment(sizes, kind, impl, measured):
    case = "{}x({}x{}) {}".format(*sizes, kind)
    measured("linear_assignment", case, "float32", impl, lambda: build(*sizes, kind))
