"""A model as a function of tensors: its results against those of `postprocess` and the model."""

import numpy as np
import pytest
import torch
from torch import nn

from segkern.deploy import results
from segkern.deploy.graph import Graph, natural_size, run
from segkern.inference.postprocess import postprocess
from segkern.structures.logits import QueryLogits
from segkern.structures.settings import Options
from support.models import model_config
from support.small_models import convolutions, pixels, queries, tasks

B, Q, K, H, W = 3, 7, 4, 24, 40


@pytest.fixture(scope="module")
def logits():
    """Class and mask logits; the second image has no query of a class, the third one alone."""
    torch.manual_seed(0)
    classes, masks = 3 * torch.randn(B, Q, K + 1), 3 * torch.randn(B, Q, H // 4, W // 4)
    classes[1, :, K] = 50.0
    classes[2, 1:, K] = 50.0
    masks[0, 2] = -5.0  # inside nowhere
    masks = nn.functional.interpolate(masks, (H, W), mode="bilinear")
    return classes, masks


def found(logits, task, stuff, options):
    size = (H, W)
    return postprocess(*logits, task, size, [size] * B, [size] * B, stuff, options=options)


def test_semantic_is_that_of_postprocess(logits):
    have = results.semantic(*logits)
    assert have.dtype == torch.int32
    for labels, one in zip(have, found(logits, "semantic", (), Options()), strict=True):
        assert torch.equal(labels, one.segmentation)
    assert len(have[0].unique()) > 1


@pytest.mark.parametrize("stuff", [(), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("options", [Options(), Options(0.2, 0.5), Options(0.0, 0.0)], ids=str)
def test_panoptic_is_that_of_postprocess(logits, stuff, options):
    ids, segments, labels, scores = results.panoptic(*logits, stuff, options)
    for b, one in enumerate(found(logits, "panoptic", stuff, options)):
        assert torch.equal(ids[b], one.segmentation)
        for s in one.segments:
            rows = segments[b] == s.id
            assert set(labels[b][rows].tolist()) == {s.label_id}
            assert scores[b][rows].max().item() == pytest.approx(s.score, abs=1e-6)
        assert set(segments[b].tolist()) - {0} == {s.id for s in one.segments}
        none = segments[b] == 0
        assert (labels[b][none] == -1).all()
        assert (scores[b][none] == 0).all()
    assert options.threshold is None or ids[0].max() > 1


@pytest.mark.parametrize("stuff", [(), (1,)])
@pytest.mark.parametrize("options", [Options(), Options(0.2, top_k=9)], ids=str)
def test_instance_is_that_of_postprocess(logits, stuff, options):
    masks, labels, scores = results.instance(*logits, stuff, options)
    rows = min(options.top_k or 100, Q * K)
    assert masks.shape == (B, rows, H, W)
    assert masks.dtype == torch.bool
    for b, one in enumerate(found(logits, "instance", stuff, options)):
        n = len(one.segments)
        assert labels[b, :n].tolist() == [s.label_id for s in one.segments]
        np.testing.assert_allclose(scores[b, :n], [s.score for s in one.segments], atol=1e-6)
        assert all(torch.equal(masks[b, i], one.mask(i)) for i in range(n))
        assert (labels[b, n:] == -1).all()
        assert not masks[b, n:].any()
        assert not scores[b, n:].any()
        assert n == rows or stuff or options.threshold


def test_results_of_logits_that_are_not_finite(logits):
    classes, masks = logits
    masks = masks.clone()
    masks[0, 0, :5], masks[0, 1, 5:9], masks[0, 2, 9:] = torch.nan, torch.inf, -torch.inf
    options = Options(0.1, 0.0)
    ids = results.panoptic(classes, masks, (), options)[0]
    want = found((classes, masks), "panoptic", (), options)
    assert torch.equal(ids[0], want[0].segmentation)


class Two(nn.Module):
    """Gives the same logits for any picture."""

    def __init__(self, classes, masks, features=None):
        super().__init__()
        self.config = model_config(K, stuff=(1,), divisor=8)
        self.found = QueryLogits(classes, masks, features)
        self.weight = nn.Parameter(torch.ones(()))

    def inputs(self, task, batch):
        return ()

    def predict(self, pixel_values):
        assert not self.training
        return self.found


def test_a_graph_of_queries_has_its_post():
    torch.manual_seed(1)
    classes, embeddings = torch.randn(2, Q, K + 1), torch.randn(2, Q, 5)
    features = torch.randn(2, 5, H // 4, W // 4)
    masks = torch.einsum("bqc,bchw->bqhw", embeddings, features)
    model, pixels = Two(classes, embeddings, features), torch.zeros(2, 3, H, W)
    assert model.training
    plain = run(Graph(model), pixels)
    assert list(plain) == ["class_queries_logits", "masks_queries_logits"]
    torch.testing.assert_close(plain["masks_queries_logits"], masks)
    full = run(Graph(model, post="full"), pixels)
    large = nn.functional.interpolate(masks, (H, W), mode="bilinear")
    torch.testing.assert_close(full["masks_queries_logits"], large)
    options = Options(0.2)
    for task, names in {
        "semantic": "labels",
        "instance": "masks labels scores",
        "panoptic": "ids segments labels scores",
    }.items():
        given = None if task == "semantic" else options
        have = run(Graph(model, post=task, options=given), pixels)
        assert list(have) == names.split()
        args = (classes, large) if task == "semantic" else (classes, large, (1,), options)
        want = getattr(results, task)(*args)
        want = (want,) if task == "semantic" else want
        assert all(torch.equal(a, b) for a, b in zip(have.values(), want, strict=True))
    assert model.training


@torch.no_grad()
def test_a_graph_of_pixels_has_its_post():
    torch.manual_seed(0)
    model, x = pixels().eval(), torch.randn(2, 3, 48, 32)
    logits = model(x).logits
    maps = run(Graph(model), x)["logits"]
    torch.testing.assert_close(maps, model.predict(x).maps)
    torch.testing.assert_close(run(Graph(model, post="full"), x)["logits"], logits)
    labels = run(Graph(model, "semantic", "semantic"), x)["labels"]
    assert (labels == model.label_map(x)).float().mean() > 0.999


@torch.no_grad()
def test_a_task_is_part_of_the_graph():
    torch.manual_seed(0)
    model, x = tasks().eval(), torch.randn(1, 3, 64, 96)
    found = {}
    for task in ("panoptic", "semantic"):
        found[task] = run(Graph(model, task), x)["class_queries_logits"]
        want = model.predict(x, *model.inputs(task, 1)).classes
        torch.testing.assert_close(found[task], want)
    assert not torch.equal(*found.values())


def test_what_a_graph_is_for_when_nothing_is_said():
    assert natural_size(pixels()) == (32, 32)
    assert natural_size(convolutions(image_size=(32, 64))) == (32, 64)
    assert natural_size(queries(shortest_edge=100, longest_edge=200)) == (128, 128)


def test_what_does_not_fit_is_named():
    model, pixel = queries(), pixels()
    for given, words in (
        ({"post": "masks"}, "post must be left out or one of full, semantic, instance, panoptic"),
        ({"task": "things"}, "task must be one of|task must be 'panoptic'"),
        ({"task": "semantic", "post": "panoptic"}, "post must be the task, 'semantic'"),
        ({"options": Options(0.5)}, "options are for a task's post"),
        ({"post": "semantic", "options": Options(0.5)}, "threshold must be left out"),
        ({"post": "semantic", "options": Options(return_scores=True)}, "are not for a graph"),
    ):
        with pytest.raises(ValueError, match=words):
            Graph(model, **given)
    with pytest.raises(ValueError, match="task must be 'semantic' for a Segmenter"):
        Graph(pixel, post="panoptic")
    with pytest.raises(TypeError, match=r"models/protocol\.py"):
        Graph(nn.Linear(2, 2))
