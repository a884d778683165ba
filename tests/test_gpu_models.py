"""Mask2Former on a GPU: the CPU's numbers, no host synchronisation, a step as one CUDA graph."""

import copy

import pytest
import torch
from test_gpu import DEVICE, no_synchronisation

from segkern.data.collate import Batch
from segkern.graphs import Replay
from segkern.models import Mask2Former, Mask2FormerConfig
from segkern.nn.targets import Targets
from segkern.optimizer import build_optimizer
from segkern.step import PRECISIONS, Step
from segkern.testing import random_targets
from segkern.train import TrainConfig

pytestmark = pytest.mark.gpu
LABELS, RATE = 5, 1e-4
BACKBONES = {
    "resnet_digits": {},
    "swin_tiny": {"backbone": "swin_tiny", "drop_path_rate": 0.3},
    "resnet50": {"backbone": "resnet50", "backbone_options": {"freeze_norm": True}},
}


@pytest.fixture(autouse=True)
def _float32_convolutions():
    """cuDNN would round the inputs of float32 convolutions to ten bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def model(backbone="resnet_digits"):
    torch.manual_seed(0)
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
def test_agrees_with_the_cpu(dtype, close):
    x, targets = batch()
    cpu, x = model().to(dtype), x.to(dtype)
    gpu, x_gpu, targets_gpu = on_gpu(cpu, x, targets)
    with torch.no_grad():
        want, got = cpu.eval()(x, auxiliary_logits=True), gpu.eval()(x_gpu, auxiliary_logits=True)
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
def test_a_training_step_is_one_graph(precision):
    """Ten steps on two sizes, most of them replayed, end where ten eager steps end."""
    small, large = (Batch(*on_gpu(model(), *batch(side))[1:]) for side in (64, 96))
    eager_model = copy.deepcopy(model()).to(DEVICE)
    graph_model = copy.deepcopy(eager_model)
    eager, step = stepper(eager_model, precision), stepper(graph_model, precision, graphs=True)
    for data in (small, large) * 5:
        want, got = eager(data, RATE)[0], step(data, RATE)[0]
        assert distance([got], [want]) < 0.02
    assert len(step._run._captured) == 2
    start = list(model().parameters())
    eager_end, graph_end = (list(m.parameters()) for m in (eager_model, graph_model))
    assert graph_model.criterion.seed.item() == eager_model.criterion.seed.item() == 10
    assert distance(graph_end, eager_end) < 0.1 * distance(start, eager_end)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_inference_is_one_graph(backbone):
    network, x, _ = on_gpu(model(backbone), *batch(128))
    network.eval()
    run = Replay(network.predict, warmup=2)
    with torch.inference_mode():
        for i in range(5):
            want, got = network.predict(x + i), run(x + i)
            assert distance(list(got), list(want)) < 1e-5
    assert len(run._captured) == 1
