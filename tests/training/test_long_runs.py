"""Accumulated batches, averaged weights, early stops, and the best model whole at any time."""

import os
import re
from dataclasses import replace

import pytest
import torch
from test_distributed import joined, pixels
from test_loop import Custom, PulledPlug, config, same
from test_step import network

from segkern.data import Digits
from segkern.data.collate import Batch
from segkern.models import open_model
from segkern.structures.targets import Targets
from segkern.training import checkpoint, validation
from segkern.training.average import Average
from segkern.training.config import TrainConfig
from segkern.training.distributed import normalized, together
from segkern.training.loop import train
from segkern.training.optimizer import build_optimizer
from segkern.training.step import Step
from segkern.training.unmatched import Unmatched
from support.inputs import random_targets
from support.runs import part


def part_of(targets, image):
    """Of one image of a batch."""
    one = slice(image, image + 1)
    return type(targets)(*(None if x is None or not x.ndim else x[one] for x in targets))


def stepped(model, batch, optimizer="sgd"):
    """A model after one step, with statistics of norms left alone, and the loss."""
    for norm in model.modules():  # those of a part of the batch would differ
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            norm.eval()
    settings = TrainConfig(lr=0.1, optimizer=optimizer, weight_decay=0.0)
    loss, losses = Step(model, build_optimizer(model, settings), 0.1)(batch, 0.1)
    return model, {"": loss, **losses}


@pytest.mark.parametrize("kind", ["masks", "one target", "more targets than queries", "pixels"])
def test_an_accumulated_step_is_that_of_the_joined_batch(kind):
    """In float64: the weights after it, the losses, and the seed of the next."""

    def built():
        if kind == "pixels":
            return pixels([0, 1])
        model = network()
        if kind == "one target":
            masks, labels = random_targets((1, 0), 5, 64, 64)
            return model, joined()[0], Targets.from_lists(masks, labels, (64, 64), 5)
        if kind != "masks":
            model.query_decoder.query_feat.weight = cut(model.query_decoder.query_feat)
            model.query_decoder.query_embed.weight = cut(model.query_decoder.query_embed)
        return model, *joined()

    def cut(embedding):
        return torch.nn.Parameter(embedding.weight[:2].detach())

    model, x, targets = built()
    queries = {"more targets than queries": 2, "pixels": None}.get(kind, 6)
    x = x.double()
    one, losses = stepped(model.double(), Batch(x, normalized(targets, queries)))
    parts = together([part_of(targets, 0), part_of(targets, 1)], queries)
    batches = [Batch(x[i : i + 1], part) for i, part in enumerate(parts)]
    two, found = stepped(built()[0].double(), batches)
    start = built()[0].double().state_dict()
    for name, value in one.state_dict().items():
        moved = (value - start[name]).abs().max()
        assert (two.state_dict()[name] - value).abs().max() <= 1e-9 * moved + 1e-14, name
    for name, value in losses.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)
    if queries == 2:  # of 3 and 1 targets 2 and 1 can be matched
        assert parts[0].normalizer == parts[0].matched == 1.5
    if kind == "pixels":
        assert parts[0].matched is None
    else:
        assert two.criterion.seed == 1
        assert together([targets], queries)[0].matched is None  # one batch alone counts itself


def test_a_run_accumulates_the_images_of_a_larger_batch(tmp_path):
    setting = config(tmp_path / "whole", steps=3, batch_size=4, optimizer="sgd")
    setting.model.dropout = 0.0
    # without norms over the batch, whose statistics are of a part
    setting = replace(setting, freeze=("backbone",))
    whole = train(setting, progress=False)
    parts = replace(setting, output=tmp_path / "parts", batch_size=2, accumulate=2)
    run = train(parts, progress=False)
    assert run.images_per_second * run.seconds == pytest.approx(12)
    for (name, a), b in zip(whole.model.named_parameters(), run.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    again = train(replace(parts, steps=4), resume=tmp_path / "parts", progress=False)
    assert again.steps == 4


def test_the_average_follows_the_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average, wanted = Average(model, 0.5), model[0].weight.detach().double()
    for step in range(1, 9):
        torch.nn.init.normal_(model[0].weight)
        model(torch.randn(4, 2))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(average.model[0].weight.double(), wanted, rtol=1e-6, atol=1e-6)
    same(dict(model.named_buffers()), dict(average.model.named_buffers()))
    assert not any(m.training for m in average.model.modules())
    assert not any(p.requires_grad for p in average.model.parameters())


def test_averaged_weights_are_saved_evaluated_and_resumed(tmp_path):
    settings = {"ema": 0.9, "evaluate_every": 3, "evaluate_scenes": 1}
    whole = train(config(tmp_path / "whole", **settings), progress=False)
    state = checkpoint.load(tmp_path / "whole")
    same(whole.model.state_dict(), part(state, "average"))
    assert not torch.equal(
        state["tensors"]["average.query_decoder.query_feat.weight"],
        state["tensors"]["model.query_decoder.query_feat.weight"],
    )
    saved = open_model(tmp_path / "whole/model")
    same(dict(saved.named_parameters()), dict(whole.model.named_parameters()))
    first = config(tmp_path / "cut", checkpoint_every=4, **settings)
    data, held_out = Digits(first.data), Digits(first.data, "val")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(first, dataset=PulledPlug(data, 8), val_dataset=held_out, progress=False)
    given = {"dataset": data, "val_dataset": held_out}
    again = train(first, resume=tmp_path / "cut", **given, progress=False)
    same(whole.model.state_dict(), again.model.state_dict())
    with pytest.raises(ValueError, match=r"ema is 0.9 there, 0.5 here"):
        train(replace(first, ema=0.5, steps=9), resume=tmp_path / "cut", **given, progress=False)


def figures(monkeypatch, *values):
    """Evaluations that find these, one after the other."""
    found = iter(values)
    monkeypatch.setattr(
        validation, "evaluate", lambda *a, **k: {"ap": next(found), "ap50": None, "things": None}
    )


def test_it_stops_when_no_figure_is_better(tmp_path, monkeypatch, capsys):
    figures(monkeypatch, 0.1, 0.3, 0.3, 0.2, 0.9, 0.8, 0.7, 0.6)
    setting = config(tmp_path, steps=9, evaluate_every=1, patience=2, best_metric="ap")
    run = train(setting)
    assert run.steps == checkpoint.settings(tmp_path)["step"] == 4
    assert "stopped: 2 evaluations without a better figure" in capsys.readouterr().out
    assert validation.best_of(tmp_path) == (2, "ap", 0.3)
    more = train(replace(setting, patience=3), resume=tmp_path, progress=False)
    assert (more.steps, validation.best_of(tmp_path)) == (8, (5, "ap", 0.9))


def test_the_best_before_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    figures(monkeypatch, 0.1, 0.3)
    setting = config(tmp_path, steps=1, evaluate_every=1, best_metric="ap")
    train(setting, progress=False)
    replaced = os.replace

    def fails(source, target):
        if str(source).endswith("/new"):
            raise OSError("the disk is full")
        replaced(source, target)

    monkeypatch.setattr(validation.os, "replace", fails)
    with pytest.raises(OSError, match="the disk is full"):
        train(replace(setting, steps=2), resume=tmp_path, progress=False)
    assert validation.best_of(tmp_path) == (1, "ap", 0.1)
    open_model(tmp_path / "best")
    assert checkpoint.settings(tmp_path)["step"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 0}, "accumulate must be >= 1, got 0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"patience": 2}, r"patience must be 0 without evaluations \(evaluate_every\), got 2"),
    ],
    ids=["accumulate", "ema", "patience"],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_objects_that_no_query_can_match_are_counted_once(tmp_path, capsys):
    masks = torch.eye(8 * 32).reshape(256, 8, 32)[:7]
    masks = torch.cat([masks, torch.zeros(7, 24, 32)], 1).to(torch.uint8)
    data = Custom(3, masks=masks, labels=torch.zeros(7, dtype=torch.int64))
    train(config(tmp_path, steps=5), dataset=data)
    text = " ".join(capsys.readouterr().out.split())
    found = re.findall(r"(\d+) of (\d+) objects cannot be matched: (\d+) images", text)
    assert len(found) == 1
    lost, objects, images = map(int, found[0])
    assert (lost, objects) == (2 * images, 7 * images + 4 - images)
    assert Unmatched(None, 3)([]) is None
