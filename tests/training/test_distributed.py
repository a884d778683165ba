"""What the parts of a batch count together; what two processes make of it is in
test_many_processes.py."""

import torch
from test_step import network

from segkern.models import Segmenter, SegmenterConfig
from segkern.structures.targets import Targets
from segkern.training.distributed import normalized
from support.inputs import random_targets


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
