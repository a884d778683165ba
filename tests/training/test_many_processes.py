"""Two processes make the step of the joined batch: every kind of model, by DDP and by FSDP."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_loop import config
from torch import nn
from torch.distributed.tensor import DTensor

from segkern.data import Digits
from segkern.data.collate import Batch
from segkern.models.smaller import weights_of_layers
from segkern.runtime.processes import ALONE, joined, of_group
from segkern.structures.labels import void_of
from segkern.structures.targets import Targets
from segkern.training.average import Average
from segkern.training.batch_norm import synchronised
from segkern.training.config import TrainConfig
from segkern.training.distributed import together
from segkern.training.loop import train
from segkern.training.optimizer import build_optimizer
from segkern.training.parallel import own_part, replicated
from segkern.training.sharded import fill, shard, to_fill, units
from segkern.training.step import Step, TrainingLoss
from segkern.training.zeros import Zeros
from support.inputs import random_targets
from support.processes import in_two_processes
from support.small_models import (
    convolutions,
    levels,
    pixels,
    pyramid,
    queries,
    sequence,
    tasks,
    tokens,
)

KINDS = {
    "Mask2Former": queries,
    "MaskFormer": pyramid,
    "OneFormer": tasks,
    "Segmenter": pixels,
    "SegFormer": levels,
    "Seq2Seg, semantic": sequence,
    "Seq2Seg, instance": partial(
        sequence, head="instance", mask="fine", class_from="mask", true_mask_weight=0.5
    ),
    "U-Net, semantic": convolutions,
    "U-Net, instance": partial(
        convolutions, head="instance", class_from="mask", true_mask_weight=0.5
    ),
    "EoMT": tokens,
}
COUNTS = {"1 and 9 targets": (1, 9), "no target in one": (3, 0), "no target": (0, 0)}
SIDE = 32


def built(kind):
    """A model in float64 without dropout; of a OneFormer with sentences of its own."""
    torch.manual_seed(0)
    model = KINDS[kind]().double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "drop_path"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def images(counts, only=slice(None)):
    """A batch of an image a count, or some of it; the last map of labels has few pixels that
    count, and where its image has no target none."""
    n = len(counts)
    x = torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).double()
    masks, labels = random_targets(counts, 3, SIDE, SIDE)
    targets = Targets.from_lists(
        masks[only], labels[only], (SIDE, SIDE), 3, ids=list(range(n))[only]
    )
    maps = (x[:, 0] > 0).to(torch.uint8) + (x[:, 1] > 0).to(torch.uint8)
    maps[-1, 5 * (counts[-1] > 0) :] = void_of(3)
    task = torch.arange(n) % 3
    return Batch(x[only], targets._replace(semantic=maps[only], task=task[only]))


def stepped(model, parts, optimizer="sgd", way=None, processes=ALONE, steps=1, **changes):
    """A model after steps on the parts of a batch, the average of its weights, and the losses."""
    settings = TrainConfig(lr=0.01, optimizer=optimizer, weight_decay=0.0)
    average, loss = Average(model, 0.9), TrainingLoss(model)
    if way == "fsdp":
        shard(loss, processes)
        shard(average.model, processes)
    elif way == "ddp":
        loss = replicated(loss)
    options = {"loss": loss, "processes": processes, "graphs": False} | changes
    step = Step(model, build_optimizer(model, settings), **options)
    agreed = together([part.targets for part in parts], getattr(model.config, "num_queries", None))
    parts = [Batch(part.pixel_values, targets) for part, targets in zip(parts, agreed)]
    losses = []
    with synchronised(model, processes):
        for i in range(steps):
            losses.append(step(parts, 0.01)[0].item())
            average.update(i + 1)
    return model, average.model, losses


def numbers(model, gradients=False):
    """Of a model, whole or in parts, its weights or their gradients as arrays."""
    tensors = dict(model.named_parameters()) if gradients else model.state_dict()
    found = {}
    for name, value in tensors.items():
        value = value.grad if gradients else value
        value = value.full_tensor() if isinstance(value, DTensor) else value
        found[name] = value.detach().numpy().copy()
    return found


def cases():
    """Kind, counts of targets, and way: each kind by both ways, and one of each form of logits
    with fewer targets than processes."""
    for kind in KINDS:
        for way in ("ddp", "fsdp"):
            yield kind, "1 and 9 targets", way
    for kind in ("Mask2Former", "MaskFormer", "OneFormer", "Segmenter", "U-Net, semantic"):
        for counts in ("no target in one", "no target"):
            yield kind, counts, "ddp"
    for kind in ("Mask2Former", "Segmenter", "EoMT"):
        for way in ("ddp recomputing", "fsdp recomputing"):
            yield kind, "1 and 9 targets", way


def still(kind):
    """A model whose batch norms keep their moments, as those of a part of a batch differ."""
    model = built(kind)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


RUN = {"optimizer": "adamw", "steps": 5, "clip": 0.1}
EIGHT = (2, 0, 1, 3, 0, 0, 5, 1)
LONG = "Mask2Former", "Segmenter"


class Overflows(nn.Module):
    """Its gradient is finite, or infinite in the last weight of the second process alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def loss(self, x, targets):
        return (x * self.weight).sum(), {}


def scales(rank, processes, way):
    """Scales and weights of fp16 after a step that overflows in one process, and one that does
    not."""
    model = Overflows()
    loss = TrainingLoss(model)
    if way == "fsdp":
        shard(loss, processes)
    else:
        loss = replicated(loss)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "factor": 1.0}], torch.tensor(0.1))
    step = Step(model, optimizer, 0.5, "fp16", False, loss, processes)
    found = []
    for last in (float("inf") if rank else 1.0, 2.0):
        step(Batch(torch.tensor([1.0, 1.0, 1.0, last]), images((1,)).targets), 0.1)
        found.append((step.scaler.get_scale(), numbers(model)["weight"].tolist()))
    return found


class Counted(Digits):
    """Scenes that note which of them were asked for."""

    def __getitem__(self, index):
        self.__dict__.setdefault("asked", []).append(index)
        return super().__getitem__(index)


def trained(folder, way=None):
    """Of a run with evaluations and an average: weights, scenes that were measured here, figures,
    files, and steps, which patience ends."""
    setting = config(folder, ema=0.5, evaluate_every=2, evaluate_scenes=20, best_metric="miou")
    setting = replace(setting, freeze=("backbone",), patience=1, steps=9, lr=0.0, log_every=2)
    setting = replace(setting, parallel=way or "ddp")
    setting.model.dropout = 0.0
    scenes = Counted(setting.data, "val")
    run = train(setting, progress=False, val_dataset=scenes)
    log = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    figures = [line.get("metrics") for line in log]
    files = sorted(p.name for p in folder.iterdir())
    images = round(run.images_per_second * run.seconds)
    return numbers(run.model), scenes.asked, figures, files, run.steps, images


def zeros_kept(processes, way):
    """Of a model whose first weight alone has zeros, in the part of the first process: where it is
    0 after two steps, and how many tensors moved. One without zeros is refused in all."""
    model = still("Segmenter")
    name, weight = next(iter(weights_of_layers(model).items()))
    with torch.no_grad():
        for other in weights_of_layers(model).values():
            other[other == 0] = 1e-3
        weight.view(-1)[:3] = 0
    before, loss = numbers(model), TrainingLoss(model)
    if way == "fsdp":
        shard(loss, processes)
    else:
        loss = replicated(loss)
    step = Step(model, build_optimizer(model, TrainConfig(lr=0.01)), 0.0, "fp32", False, loss)
    step.zeros = Zeros(model, processes)
    for _ in range(2):
        step(images((2,)), 0.01)
    after = numbers(model)
    moved = sum(not np.array_equal(after[key], before[key]) for key in after)
    with torch.no_grad():
        own_part(dict(model.named_parameters())[name]).fill_(1)
    with pytest.raises(ValueError, match="keep_zeros must be False for a model that starts"):
        Zeros(model, processes)
    return np.flatnonzero(after[name] == 0).tolist(), moved


def work(folder, rank):
    found = {}
    with joined() as processes:
        assert (processes.rank, processes.count) == (rank, 2)
        assert (processes.local_rank, processes.local_count) == (rank, 2)
        assert of_group() is processes  # no group is made twice
        if rank == 0:  # as one that validates: nothing in a loss waits for another process
            for kind in LONG:
                part = images((1, 2))
                built(kind).loss(part.pixel_values, part.targets)
        for case in cases():
            kind, counts, way = case
            part = images(COUNTS[counts], slice(rank, rank + 1))
            model, (way, _, recomputing) = built(kind), way.partition(" ")
            model.gradient_checkpointing_enable(bool(recomputing))
            model, _, losses = stepped(model, [part], way=way, processes=processes)
            found[case] = numbers(model, gradients=True), numbers(model), losses
            if way == "fsdp":
                blocks = sum("FSDP" in type(m).__name__ for m in model.modules())
                found[kind, "blocks"] = blocks
        for kind in LONG:
            for way in ("ddp", "fsdp"):
                parts = [images(EIGHT, slice(i + rank, i + rank + 1)) for i in (0, 2, 4, 6)]
                options = RUN | {"way": way, "processes": processes}
                model, average, losses = stepped(still(kind), parts, **options)
                found[kind, way] = numbers(model), numbers(average), losses
        for way in ("ddp", "fsdp"):
            found["scales", way] = scales(rank, processes, way)
            found["zeros", way] = zeros_kept(processes, way)
            found["run", way] = trained(folder / way, way)
        with pytest.raises(ValueError, match="must be adamw or sgd where parallel is fsdp, got m"):
            train(config(folder / "muon", optimizer="muon", parallel="fsdp"))
        found["any"] = [processes.any(flag) for flag in (rank == 1, False)]
        found["sums"] = processes.sums([rank, 2])
        found["from first"] = processes.from_first(f"of {rank}")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes find."""
    folder = tmp_path_factory.mktemp("group")
    return in_two_processes(partial(work, folder), folder, patience=400)


def near(have, want, share=1e-9):
    """Of arrays by name, to a share of the largest of each, and of all."""
    assert have.keys() == want.keys()
    largest = max(np.abs(x).max() for x in want.values())
    for name, value in want.items():
        bound = share * (np.abs(value).max() + 1e-3 * largest) + 1e-15
        assert np.abs(have[name] - value).max() <= bound, name


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=" ".join)
def test_a_step_is_that_of_the_joined_batch(found, case):
    """Weights without a gradient would make DDP fail. The moments of batch norms are joined, too,
    and the random points are those of the samples, wherever they are."""
    kind, counts, way = case
    model, _, losses = stepped(built(kind), [images(COUNTS[counts])])
    gradients, weights, own = found[0][case]
    near(gradients, numbers(model, gradients=True))
    near(weights, numbers(model))
    assert (own[0] + found[1][case][2][0]) / 2 == pytest.approx(losses[0], rel=1e-9)
    for name, value in weights.items():
        assert np.array_equal(value, found[1][case][1][name]), name
    if way == "fsdp":
        assert found[0][kind, "blocks"] == len([*units(built(kind))]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", LONG)
def test_four_parts_of_two_images_are_a_batch_of_eight(found, kind, way):
    """Five steps of AdamW with a clipped gradient and an average of the weights."""
    model, average, losses = stepped(still(kind), [images(EIGHT)], **RUN)
    weights, averaged, own = found[0][kind, way]
    near(weights, numbers(model))
    near(averaged, numbers(average))
    means = [(a + b) / 2 for a, b in zip(own, found[1][kind, way][2])]
    assert means == pytest.approx(losses, rel=1e-9)
    assert not np.allclose(numbers(built(kind))[name := next(iter(weights))], weights[name])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_gradient_that_overflows_in_one_process_is_left_out_in_all(found, way):
    for mine in (found[0]["scales", way], found[1]["scales", way]):
        (first, weights), (second, moved) = mine
        assert first == second == 2.0**15
        assert weights == [1.0] * 4
        assert moved == pytest.approx([1 - 0.05 * x / 7**0.5 for x in (1, 1, 1, 2)], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_zeros_stay_in_all_processes(found, way):
    for rank in (0, 1):
        zeros, moved = found[rank]["zeros", way]
        assert zeros == [0, 1, 2]
        assert moved > 10


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_all_measure_and_all_stop(found, way, alone):
    """`train` in a group of the caller's own, which measures two batches of scenes, one each; an
    evaluation without a better figure ends it."""
    want = alone
    assert want[1] == 2 * [*range(20)]
    for rank in (0, 1):
        weights, asked, figures, files, *others = found[rank]["run", way]
        near(weights, want[0], 1e-5)
        assert asked == 2 * [*(range(16), range(16, 20))[rank]]
        assert [figures, files, *others] == [*want[2:]]
        assert figures.count(None) < len(figures)
        assert files == ["best", "checkpoints", "log.jsonl", "model"]
        assert others[0] == 4


def test_a_model_to_fill_copies_no_weights():
    whole = to_fill(nn.Linear(2, 3, device="meta"))  # of which there are none to copy
    assert {p.device.type for p in whole.parameters()} == {"cpu"}
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    whole = to_fill(model)
    assert whole[2].weight is whole[0].weight is not model[0].weight
    near(numbers(fill(whole, model)), numbers(model), 0.0)


@pytest.mark.slow
def test_what_processes_agree_on(found):
    for rank in (0, 1):
        assert found[rank]["any"] == [True, False]
        assert found[rank]["sums"] == [1, 4]
        assert found[rank]["from first"] == "of 0"
