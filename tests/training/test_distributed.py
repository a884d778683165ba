"""Two processes on one machine: each may compute a loss alone, and a step is that of the joined
batch."""

import pytest
import torch
from test_step import network
from torch.nn.parallel import DistributedDataParallel

from segkern.models import Segmenter, SegmenterConfig
from segkern.structures.targets import Targets
from segkern.training.distributed import normalized
from segkern.training.step import TrainingLoss
from support.inputs import random_targets
from support.processes import in_two_processes


def image(rank, counts=(3, 1)):
    """Of a rank its image and targets; the number of targets differs."""
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(rank))
    masks, labels = random_targets(counts, 5, 64, 64)
    one = slice(rank, rank + 1)
    return x, Targets.from_lists(masks[one], labels[one], (64, 64), 5, ids=[rank])


def joined():
    """The batch of both."""
    x = torch.cat([image(rank)[0] for rank in (0, 1)])
    return x, Targets.from_lists(*random_targets((3, 1), 5, 64, 64), num_labels=5, ids=[0, 1])


def test_without_processes_the_batch_counts_alone():
    targets = joined()[1]
    assert targets.normalizer is None
    assert normalized(targets).normalizer.item() == 4
    assert normalized(targets, 2).normalizer.item() == 3  # of three in an image two are matched
    empty = Targets.from_lists([torch.zeros(0, 8, 8)], [torch.zeros(0, dtype=torch.int64)])
    assert normalized(empty).normalizer.item() == 1
    model, (x, _) = network(), joined()
    for part in (targets, normalized(targets)):
        model.criterion.seed.zero_()
        loss, losses = model.loss(x, part)
        part = losses["loss_mask"]
        assert loss.isfinite()
    model.criterion.seed.zero_()
    twice = targets._replace(normalizer=torch.tensor(8.0))
    assert torch.allclose(2 * model.loss(x, twice)[1]["loss_mask"], part)


def test_pixels_are_counted_beside_targets():
    targets = joined()[1]
    semantic = torch.full((2, 64, 64), 255, dtype=torch.uint8)
    assert normalized(targets._replace(semantic=semantic)).pixel_normalizer.item() == 1
    semantic[0, :3, :5] = 1
    counted = normalized(targets._replace(semantic=semantic))
    assert (counted.normalizer.item(), counted.pixel_normalizer.item()) == (4, 15)


def tiny():
    sizes = {"image_size": (64, 64), "patch_size": 16, "window_size": 64, "window_stride": 64}
    depths = {"embed_dim": 64, "depth": 1, "num_heads": 1, "decoder_layers": 1}
    still = {"drop_path_rate": 0.0, "decoder_dropout": 0.0}
    return SegmenterConfig(num_labels=3, backbone_pretrained=False, **sizes, **depths, **still)


def pixels(ranks):
    """A Segmenter, and images and maps of ranks, of which the second has fewer labelled pixels."""
    torch.manual_seed(0)
    model = Segmenter(tiny()).train()
    x = torch.cat([image(rank)[0] for rank in ranks])
    semantic = torch.cat([torch.full((1, 64, 64), rank, dtype=torch.uint8) for rank in ranks])
    semantic[torch.tensor(ranks) == 1, 9:] = 255
    targets = Targets.from_lists(*random_targets([0] * len(ranks), 3, 64, 64))
    return model, x, targets._replace(semantic=semantic)


def work(rank):
    model = network()
    for norm in model.modules():  # statistics of a part of the batch would differ
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            norm.eval()
    x, targets = image(rank)
    if rank == 0:
        model.loss(x, targets)  # alone, as rank 0 does that validates
        model.criterion.seed.zero_()
    loss = DistributedDataParallel(TrainingLoss(model), find_unused_parameters=True)
    _, losses = loss(x, normalized(targets))
    (losses["loss_mask"].sum() + losses["loss_dice"].sum()).backward()
    found = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    model, x, targets = pixels([rank])
    if rank == 0:
        model.loss(x, targets)
    loss = DistributedDataParallel(TrainingLoss(model))
    loss(x, normalized(targets))[0].backward()
    return found + [p.grad.tolist() for p in model.parameters()]


@pytest.mark.slow
def test_two_processes_make_the_step_of_the_joined_batch(tmp_path):
    found = in_two_processes(work, tmp_path)
    model = network()
    for norm in model.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            norm.eval()
    _, losses = model.loss(*joined())
    # the mean over processes of each sum over the mean number: the joined sum over the number
    (losses["loss_mask"].sum() + losses["loss_dice"].sum()).backward()
    segmenter, x, targets = pixels([0, 1])
    segmenter.loss(x, normalized(targets))[0].backward()
    parameters = [*model.parameters(), *segmenter.parameters()]
    for mine, other, p in zip(found[0], found[1], parameters, strict=True):
        assert mine == other
        if p.grad is not None:
            torch.testing.assert_close(torch.tensor(mine), p.grad, rtol=1e-3, atol=1e-5)
