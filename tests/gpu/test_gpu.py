"""What only a GPU can show: no host synchronisation, CUDA graphs, determinism, streams, devices,
tensors of more than 2^31 elements, the CPU kernels' results, and Triton's variants.

Whole models are in test_gpu_models.py; `make gpu` runs both, and the op tests with --device cuda.
"""

import contextlib

import pytest
import torch

from segkern.ops import (
    ms_deform_attn,
    point_sample,
    random_points,
)
from segkern.ops.segment_map import TASKS
from support.gpu import (
    DEVICE,
    OPS,
    assert_equal,
    every_map,
    everything,
    inputs,
    random_points_inputs,
    tensors,
)
from support.inputs import (
    mask_bits_inputs,
    masked_attn_inputs,
    matching_cost_inputs,
    moved,
    ms_deform_attn_inputs,
    point_sample_inputs,
    segment_map_inputs,
)

pytestmark = pytest.mark.gpu


every_op = pytest.mark.parametrize("op", OPS)
DTYPES = [torch.float32, torch.bfloat16]


@contextlib.contextmanager
def no_synchronisation():
    """torch's own synchronising calls raise; what a library calls by itself stops a capture."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=[True, False], ids=["deterministic", "default"])
def deterministic(request):
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


def warmed_up(function):
    """Runs on a stream of its own, as before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_host_synchronisation(op, dtype, deterministic):
    values = inputs(op, dtype=dtype)
    everything(op, values)  # compiles
    torch.cuda.synchronize()
    with no_synchronisation():
        everything(op, values)


@every_op
def test_a_captured_graph_takes_new_inputs(op, deterministic):
    fixed = inputs(op)
    warmed_up(lambda: everything(op, fixed))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything(op, fixed)
    for seed in (1, 2):
        new = inputs(op, seed=seed)
        with torch.no_grad():
            for a, b in zip(tensors(fixed), tensors(new)):
                a.copy_(b)
        graph.replay()
        want = everything(op, new)
        if deterministic:
            assert_equal(got, want)
        else:  # sums of atomic additions differ by their order
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(op, dtype, same_bits):
    values = inputs(op, dtype=dtype)
    first = everything(op, values)
    for _ in range(3):
        assert_equal(everything(op, values), first)


def test_sums_into_few_pixels_give_the_same_bits(same_bits):
    """Hundreds of samples meet in a pixel: the order of additions would show."""
    values = ms_deform_attn_inputs(H=8, D=32, P=4, Q=3000, device=DEVICE)
    leaves = [values[i].requires_grad_() for i in (0, 2, 3, 4)]
    want = torch.autograd.grad(ms_deform_attn(*values).sum(), leaves)
    assert_equal(torch.autograd.grad(ms_deform_attn(*values).sum(), leaves), want)
    features, points = point_sample_inputs(C=64, h=4, w=4, P=5000, device=DEVICE)
    features.requires_grad_()
    want = torch.autograd.grad(point_sample(features, points).sum(), features)
    assert_equal(torch.autograd.grad(point_sample(features, points).sum(), features), want)


def cost_of(pairs, cost):
    """Total cost of an assignment: where several are optimal, kernels may differ."""
    query = pairs[0]
    each = cost.double().gather(1, query.clamp(min=0)[:, None])[:, 0]
    return [each.masked_fill(query < 0, 0).sum(-1), (query >= 0).sum(-1)]


@every_op
@pytest.mark.parametrize("large", [False, True], ids=["odd sizes", "sizes of a model"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_agrees_with_the_cpu_kernel(op, large, dtype):
    """In float64 to rounding; in others roughly, as their accuracy is tested with the ops."""
    values = inputs(op, large, dtype, device="cpu")
    want = everything(op, values)
    on_gpu = inputs(op, large, dtype)
    got = everything(op, on_gpu)
    if op == "linear_assignment":
        got, want = cost_of(got, on_gpu[0]), cost_of(want, values[0])
    for a, b in zip(got, want, strict=True):
        assert a.device.type == DEVICE
        if not b.is_floating_point() or op == "random_points":
            assert torch.equal(a.cpu(), b)
            continue
        share = 1e-11 if b.dtype == dtype == torch.float64 else 0.03
        largest = b.detach().abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=share * largest)


def test_random_points_are_the_same_bits_on_both_devices():
    seed, ids, n = random_points_inputs(N=500, n=777)
    on_gpu = random_points(seed.to(DEVICE), ids.to(DEVICE), n)
    assert torch.equal(on_gpu.cpu(), random_points(seed, ids, n))


@every_op
def test_work_waits_on_the_current_stream(op, same_bits):
    new = inputs(op, seed=1)
    want = everything(op, new)
    late = inputs(op, seed=2)
    everything(op, late)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: another stream would read `late`
        with torch.no_grad():
            for a, b in zip(tensors(late), tensors(new)):
                a.copy_(b)
        got = everything(op, late)
    torch.cuda.synchronize()
    assert_equal(got, want)


@every_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_second_device(op, same_bits):
    want = everything(op, inputs(op))
    got = everything(op, inputs(op, device="cuda:1"))  # while the first is current
    assert all(t.device.index == 1 for t in got)
    assert_equal([t.to(want[0].device) for t in got], want)


@pytest.mark.parametrize("task", TASKS)
def test_maps_take_no_memory_for_upsampled_logits(task):
    values = segment_map_inputs(B=1, Q=100, K=133, h=256, w=512, kind="shapes", device=DEVICE)
    every_map(*values, (task,), (1024, 2048))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = every_map(*values, (task,), (1024, 2048))
    results = sum(t.numel() * t.element_size() for t in found)
    taken = torch.cuda.max_memory_allocated() - before - results
    assert taken < 2**24  # of which there would be 800 MB


def attn_of(S, T):
    return "masked_attn", masked_attn_inputs(Q=20, H=8, D=32, S=S, dtype=torch.bfloat16)


def bits_of(S, T):
    return "mask_bits", mask_bits_inputs(Q=20, C=256, S=S, dtype=torch.bfloat16)


def sample_of(S, T):
    return "point_sample", point_sample_inputs(C=64, h=S, w=T + 3, P=3 * T, dtype=torch.bfloat16)


def cost_of_size(S, T):
    sizes = {"C": 256, "h": S, "w": 9, "T": T, "H": S, "P": 7 * T}
    return "matching_cost", matching_cost_inputs(**sizes, dtype=torch.bfloat16)


def maps_of(S, T):
    return "segment_map", segment_map_inputs(Q=T, h=S, w=T + 3, dtype=torch.bfloat16)


@pytest.mark.parametrize("make", [attn_of, bits_of, sample_of, cost_of_size, maps_of])
def test_new_sizes_compile_nothing(make, monkeypatch):
    triton = pytest.importorskip("triton")
    compiled = []

    def hook(*, repr, **_):
        compiled.append(repr)
        return False  # go on and compile

    S, T = (64, 33, 100, 1, 129, 256, 77, 2000, 48, 1021), (16, 1, 3, 100, 20, 24, 33, 64, 7, 48)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    counts = []
    for sizes in zip(S, T, strict=True):
        op, values = make(*sizes)
        values = moved(values, DEVICE)
        for i in OPS[op][3]:
            values[i].requires_grad_()
        everything(op, values)
        counts.append(len(compiled))
    assert len(set(counts)) == 1, f"{counts}: {compiled[counts[0] :]}"
