"""linear_assignment: total cost equal to SciPy's, whatever the costs; never indices, which ties
leave open."""

import pytest
import torch

from segkern.ops import linear_assignment
from segkern.ops.linear_assignment import linear_assignment_reference
from support.comparison import DTYPES
from support.inputs import linear_assignment_inputs

INF, NAN = float("inf"), float("nan")
KINDS = (
    "uniform",
    "integers",
    "constant rows",
    "constant",
    "small",
    "large",
    "forbidden",
    "degenerate",
)
SIZES = {  # N, Q, T: 276 matrices of each of the eight kinds
    "100x20": (40, 100, 20),
    "20x100, fewer queries": (40, 20, 100),
    "30x30, square": (40, 30, 30),
    "9x5": (150, 9, 5),
    "64x8, whole lines": (2, 64, 8),
    "1x1": (2, 1, 1),
    "4x0, no target": (2, 4, 0),
}


def totals(cost, query_of_target):
    """Total cost [N] in float64 of the pairs of query_of_target [N, T]."""
    pairs = cost.double().gather(1, query_of_target.clamp(min=0)[:, None])[:, 0]
    return pairs.masked_fill(query_of_target < 0, 0.0).sum(-1)


def assert_optimal(cost, counts, found, wanted):
    """Pairs are one to one, as many as can be, and cost what the reference's pairs cost."""
    (query, target), (N, Q, T) = found, cost.shape
    n = torch.full((N,), T) if counts is None else counts
    assert query.dtype == target.dtype == torch.int64
    assert torch.equal((query >= 0).sum(-1), n.clamp(max=Q))
    assert torch.equal((target >= 0).sum(-1), n.clamp(max=Q))
    assert (query.masked_fill(torch.arange(T) < n[:, None], -1) == -1).all()
    k, t = (query >= 0).nonzero(as_tuple=True)
    assert torch.equal(target[k, query[k, t]], t)
    ours, best = totals(cost, query), totals(cost, wanted[0])
    # the rounding of a sum of Q costs and of the duals behind it
    scale = cost.double().masked_fill(cost.isinf(), 0.0).abs().sum(1).amax(-1) if T else best
    assert ((ours - best).abs() <= 1e-14 * scale).all(), (ours - best).abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_costs_what_scipy_costs(size, kind):
    cost, counts = linear_assignment_inputs(*SIZES[size], kind, dtype=torch.float64)
    for n in (None, counts):
        *wanted, status = linear_assignment_reference(cost, n)
        assert not status.any()
        assert_optimal(cost, n, linear_assignment(cost, n), wanted)


@pytest.mark.parametrize("kind", ["uniform", "degenerate"])
def test_the_largest_ragged_batch(kind):
    """More problems than an H200 has multiprocessors: two then share one's memory."""
    N = 160 if kind == "uniform" else 16
    cost, counts = linear_assignment_inputs(N, 300, 100, kind)
    wanted = linear_assignment_reference(cost, counts)[:2]
    assert_optimal(cost, counts, linear_assignment(cost, counts), wanted)


WAYS = {  # N, Q, T: the ways in which the CUDA kernel lays out a problem of some size
    "one column a lane": (3, 30, 12),
    "two columns a lane": (3, 12, 50),
    "four columns a lane": (3, 100, 40),
    "four columns a lane, in float": (2, 121, 119),
    "eight columns a lane": (2, 9, 250),
    "eight columns a lane, in float": (2, 180, 150),
    "many problems": (400, 7, 5),
    "a block, two columns a thread": (2, 40, 300),
    "a block, two columns a thread, in float": (2, 301, 100),
    "a block, its last costs in global memory": (2, 260, 250),
    "a block, four columns a thread": (2, 600, 20),
    "a block, four columns a thread, its last costs in global memory": (2, 100, 700),
    "a block, eight columns a thread": (2, 1100, 5),
    "a block, eight columns a thread, its last costs in global memory": (1, 45, 1500),
    "all in global memory": (2, 2100, 30),
    "all in global memory, fewer queries": (2, 6, 2600),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_size_costs_what_scipy_costs(way, dtype):
    N, Q, T = WAYS[way]
    kind = "degenerate" if min(Q, T) <= 45 else "integers"  # long paths; or many short ones
    cost, counts = linear_assignment_inputs(N, Q, T, kind, dtype=dtype)
    counts[0] = T
    wanted = linear_assignment_reference(cost, counts)[:2]
    assert_optimal(cost, counts, linear_assignment(cost, counts), wanted)


@pytest.mark.parametrize("kilobytes", [64, 99, 163])
@pytest.mark.parametrize("way", WAYS)
def test_every_size_on_gpus_with_less_shared_memory(way, kilobytes, monkeypatch):
    monkeypatch.setenv("SEGKERN_SHARED_KB", str(kilobytes))  # read by the emulated kernels alone
    N, Q, T = WAYS[way]
    cost, counts = linear_assignment_inputs(min(N, 2), Q, T)
    wanted = linear_assignment_reference(cost, counts)[:2]
    assert_optimal(cost, counts, linear_assignment(cost, counts), wanted)


@pytest.mark.parametrize(
    "shape", [(225, 25), (176, 32), (290, 20), (320, 18), (358, 16), (16, 360)], ids=str
)
def test_sizes_that_need_just_under_48_kilobytes_of_shared_memory(shape):
    """With the static memory of the CUDA kernel it is more, and more has to be asked for."""
    cost, _ = linear_assignment_inputs(8, *shape)
    wanted = linear_assignment_reference(cost)[:2]
    assert_optimal(cost, None, linear_assignment(cost), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_solved_in_double(dtype):
    cost, counts = linear_assignment_inputs(20, 40, 15, dtype=dtype)
    wanted = linear_assignment_reference(cost, counts)[:2]
    assert_optimal(cost, counts, linear_assignment(cost, counts), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_number_does_not_overflow(dtype):
    cost = torch.full((3, 3), torch.finfo(dtype).max, dtype=dtype).fill_diagonal_(0)
    assert linear_assignment(cost)[0].tolist() == [0, 1, 2]
    assert linear_assignment(cost.fill_(torch.finfo(dtype).max))[0].sort()[0].tolist() == [0, 1, 2]


def test_integers_are_exact():
    cost, _ = linear_assignment_inputs(50, 30, 20, "integers")
    query, _ = linear_assignment(cost)
    assert torch.equal(totals(cost, query), totals(cost, linear_assignment_reference(cost)[0]))


def test_a_forbidden_pair_is_never_taken():
    cost = torch.tensor([[INF, 1.0], [2.0, INF], [INF, 0.5]])
    query, target = linear_assignment(cost)
    assert query.tolist() == [1, 2]
    assert target.tolist() == [-1, 0, 1]


# cost, status
UNSOLVED = {
    "NaN": ([[NAN, 1.0], [1.0, 1.0]], 1),
    "-inf": ([[1.0, 1.0], [1.0, -INF]], 1),
    "NaN and +inf": ([[INF, INF], [1.0, NAN]], 1),
    "row of +inf": ([[INF, INF], [1.0, 1.0]], 2),
    "column of +inf": ([[INF, 1.0], [INF, 1.0]], 2),
    "one column for two rows": ([[1.0, INF, INF], [2.0, INF, INF], [1.0, 1.0, 1.0]], 2),
}


@pytest.mark.parametrize("case", UNSOLVED)
def test_a_problem_without_solution_leaves_the_others_alone(case):
    matrix, want = UNSOLVED[case]
    bad = torch.tensor(matrix)
    good = torch.rand(2, *bad.shape)
    cost = torch.stack((good[0], bad, good[1]))
    for solve in (torch.ops.segkern.linear_assignment, linear_assignment_reference):
        query, target, status = solve(cost, None)
        assert status.tolist() == [0, want, 0]
        assert status.dtype == torch.int32
        assert (query[1] == -1).all()
        assert (target[1] == -1).all()
        assert (query[[0, 2]] >= 0).all()
    for impl in ("kernel", "reference"):
        with pytest.raises(ValueError, match=r"problem \[1\] cannot be solved: "):
            linear_assignment(cost, check=True, impl=impl)
    query, target = linear_assignment(cost, check=False)
    assert (query[1] == -1).all()
    assert (target[1] == -1).all()


@pytest.mark.parametrize("shape", [(30, 5), (5, 300), (2100, 5)], ids=str)
def test_a_large_problem_without_solution(shape):
    cost = torch.rand(3, *shape)
    rows = cost if shape[0] < shape[1] else cost.mT
    rows[1, 2:4] = INF
    rows[1, 2:4, 7] = 1.0  # one column for two rows
    for want in (2, 1):
        query, target, status = torch.ops.segkern.linear_assignment(cost, None)
        assert status.tolist() == [0, want, 0]
        assert (query[1] == -1).all()
        assert (target[1] == -1).all()
        assert ((query[[0, 2]] >= 0).sum(-1) == 5).all()
        cost[1, -1, -1] = NAN


@pytest.mark.cpu_only  # elsewhere nothing is checked unless asked for
def test_the_first_bad_problem_is_named():
    cost = torch.rand(2, 3, 4, 4)
    cost[1, 1, 0, 0] = NAN
    cost[1, 2] = INF
    with pytest.raises(ValueError, match=r"problem \[1, 1\] .* the costs hold NaN or -inf"):
        linear_assignment(cost)
    cost[0, 2] = INF
    with pytest.raises(ValueError, match=r"problem \[0, 2\] .* \+inf forbids every full"):
        linear_assignment(cost, check=True)


def test_padded_targets_are_not_looked_at():
    cost, _ = linear_assignment_inputs(3, 9, 6)
    counts = torch.tensor([0, 4, 6])
    want = linear_assignment(cost, counts)
    for k, n in enumerate(counts.tolist()):
        cost[k, :, n:] = NAN
    for got, w in zip(linear_assignment(cost, counts), want):
        assert torch.equal(got, w)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(lead):
    cost = torch.rand(*lead, 7, 5)
    counts = torch.randint(0, 6, lead)
    query, target = linear_assignment(cost, counts)
    assert query.shape == (*lead, 5)
    assert target.shape == (*lead, 7)
    flat = linear_assignment(cost.reshape(-1, 7, 5), counts.reshape(-1))
    assert torch.equal(query.reshape(-1, 5), flat[0])
    assert torch.equal(target.reshape(-1, 7), flat[1])


@pytest.mark.parametrize(
    "shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (2, 0, 0)], ids=lambda s: "x".join(map(str, s))
)
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_empty(shape, impl):
    query, target = linear_assignment(torch.zeros(shape), impl=impl)
    assert torch.equal(query, torch.full((shape[0], shape[2]), -1))
    assert torch.equal(target, torch.full((shape[0], shape[1]), -1))


def test_non_contiguous():
    cost, counts = linear_assignment_inputs(6, 11, 8)
    strided = cost.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    spread = counts.repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    assert not spread.is_contiguous()
    for got, want in zip(linear_assignment(strided, spread), linear_assignment(cost, counts)):
        assert torch.equal(got, want)


@pytest.mark.cpu_only
def test_one_thread_and_two_agree():
    cost, counts = linear_assignment_inputs(64, 50, 40, "integers")
    two = linear_assignment(cost, counts)
    torch.set_num_threads(1)
    for got, want in zip(linear_assignment(cost, counts), two):
        assert torch.equal(got, want)


def test_no_gradient():
    cost, counts = linear_assignment_inputs()
    for got in linear_assignment(cost.requires_grad_(), counts):
        assert not got.requires_grad


@pytest.mark.parametrize("kind", ["uniform", "forbidden"])
def test_opcheck(kind):
    cost, counts = linear_assignment_inputs(kind=kind)
    torch.library.opcheck(torch.ops.segkern.linear_assignment, (cost, counts))
    torch.library.opcheck(torch.ops.segkern.linear_assignment, (cost.half(), None))


def test_compile():
    cost, counts = linear_assignment_inputs()
    compiled = torch.compile(linear_assignment, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(cost, counts), linear_assignment(cost, counts)):
        assert torch.equal(got, want)
    # nothing is raised where nothing may be read: a bad problem is -1
    query, target = compiled(cost.fill_(NAN), counts.fill_(7))
    assert (query == -1).all()
    assert (target == -1).all()


BAD = {
    "int64": (
        lambda c, n: (c.long(), n),
        TypeError,
        r"cost must be \[\.\.\., Q, T\] float, got \[",
    ),
    "no tensor": (lambda c, n: ([1.0], n), TypeError, "cost must be .* got list"),
    "1-d": (lambda c, n: (c[0, 0], None), ValueError, r"cost must be .* got \[7\] float32"),
    "counts int32": (
        lambda c, n: (c, n.int()),
        TypeError,
        r"n_targets must be \[5\] int64, got \[5\] int32",
    ),
    "counts list": (lambda c, n: (c, [1] * 5), TypeError, "n_targets must be .* got list"),
    "counts of another batch": (
        lambda c, n: (c, n[:4]),
        ValueError,
        r"n_targets must be \[5\] int64, got \[4\]",
    ),
    "counts elsewhere": (
        lambda c, n: (c, n.to("meta")),
        ValueError,
        r"n_targets must be .* on \S+, got meta",
    ),
    "unknown impl": (lambda c, n: (c, n, None, "fast"), ValueError, "impl must be 'kernel'"),
}


BAD_COUNTS = {"above T": (8, "from 0 to T = 7"), "below 0": (-9, ".* 7, got -")}


@pytest.mark.cpu_only  # elsewhere they are clamped
@pytest.mark.parametrize("case", BAD_COUNTS)
def test_bad_counts(case):
    shift, message = BAD_COUNTS[case]
    cost, counts = linear_assignment_inputs()
    with pytest.raises(ValueError, match=f"linear_assignment: n_targets must be {message}"):
        linear_assignment(cost, counts + shift)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=f"linear_assignment: {message}"):
        linear_assignment(*change(*linear_assignment_inputs()))
