"""linear_assignment against a loop of SciPy over the same problems, on one thread."""

import torch
from _rows import main, measure
from scipy.optimize import linear_sum_assignment

from segkern.ops import linear_assignment
from segkern.testing import linear_assignment_inputs

CASES = [(160, 100, 20), (160, 100, 100), (160, 300, 100)]


def run(runs: int) -> list[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for N, Q, T in CASES:
        for kind in ("uniform", "degenerate"):
            cost, _ = linear_assignment_inputs(N, Q, T, kind)
            matrices = cost.numpy()
            impls = {
                "segkern": lambda c=cost: linear_assignment(c),
                "scipy": lambda m=matrices: [linear_sum_assignment(x) for x in m],
            }
            rows += measure("linear_assignment", f"{N}x({Q}x{T}) {kind}", "float32", impls, runs)
    torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    main(run, __doc__)
