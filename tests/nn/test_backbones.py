"""Backbones against transformers on random weights, in float64; and what they refuse."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from transformers import ResNetBackbone, ResNetConfig, SwinBackbone, SwinConfig

from segkern.data import DigitsConfig
from segkern.models import Mask2FormerConfig, SegmenterConfig
from segkern.models.mask2former.huggingface_keys import from_huggingface
from segkern.nn import drop_path
from segkern.nn.backbones import build_backbone, resnet, timm_backbone
from segkern.nn.backbones.swin import VARIANTS, Block, Swin
from segkern.training.config import TrainConfig
from segkern.training.loop import train

with torch.device("meta"):
    torch.empty(0)  # torch keeps a list of its constructors, before conftest replaces this one

STAGES = ["stage1", "stage2", "stage3", "stage4"]
PREFIX = "model.pixel_level_module.encoder."
SMALL = {"embed_dim": 24, "depths": (2, 1, 2, 2), "num_heads": (1, 2, 3, 6)}


def backbone(name, pretrained=False, drop_path_rate=0.0, **options):
    return build_backbone(
        SimpleNamespace(
            backbone=name,
            backbone_pretrained=pretrained,
            backbone_options=options,
            drop_path_rate=drop_path_rate,
            size_divisor=32,
            longest_edge=1333,
        )
    )


def rename(values, family):
    """transformers' names of a lone backbone to those of ours."""
    renamed = from_huggingface({PREFIX + k: v for k, v in values.items()}, family)
    return {k.removeprefix("backbone."): v for k, v in renamed.items()}


def swin_pair(window, **sizes):
    theirs = SwinBackbone(
        SwinConfig(window_size=window, drop_path_rate=0.0, out_features=STAGES, **sizes)
    ).double()
    for parameter in theirs.parameters():  # at the start biases and bias tables are zero
        nn.init.normal_(parameter, std=0.2)
    ours = Swin(window_size=window, **sizes).double()
    ours.load_state_dict(rename(theirs.state_dict(), "swin"))
    return theirs, ours


def assert_same(theirs, ours, x, family):
    """Maps to 1e-10, the gradients of input and weights to 1e-10 of their size."""
    x = x.double().requires_grad_()
    expected, got = theirs(x).feature_maps, ours(x)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    weights = [torch.randn_like(a) for a in expected]

    def gradients(module, maps):
        named = {k: p for k, p in module.named_parameters() if "swin.layernorm" not in k}
        loss = sum((m * w).sum() for m, w in zip(maps, weights))
        values = torch.autograd.grad(loss, [x, *named.values()])
        return values[0], dict(zip(named, values[1:]))

    (x_theirs, theirs_all), (x_ours, ours_all) = gradients(theirs, expected), gradients(ours, got)
    theirs_all = rename(theirs_all, family)
    assert theirs_all.keys() == ours_all.keys()
    for name, a in [("input", x_theirs), *theirs_all.items()]:
        b = x_ours if name == "input" else ours_all[name]
        assert (a - b).norm() <= 1e-10 * (1 + a.norm()), name


SWIN_CASES = [
    ("divides", 7, (2, 3, 112, 224)),
    ("384", 7, (1, 3, 384, 384)),
    ("352x480", 7, (1, 3, 352, 480)),
    ("odd", 7, (2, 3, 97, 130)),
    ("window 12", 12, (1, 3, 97, 200)),
    ("even window", 4, (2, 3, 90, 66)),
    ("one window", 7, (2, 3, 64, 64)),
    ("one row of windows", 7, (1, 3, 30, 200)),
    ("one pixel", 7, (1, 3, 1, 1)),
]


@pytest.mark.parametrize(
    ("window", "shape"), [c[1:] for c in SWIN_CASES], ids=[c[0] for c in SWIN_CASES]
)
def test_swin_is_that_of_transformers(window, shape):
    theirs, ours = swin_pair(window, **SMALL)
    assert_same(theirs, ours, torch.randn(shape), "swin")


def test_swin_tiny_is_that_of_transformers():
    sizes = dict(VARIANTS["swin_tiny"])
    theirs, ours = swin_pair(sizes.pop("window_size"), **sizes)
    x = torch.randn(1, 3, 190, 130, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(theirs(x).feature_maps, ours(x), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("swin_tiny", 27.5), ("swin_small", 48.8), ("swin_base", 86.9), ("swin_large", 195.2)],
)
def test_swin_variants_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        model = backbone(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count - millions) < 0.2, count
    assert model.strides == (4, 8, 16, 32)


def test_swin_blocks_the_ends_of_the_map_from_each_other():
    """A shifted window at the edge holds tokens of both ends of the map: no information passes."""
    model = Swin(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 3, 56, 56, dtype=torch.float64)  # 14 x 14 tokens, windows of 7
    y = x.clone()
    y[..., -4:] += 1  # the last column of tokens
    changed = (model(x)[0] - model(y)[0]).abs().amax((0, 1, 2))
    assert changed[3:].min() > 1e-6  # by its own window and the one shifted across it
    assert changed[:3].max() < 1e-12


def test_swin_compiles_whole():
    model = Swin(embed_dim=8, depths=(2, 1, 1, 1), num_heads=(1, 1, 1, 1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 40, 52)  # padded, shifted
    grads = []
    for f in (model, compiled):
        model.zero_grad()
        sum((m * m).mean() for m in f(x)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_swin_in_bfloat16_is_near():
    model = Swin(**SMALL).eval()
    x = torch.randn(1, 3, 97, 130)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    for a, b, c in zip(exact, mixed, model.bfloat16()(x.bfloat16())):
        assert (a - b).abs().mean() < 0.05
        assert (a - c).abs().mean() < 0.05


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    block = Block(8, 2, 7, False, 0.5)
    first, second = drop_path.draw(0.5, 64, torch.device("cpu"), True)
    assert set(first.flatten().tolist()) == set(second.flatten().tolist()) == {0.0, 2.0}
    assert not torch.equal(first, second)
    x, offsets = torch.randn(64, 1, 5, 8), torch.zeros(49, 49, dtype=torch.int64)
    both, none = torch.ones(64, 1, 1, 1), torch.zeros(64, 1, 1, 1)
    assert torch.equal(block(x, offsets, none, none), x)
    torch.testing.assert_close(block(x, offsets, both, both), block(x, offsets, None, None))
    half = torch.cat((both[:32], none[32:]))
    mixed = block(x, offsets, half, half)
    assert torch.equal(mixed[32:], x[32:])
    assert not torch.equal(mixed[:32], x[:32])
    for rate, training in ((0.5, False), (0.0, True)):
        assert drop_path.draw(rate, 64, torch.device("cpu"), training) == (None, None)
    rates = [
        b.drop_path for s in backbone("swin_tiny", drop_path_rate=0.3).layers for b in s.blocks
    ]
    torch.testing.assert_close(rates, [0.3 * i / 11 for i in range(12)])


@pytest.mark.parametrize(
    ("name", "options"),
    [("swin_tiny", SMALL | {"drop_path_rate": 0.4}), ("resnet18", {"freeze_norm": True})],
)
def test_gradient_checkpointing_changes_nothing_but_memory(name, options):
    model = backbone(name, **options).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x, found = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        kept = []

        def keep(t, kept=kept):
            if t.untyped_storage().data_ptr() not in weights:
                kept.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            maps = model(x)
        sum(m.square().mean() for m in maps).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((sum(kept), [*maps, *grads]))
    (before, want), (after, got) = found
    assert after < 0.7 * before
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


RESNETS = [
    ("resnet50", {"layers": [1, 2, 1, 1]}, {"depths": [1, 2, 1, 1]}),
    (
        "resnet34",
        {"layers": [1, 1, 1, 1]},
        {"depths": [1] * 4, "layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]},
    ),
]


def resnet_pair(name, options, config):
    theirs = ResNetBackbone(ResNetConfig(out_features=STAGES, **config)).double()
    for key, value in theirs.state_dict().items():
        if "normalization" in key and value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.4 + 0.8)
    ours = backbone(name, **options).double()
    ours.load_state_dict(rename(theirs.state_dict(), "resnet"))
    return theirs, ours


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("name", "options", "config"), RESNETS, ids=[r[0] for r in RESNETS])
def test_resnet_is_that_of_transformers(name, options, config, training):
    theirs, ours = resnet_pair(name, options, config)
    assert_same(theirs.train(training), ours.train(training), torch.randn(2, 3, 45, 66), "resnet")
    for key, value in rename(theirs.state_dict(), "resnet").items():
        torch.testing.assert_close(ours.state_dict()[key], value)  # running statistics too


@pytest.mark.parametrize(
    ("name", "depths"),
    [("resnet50", [3, 4, 6, 3]), pytest.param("resnet101", [3, 4, 23, 3], marks=pytest.mark.slow)],
    ids=["resnet50", "resnet101"],
)
def test_whole_resnet_is_that_of_transformers(name, depths):
    theirs, ours = resnet_pair(name, {}, {"depths": depths})
    x = torch.randn(1, 3, 64, 33, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(theirs.eval()(x).feature_maps, ours.eval()(x), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def with_any_norms(model):
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for t in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                nn.init.uniform_(t, 0.5, 1.5)
    return model


PLAIN = [("resnet18", True), ("resnet26", True), ("resnet10t", False), ("seresnet18", False)]


@pytest.mark.parametrize(("name", "plain"), PLAIN, ids=[p[0] for p in PLAIN])
def test_without_gradients_a_resnet_gives_the_same_bits(name, plain):
    """On a CPU; on a GPU what follows its convolutions is one kernel (`ops._norm_relu`)."""
    model = with_any_norms(backbone(name, freeze_norm=True)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, 64, 96)
    for _ in range(2):
        want = [m.detach() for m in model.body(x.to(memory_format=torch.channels_last))]
        with torch.no_grad():
            got = model(x)
        assert resnet.suits(model.body) == plain
        assert all(map(torch.equal, got, want))
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in got)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        next(model.parameters()).data.neg_()  # nothing that was kept could tell
        model.body["bn1"].bias.data.add_(1)
        before = {k: v.clone() for k, v in model.state_dict().items()}
    model.body["layer2"][0].bn1.register_forward_hook(lambda *_: None)
    assert not resnet.suits(model.body)


@pytest.mark.parametrize(("name", "trained"), [("resnet18", True), ("resnet26", False)])
def test_a_resnet_in_steps_has_the_gradients_of_its_layers(name, trained, monkeypatch):
    """As on a GPU, where they have a kernel; weights of the norms may train, statistics not.
    Basic blocks, and bottlenecks."""
    model = with_any_norms(backbone(name, freeze_norm=True)).double().train()
    for norm in model._norms():
        norm.requires_grad_(trained)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    wanted = [p for p in model.parameters() if p.requires_grad]
    results = []
    for steps in (False, True):
        monkeypatch.setattr(timm_backbone, "trains", lambda x, steps=steps: steps)
        assert model._in_steps(x) == steps
        maps = model(x)
        results.append((*maps, *torch.autograd.grad(sum(m.square().sum() for m in maps), wanted)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())
    model.set_grad_checkpointing()
    assert not model._in_steps(x)
    model.set_grad_checkpointing(False)
    model._norms()[3].train()
    assert not model._in_steps(x)


def test_frozen_norms_stay_as_they_are():
    model = backbone("resnet18", freeze_norm=True).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if "bn" in k}
    sum(m.mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    frozen = [k for k, p in model.named_parameters() if not p.requires_grad]
    assert frozen
    assert all("bn" in k or "downsample.1" in k for k in frozen)
    assert model.body.conv1.weight.grad is not None


BACKBONES = [
    ("resnet_digits", (32, 64, 96, 128), 2),
    ("convnext_atto", (40, 80, 160, 320), 4),
    ("efficientnet_b0", (24, 40, 112, 320), 4),
    ("swin_tiny_patch4_window7_224", (96, 192, 384, 768), 4),  # timm's, channels last
]


@pytest.mark.parametrize(("name", "channels", "stride"), BACKBONES, ids=lambda v: str(v))
def test_four_maps_at_doubling_strides(name, channels, stride):
    model = backbone(name)
    maps = model(torch.randn(2, 3, 224, 224))
    assert model.channels == channels
    assert model.strides == tuple(stride * 2**i for i in range(4))
    sides = [224 // s for s in model.strides]
    assert [tuple(m.shape) for m in maps] == [(2, c, s, s) for c, s in zip(channels, sides)]


BAD = [
    ("resnet5O", {}, "timm model, got 'resnet5O'; did you mean resnet50"),
    ("swin_tiney", {}, "did you mean swin_tiny"),
    ("vit_tiny_patch16_224", {}, r"got strides \(16, 16, 16, 16\) from 'vit_tiny_patch16_224'"),
    ("test_resnet_cannot", {}, "backbone must be swin_tiny, swin_small"),
    ("resnet_digits", {"pretrained": True}, "must be False for 'resnet_digits'"),
    ("swin_tiny", {"depths": (2, 2)}, "depths and num_heads must have four entries"),
    ("swin_tiny", {"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
    ("swin_tiny", {"num_heads": (5, 5, 5, 5)}, r"num_heads must divide the channels \(96, 192"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=[b[0] for b in BAD])
def test_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        backbone(name, **options)


def test_pretrained_weights_are_asked_of_timm(monkeypatch):
    asked = {}
    create = timm.create_model

    def create_model(name, pretrained, **options):
        asked[name] = pretrained
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    backbone("resnet18", pretrained=True)
    backbone("resnet10t")
    assert asked == {"resnet18": True, "resnet10t": False}


@pytest.mark.parametrize("kind", ["mask2former", "segmenter"])
def test_a_resumed_training_asks_for_them_no_more(kind, tmp_path, monkeypatch):
    if kind == "mask2former":
        model = replace(Mask2FormerConfig.tiny(11), backbone="resnet10t", num_queries=5)
    else:
        model = replace(SegmenterConfig.preset("Seg-T/16", 11), image_size=(32, 32))
    model = replace(model, backbone_pretrained=True)
    asked, create = [], timm.create_model

    def create_model(name, pretrained, **options):
        built = create(name, pretrained=False, **options)
        asked.extend([name] * pretrained)
        return built

    monkeypatch.setattr(timm, "create_model", create_model)
    task = "panoptic" if kind == "mask2former" else "semantic"
    data = DigitsConfig(size=(32, 32), task=task)
    run = TrainConfig(output=tmp_path, steps=1, batch_size=2, tensorboard=False)
    run = replace(run, data=data, model=model, lr=1e-9)
    first = train(run, progress=False).model.state_dict()
    assert asked == [model.backbone]
    settings = (tmp_path / "model/config.json").read_text()
    again = train(replace(run, steps=2), resume=tmp_path, progress=False).model
    assert asked == [model.backbone]
    assert again.config == model
    assert (tmp_path / "model/config.json").read_text() == settings
    moved = again.state_dict()
    for name, _ in again.named_parameters():  # not those of another draw
        torch.testing.assert_close(moved[name], first[name], rtol=0, atol=1e-4)
