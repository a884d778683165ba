"""Optimizers, parameter groups and schedules."""

import re
from dataclasses import replace

import pytest
import torch

from segkern import recipes
from segkern.models import Mask2Former, Segmenter, SegmenterConfig
from segkern.training.config import TrainConfig
from segkern.training.optimizer import build_optimizer, learning_rate, parameter_groups


def test_norms_embeddings_and_position_tables_do_not_decay():
    setting = TrainConfig(weight_decay=0.05, backbone_lr_factor=0.1)
    setting.model.backbone = "swin_tiny"
    setting.model.backbone_options = {"depths": (1, 1, 1, 1)}
    model = Mask2Former(setting.model)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, setting)
    found = {names[id(p)]: (g["factor"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())
    for name, (factor, decay) in found.items():
        assert factor == (0.1 if name.startswith("backbone.") else 1.0)
        free = "norm" in name or "query_" in name.split(".")[1] or "position_bias" in name
        free |= name == "query_decoder.level_embed.weight"
        free |= bool(re.match(r"pixel_decoder\.(input_proj\.\d|adapter|output_conv)\.1\.", name))
        assert decay == (0.0 if free else 0.05), name


def test_the_backbones_rate_is_its_own_in_every_model():
    model = SegmenterConfig(num_labels=3, image_size=(32, 32), embed_dim=64, depth=1, num_heads=1)
    setting = TrainConfig(backbone_lr_factor=0.25, model=model)
    built = Segmenter(model)
    names = {id(p): n for n, p in built.named_parameters()}
    for group in parameter_groups(built, setting):
        for parameter in group["params"]:
            of_encoder = names[id(parameter)].startswith("encoder.")
            assert group["factor"] == (0.25 if of_encoder else 1.0)
            torch.testing.assert_close(group["lr"].item(), setting.lr * group["factor"])


@pytest.mark.parametrize("recipe", [recipes.digits_segmenter, recipes.segmenter])
def test_segmenters_recipes_train_all_parts_at_one_rate(recipe):
    assert recipe().backbone_lr_factor == 1.0


def test_schedules():
    setting = TrainConfig(steps=270, warmup=10, lr=1.0)

    def rates(schedule):
        return [learning_rate(i, replace(setting, schedule=schedule)) for i in range(270)]

    cosine, poly, steps = map(rates, ("cosine", "poly", "steps"))
    for values in (cosine, poly):
        assert values[0] < values[9]
        assert values[9:] == sorted(values[9:], reverse=True)
        assert 0 < values[-1] < 0.02
    assert cosine[135] == pytest.approx(0.5)
    assert poly[135] == pytest.approx(0.5**0.9)
    assert steps[0] == pytest.approx(0.1)
    assert steps[10:240] == [1.0] * 230
    assert steps[240:] == pytest.approx([0.1] * 20 + [0.01] * 10)
    thirds = rates("thirds")
    assert thirds[10:] == [1.0] * 80 + [0.5] * 90 + [0.1] * 90
    floor = replace(setting, schedule="poly", min_lr=0.25)
    assert learning_rate(135, floor) == pytest.approx(0.25 + 0.75 * 0.5**0.9)


def test_sgd_with_momentum():
    model = SegmenterConfig(num_labels=3, image_size=(32, 32), embed_dim=64, depth=1, num_heads=1)
    setting = TrainConfig(optimizer="sgd", momentum=0.8, lr=0.5, weight_decay=0.0, model=model)
    built = Segmenter(model)
    optimizer = build_optimizer(built, setting)
    assert isinstance(optimizer, torch.optim.SGD)
    parameter = built.decoder.proj_dec.weight
    start, grad = parameter.detach().clone(), torch.randn_like(parameter)
    for _ in range(2):
        parameter.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), start - 0.5 * (grad + 1.8 * grad))


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    torch.manual_seed(0)
    model = SegmenterConfig(num_labels=3, image_size=(32, 32), embed_dim=64, depth=2, num_heads=1)
    setting = TrainConfig(
        optimizer="muon",
        momentum=0.9,
        lr=0.5,
        weight_decay=0.1,
        backbone_lr_factor=1.0,
        model=model,
    )
    built = Segmenter(model)
    names = {id(p): n for n, p in built.named_parameters()}
    optimizer = build_optimizer(built, setting)
    muon, adamw = optimizer.parts
    found = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = [f"{part}.blocks.{i}" for part in ("encoder", "decoder") for i in (0, 1)]
    assert found == {f"{block}.{layer}.weight" for block in blocks for layer in layers}
    rest = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert rest == set(names.values()) - found
    # a step of Muon is the nearest orthogonal matrix, in the size of an AdamW step
    parameter = built.encoder.blocks[0].mlp.fc1.weight
    for p in built.parameters():
        p.grad = torch.randn_like(p)
    start, grad = parameter.detach().clone(), parameter.grad.double()
    for group in optimizer.param_groups:
        group["lr"].fill_(0.01 * group["factor"])
    optimizer.step()
    step = (start * (1 - 0.01 * 0.1) - parameter.detach()).double() / (0.01 * 0.2 * 256**0.5)
    u, _, v = torch.linalg.svd(grad, full_matrices=False)
    assert torch.linalg.svdvals(step).sub(1).abs().max() < 0.5  # five Newton-Schulz steps
    assert (step * (u @ v)).sum() / step.norm() / 64**0.5 > 0.95


@pytest.mark.parametrize("settings", [{"optimizer": "lion"}, {"momentum": -1.0}], ids=str)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TrainConfig(**settings)
