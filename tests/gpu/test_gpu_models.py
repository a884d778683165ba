"""Models on a GPU: the CPU's numbers, no synchronisation, a step and `segment` as CUDA graphs."""

import copy
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_gpu import DEVICE, no_synchronisation

from segkern import segment
from segkern.data.collate import Batch
from segkern.models import (
    Mask2Former,
    Mask2FormerConfig,
    MaskFormer,
    MaskFormerConfig,
    Segmenter,
    SegmenterConfig,
)
from segkern.runtime.cuda_graphs import Replay
from segkern.structures.targets import Targets
from segkern.training.config import TrainConfig
from segkern.training.optimizer import build_optimizer
from segkern.training.step import PRECISIONS, Step
from support.inputs import random_targets

pytestmark = pytest.mark.gpu
LABELS, RATE = 5, 1e-4
BACKBONES = {
    "resnet_digits": {},
    "swin_tiny": {"backbone": "swin_tiny", "drop_path_rate": 0.3},
    "resnet50": {"backbone": "resnet50", "backbone_options": {"freeze_norm": True}},
    "maskformer": {},  # on resnet_digits
}


@pytest.fixture
def captured(monkeypatch):
    """The CUDA graphs that were made and are still kept."""
    seen = weakref.WeakSet()

    class Graph(torch.cuda.CUDAGraph):
        def __new__(cls, *args, **options):
            graph = super().__new__(cls, *args, **options)
            seen.add(graph)
            return graph

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return seen


@pytest.fixture(autouse=True)
def _float32_convolutions():
    """cuDNN would round the inputs of float32 convolutions to ten bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def model(backbone="resnet_digits"):
    torch.manual_seed(0)
    if backbone == "maskformer":
        return MaskFormer(MaskFormerConfig.tiny(LABELS))
    config = Mask2FormerConfig.tiny(LABELS)
    for name, value in BACKBONES[backbone].items():
        setattr(config, name, value)
    return Mask2Former(config)


def batch(side=64):
    x = torch.randn(2, 3, side, side + 32, generator=torch.Generator().manual_seed(1))
    masks, labels = random_targets((3, 1), LABELS, side, side + 32)
    return x, Targets.from_lists(masks, labels, num_labels=LABELS)


def on_gpu(network, x, targets):
    return copy.deepcopy(network).to(DEVICE), x.to(DEVICE), targets.to(DEVICE)


def distance(a, b):
    """Of two lists of tensors, relative to the length of the second."""
    a, b = (torch.cat([t.detach().double().cpu().flatten() for t in ts]) for ts in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("backbone", ["resnet_digits", "maskformer"])
def test_agrees_with_the_cpu(backbone, dtype, close):
    x, targets = batch()
    cpu, x = model(backbone).to(dtype), x.to(dtype)
    gpu, x_gpu, targets_gpu = on_gpu(cpu, x, targets)
    with torch.no_grad():
        want, got = (
            cpu.eval()(x, output_auxiliary_logits=True),
            gpu.eval()(x_gpu, output_auxiliary_logits=True),
        )
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert distance([getattr(got, name)], [getattr(want, name)]) < close
        pairs = zip(got.auxiliary_logits, want.auxiliary_logits)
        assert all(distance([a[name]], [b[name]]) < close for a, b in pairs)
    loss, losses = cpu.train().loss(x, targets)
    loss_gpu, losses_gpu = gpu.train().loss(x_gpu, targets_gpu)
    assert distance([loss_gpu], [loss]) < close
    assert distance(list(losses_gpu.values()), list(losses.values())) < close
    loss.backward()
    loss_gpu.backward()
    names = [name for name, _ in cpu.named_parameters()]
    grads = [p.grad for p in cpu.parameters()], [p.grad for p in gpu.parameters()]
    assert [n for n, g in zip(names, grads[1]) if g is None] == []
    assert distance(grads[1], grads[0]) < close


def stepper(network, precision="fp32", graphs=False):
    config = TrainConfig(lr=RATE)
    return Step(network.train(), build_optimizer(network, config), 0.1, precision, graphs)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_training_step_does_not_synchronise(backbone, precision):
    side = 64 if backbone == "resnet_digits" else 128
    network, *data = on_gpu(model(backbone), *batch(side))
    step, data = stepper(network, precision), Batch(*data)
    for _ in range(2):
        step(data, RATE)
    torch.cuda.synchronize()
    with no_synchronisation():
        step(data, RATE)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_inference_does_not_synchronise(backbone):
    network, x, _ = on_gpu(model(backbone), *batch(128))
    network.eval()
    with torch.inference_mode():
        network(x)
        torch.cuda.synchronize()
        with no_synchronisation():
            network(x)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_training_step_is_one_graph(precision, captured):
    """Ten steps on two sizes, most of them replayed, end where ten eager steps end."""
    small, large = (Batch(*on_gpu(model(), *batch(side))[1:]) for side in (64, 96))
    eager_model = copy.deepcopy(model()).to(DEVICE)
    graph_model = copy.deepcopy(eager_model)
    eager, step = stepper(eager_model, precision), stepper(graph_model, precision, graphs=True)
    for data in (small, large) * 5:
        want, got = eager(data, RATE)[0], step(data, RATE)[0]
        assert distance([got], [want]) < 0.02
    assert len(captured) == 2
    start = list(model().parameters())
    eager_end, graph_end = (list(m.parameters()) for m in (eager_model, graph_model))
    assert graph_model.criterion.seed.item() == eager_model.criterion.seed.item() == 10
    assert distance(graph_end, eager_end) < 0.1 * distance(start, eager_end)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("decoder", ["mask", "linear"])
def test_a_training_step_of_a_segmenter_is_one_graph(decoder, precision):
    """The fourth step of a size is captured: seven steps end where seven eager ones end."""
    start = small_segmenter(decoder=decoder, drop_path_rate=0.0, decoder_dropout=0.0)
    eager_model, graph_model = (copy.deepcopy(start).to(DEVICE) for _ in range(2))
    eager, step = stepper(eager_model, precision), stepper(graph_model, precision, graphs=True)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, LABELS, (2, 64, 64), generator=torch.Generator().manual_seed(2))
    targets = replace(batch()[1], semantic=labels)
    data = Batch(x.to(DEVICE), targets.to(DEVICE))
    for _ in range(7):
        want, got = eager(data, RATE)[0], step(data, RATE)[0]
        assert distance([got], [want]) < 0.02
    assert len(step._run._captured) == 1
    eager_end, graph_end = (list(m.parameters()) for m in (eager_model, graph_model))
    assert distance(graph_end, eager_end) < 0.1 * distance(list(start.parameters()), eager_end)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_inference_is_one_graph(backbone, captured):
    network, x, _ = on_gpu(model(backbone), *batch(128))
    network.eval()
    run = Replay(network.predict, warmup=2)
    with torch.inference_mode():
        for i in range(5):
            want, got = network.predict(x + i), run(x + i)
            assert distance(list(got), list(want)) < 1e-5
    assert len(captured) == 1


def small_segmenter(**changes):
    torch.manual_seed(0)
    sides = {"image_size": (64, 64), "window_size": 48, "window_stride": 48, "shortest_edge": 64}
    small = {"patch_size": 8, "embed_dim": 64, "num_heads": 1}
    return Segmenter(SegmenterConfig(LABELS, **small, **sides, **changes))


def small_mask2former():
    network = model()
    network.config.shortest_edge, network.config.longest_edge = 64, 512
    return network


GRAPHED = {"mask2former": small_mask2former, "segmenter": small_segmenter}


def picture(i, width=64):
    return np.random.default_rng(i).integers(0, 255, (64, width, 3), dtype=np.uint8)


def scores(network, *which, **options):
    options["return_scores"] = True
    return segment(network, picture(*which), "semantic", **options).scores


def eager_scores(network, *which):
    """Of a copy, as running eagerly frees the graphs."""
    return scores(copy.deepcopy(network), *which, cuda_graphs=False)


def garbage():
    """Memory that was freed and is still read holds NaN afterwards."""
    sizes = [2**n for n in range(8, 23, 2)] * 16
    held = [torch.full((size,), float("nan"), device=DEVICE) for size in sizes]
    del held


def alive(captured):
    gc.collect()
    return len(captured)


@pytest.mark.parametrize("kind", GRAPHED)
def test_segment_replays_sizes_that_come_again(kind, captured):
    network, wanted = GRAPHED[kind]().to(DEVICE), []
    for i in range(8):
        which = i, (64, 128)[i % 2]
        wanted.append(eager_scores(network, *which))
        assert distance([scores(network, *which)], [wanted[-1]]) < 1e-3
    assert alive(captured) == 2
    assert distance([wanted[0]], [wanted[6]]) > 0.01, "pictures differ in what is found"


@pytest.mark.parametrize("kind", GRAPHED)
def test_graphs_outlive_what_other_sizes_push_out(kind, captured):
    network = GRAPHED[kind]().to(DEVICE)
    for i in range(3):
        scores(network, i)
    other = {"window": 32} if kind == "segmenter" else {}
    for width in range(96, 96 + 32 * 10, 32):  # position embeddings of eight sizes are kept
        scores(network, 0, width, **other)
    garbage()
    assert alive(captured) == 1
    assert distance([scores(network, 7)], [eager_scores(network, 7)]) < 1e-3


CHANGES = {  # what is done to the model, graphs left after it, tolerance
    "load_state_dict": (lambda m: m.load_state_dict(shaken(m)), 1, 1e-3),
    "half": (lambda m: m.half(), 0, 0.02),
    "there and back": (lambda m: m.cpu().to(DEVICE), None, 1e-3),
    "assigned": (lambda m: m.load_state_dict(shaken(m), assign=True), 0, 1e-3),
}


def shaken(network):
    """Weights a little off, of the same statistics."""
    return {
        name: w + 0.1 * w.std() * torch.randn_like(w) if "weight" in name and w.ndim > 1 else w
        for name, w in network.state_dict().items()
    }


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", GRAPHED)
def test_graphs_follow_the_weights(kind, change, captured):
    network = GRAPHED[kind]().to(DEVICE)
    before = [scores(network, i) for i in range(3)][2]
    assert alive(captured) == 1
    apply, left, close = CHANGES[change]
    apply(network)
    garbage()
    for i in range(4):
        want = eager_scores(network, 2)
        assert distance([scores(network, 2)], [want]) < close
        if i == 0 and left is not None:
            assert alive(captured) == left
    assert alive(captured) == 1
    if left is not None and change != "half":
        assert distance([want], [before]) > 0.01


@pytest.mark.parametrize("kind", GRAPHED)
def test_graphs_do_not_read_casts_of_an_autocast_that_has_ended(kind, captured):
    network = GRAPHED[kind]().to(DEVICE)
    for block in range(3):  # a capture in the second, after an eager call
        with torch.autocast(DEVICE, torch.bfloat16):
            for i in range(2):
                want = eager_scores(network, i)
                assert distance([scores(network, i)], [want]) < 0.02
        assert alive(captured) == (block > 0)
        garbage()
    assert distance([scores(network, 0)], [eager_scores(network, 0)]) < 1e-3


@pytest.mark.parametrize("kind", GRAPHED)
def test_graphs_are_freed_with_their_model(kind, captured):
    def run():
        network = GRAPHED[kind]().to(DEVICE)
        for i in range(4):
            scores(network, i)
        assert alive(captured) == 1
        return weakref.ref(network)

    allocated = []
    for _ in range(3):  # the first one leaves workspaces and position embeddings
        network = run()
        gc.collect()
        assert network() is None
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[2] <= allocated[1] + 2**20
