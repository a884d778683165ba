"""Training in a process group on a GPU: a step of DDP as a CUDA graph, FSDP on a device."""

import copy

import pytest
import torch
import torch.distributed as dist
from test_gpu import DEVICE
from test_gpu_models import RATE, batch, model, on_gpu

from segkern.data.collate import Batch
from segkern.runtime.processes import Processes
from segkern.training.config import TrainConfig
from segkern.training.optimizer import build_optimizer
from segkern.training.parallel import WARMUP, replicated
from segkern.training.sharded import fill, shard
from segkern.training.step import Step, TrainingLoss

pytestmark = pytest.mark.gpu
ALL = Processes(0, 1)


@pytest.fixture
def _group(tmp_path):
    """Of this process alone, over NCCL."""
    address = f"file://{tmp_path / 'store'}"
    dist.init_process_group("cpu:gloo,cuda:nccl", address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stepped(network, data, wrap, graphs, steps):
    """Losses of steps."""
    loss = wrap(TrainingLoss(network))
    optimizer = build_optimizer(network, TrainConfig(lr=RATE))
    step = Step(network, optimizer, 0.1, "fp32", graphs, loss, ALL)
    return [step(data, RATE)[0].item() for _ in range(steps)]


def parts(loss):
    """The same loss, of which each process holds a part."""
    shard(loss, ALL)
    return loss


@pytest.mark.usefixtures("_group")
def test_a_step_of_ddp_is_replayed():
    steps = WARMUP + 4
    eager = copy.deepcopy(model()).to(DEVICE).train()
    graphed = copy.deepcopy(eager)
    data = Batch(*on_gpu(model(), *batch(64))[1:])
    want = stepped(eager, data, lambda loss: loss, False, steps)
    have = stepped(graphed, data, replicated, True, steps)
    assert have == pytest.approx(want, rel=1e-3)


@pytest.mark.usefixtures("_group")
def test_a_model_in_parts_trains_on_a_device():
    whole = copy.deepcopy(model()).to(DEVICE).train()
    cut, start = copy.deepcopy(whole), copy.deepcopy(whole).cpu()
    data = Batch(*on_gpu(model(), *batch(64))[1:])
    want = stepped(whole, data, lambda loss: loss, False, 4)
    have = stepped(cut, data, parts, False, 4)
    assert have == pytest.approx(want, rel=1e-3)
    for mine, other in zip(fill(start, cut).parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, other.cpu(), rtol=1e-2, atol=1e-4)
