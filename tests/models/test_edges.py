"""Rare uses of a model that go well: half precision on a CPU, inference mode before training, more
pairs than there are, and a batch larger than kernels' blocks."""

import numpy as np
import pytest
import torch
from test_opening import models, queries
from test_outputs import KINDS, asked

import segkern


def pictures(count):
    return np.random.default_rng(0).integers(0, 255, (count, 32, 48, 3), dtype=np.uint8)


def small(model):
    model.config.shortest_edge, model.config.longest_edge = 32, 64
    return model.eval()


@models
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_on_a_cpu(build, dtype):
    model, (image,) = small(build()), pictures(1)
    want = segkern.segment(model, image, "semantic", return_scores=True).scores
    found = segkern.segment(model.to(dtype), image, "semantic", return_scores=True).scores
    torch.testing.assert_close(found, want, rtol=0, atol=0.02, check_dtype=False)


def _taken(kind, size):
    """The size, but of a model that takes one alone."""
    return (32, 32) if kind == "EoMT" else size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=str)
def test_inference_mode_and_then_training(kind, size):
    """What a model keeps, such as resized positions, must not be of inference mode."""
    grads = []
    for before in (False, True):
        model, arguments = asked(kind)
        image = torch.randn(1, 3, *_taken(kind, size))
        if before:
            with torch.inference_mode():
                model.eval()(image)
                segkern.segment(model.train(), pictures(1)[0])
        torch.manual_seed(4)
        model.train()(**arguments).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *grads))


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        for kind in KINDS:
            model, _ = asked(kind)
            for size in ((64, 64), (48, 80), (48, 80)):
                model.eval()(torch.randn(1, 3, *_taken(kind, size)))


def test_more_pairs_than_queries_times_labels():
    found = segkern.segment(small(queries()), pictures(1)[0], "instance", top_k=10_000)
    assert len(found.segments) <= 4 * 3


@models
def test_a_batch_of_65(build):
    model, images = small(build()), pictures(65)
    together = segkern.segment(model, list(images), "semantic", return_scores=True, batch_size=65)
    for place in (0, 63, 64):
        alone = segkern.segment(model, images[place], "semantic", return_scores=True)
        torch.testing.assert_close(together[place].scores, alone.scores, rtol=0, atol=1e-4)
