r"""The cheapest one-to-one assignment of queries to targets, for many problems at once.

    minimise  sum over matched pairs of cost[n, q, t],  with min(Q, n_targets[n]) pairs

Letters: N problem (any leading dimensions), Q query, T target.

Shortest augmenting paths. The smaller side of a problem gives the rows.
1. Duals: u = row minima, v = 0; a row whose minimum lies in a free column takes it.
2. Every other row grows a tree of shortest reduced distances (cost - u - v >= 0, Dijkstra) until
   it meets a free column; ties go to free columns first.
3. Duals of the tree move by the distance that was left, the path is flipped.
All of it in float64 whatever the costs, so that potentials of large costs cannot overflow.
Bytes: one read of the costs; FLOPs: about 3 a column and step, with min(Q, T) to a hundred times
that many steps (trained costs are near the low end, a_i + b_j + noise near the high one).

Source: Crouse, "On implementing 2D rectangular assignment algorithms", IEEE TAES 2016; Jonker and
Volgenant, Computing 1987.
Differs: row minima to start from (three to six times fewer steps on trained costs), ragged
batches, and a status for each problem instead of an error in the middle of a batch.
"""

import torch
from torch import Tensor

from . import _library
from ._checks import got

PROBLEMS = {1: "the costs hold NaN or -inf", 2: "+inf forbids every full assignment"}


def linear_assignment_reference(
    cost: Tensor, n_targets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification: SciPy, a problem at a time; the third tensor is the status."""
    from scipy.optimize import linear_sum_assignment

    lead, (Q, T) = cost.shape[:-2], cost.shape[-2:]
    costs = cost.detach().reshape(lead.numel(), Q, T).double().cpu().numpy()
    counts = [T] * len(costs) if n_targets is None else n_targets.reshape(-1).clamp(0, T).tolist()
    # beside SciPy's results, whatever the default device
    query_of_target = torch.full((len(costs), T), -1, device="cpu")
    target_of_query = torch.full((len(costs), Q), -1, device="cpu")
    status = torch.zeros(len(costs), dtype=torch.int32, device="cpu")
    for k, (matrix, n) in enumerate(zip(costs, counts)):
        matrix = matrix[:, :n]
        if not (matrix > -float("inf")).all():  # false for NaN too
            status[k] = 1
            continue
        try:
            queries, targets = map(torch.from_numpy, linear_sum_assignment(matrix))
        except ValueError:
            status[k] = 2
            continue
        query_of_target[k, targets] = queries
        target_of_query[k, queries] = targets
    found = query_of_target.view(*lead, T), target_of_query.view(*lead, Q), status.view(lead)
    return tuple(t.to(cost.device) for t in found)


def _fake(cost: Tensor, n_targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    *lead, Q, T = cost.shape
    return (
        cost.new_empty((*lead, T), dtype=torch.int64),
        cost.new_empty((*lead, Q), dtype=torch.int64),
        cost.new_empty(lead, dtype=torch.int32),
    )


_forward = _library.define(
    "linear_assignment(Tensor cost, Tensor? n_targets) -> (Tensor, Tensor, Tensor)", _fake
)


def _check_arguments(cost: Tensor, n_targets: Tensor | None) -> None:
    if not isinstance(cost, Tensor) or not cost.is_floating_point():
        raise TypeError(f"linear_assignment: cost must be [..., Q, T] float, got {got(cost)}")
    if cost.ndim < 2:
        raise ValueError(f"linear_assignment: cost must be [..., Q, T] float, got {got(cost)}")
    if n_targets is None:
        return
    want = f"linear_assignment: n_targets must be {list(cost.shape[:-2])} int64"
    if not isinstance(n_targets, Tensor) or n_targets.dtype != torch.int64:
        raise TypeError(f"{want}, got {got(n_targets)}")
    if n_targets.shape != cost.shape[:-2]:
        raise ValueError(f"{want}, got {got(n_targets)}")
    if n_targets.device != cost.device:
        raise ValueError(f"{want} on {cost.device}, got {n_targets.device}")


def _check_counts(n_targets: Tensor, T: int) -> None:
    wrong = n_targets[(n_targets < 0) | (n_targets > T)]
    if len(wrong):
        raise ValueError(
            f"linear_assignment: n_targets must be from 0 to T = {T}, got {wrong[0].item()}"
        )


def _check_status(status: Tensor) -> None:
    if status.any():
        place = tuple(status.nonzero()[0].tolist())
        raise ValueError(
            f"linear_assignment: problem {list(place)} cannot be solved: "
            f"{PROBLEMS[status[place].item()]}"
        )


def linear_assignment(
    cost: Tensor,
    n_targets: Tensor | None = None,
    check: bool | None = None,
    impl: str = "kernel",
) -> tuple[Tensor, Tensor]:
    """Matches queries and targets one to one at the least total cost.

    Optimal as SciPy's linear_sum_assignment; where several assignments are optimal it may be
    another one. No gradient.

    Args:
        cost: [..., Q, T] floating; +inf forbids a pair. Solved in float64.
        n_targets: [...] int64, from 0 to T: the targets t >= n_targets of a problem do not take
            part; None for all T. Out of range is an error on the CPU in eager mode and clamped
            elsewhere.
        check: raise if a problem has no solution. None: on the CPU in eager mode only, because
            elsewhere reading the status synchronises (and True cannot be compiled). The raw op
            torch.ops.segkern.linear_assignment returns the status as a third tensor, [...] int32:
            0 solved, 1 NaN or -inf among the costs, 2 +inf forbids every full assignment.
        impl: "kernel", or "reference" for SciPy.

    Returns:
        query_of_target [..., T] and target_of_query [..., Q], int64, -1 where there is none;
        min(Q, n_targets) pairs a problem, no pair in a problem that has no solution.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; a problem without solution (see
            `check`).
    """
    _check_arguments(cost, n_targets)
    eager = cost.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager and n_targets is not None:
        _check_counts(n_targets, cost.shape[-1])
    kernel = _library.use_kernel("linear_assignment", impl, cost)
    solve = _forward if kernel else linear_assignment_reference
    query_of_target, target_of_query, status = solve(cost.detach(), n_targets)
    if eager if check is None else check:
        _check_status(status)
    return query_of_target, target_of_query
