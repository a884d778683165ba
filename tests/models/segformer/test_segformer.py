"""What a SegFormer gives and takes: label maps, results of pictures, presets, bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import segkern
from segkern.models import SegFormer, SegFormerConfig
from segkern.structures.targets import Targets

SIZES = {"hidden_sizes": (8, 16, 40, 64), "depths": (1, 2, 1, 1), "decoder_hidden_size": 24}
SMALL = SegFormerConfig(5, **SIZES, image_size=(64, 64))


def built(**changes):
    torch.manual_seed(0)
    model = SegFormer(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("size", [(64, 64), (45, 70), (29, 131)], ids=lambda s: f"{s[0]}x{s[1]}")
@torch.no_grad()
def test_label_maps_are_those_of_the_logits(size):
    model, x = built().double(), torch.randn(2, 3, *size, dtype=torch.float64)
    whole = F.interpolate(model(x).logits, scale_factor=4, mode="bilinear")
    assert torch.equal(model.label_map(x), whole[:, :, : size[0], : size[1]].argmax(1).int())


def test_pictures_are_taken_as_the_paper_takes_them():
    model = built(shortest_edge=64, longest_edge=128, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    image = np.random.default_rng(0).integers(0, 255, (66, 97, 3), dtype=np.uint8)
    result = segkern.segment(model, image, return_scores=True)
    pixels = torch.from_numpy(image).movedim(2, 0)[None] / 255
    pixels = F.interpolate(pixels, (64, 94), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = model(F.pad(pixels, (0, 2))).logits
    logits = F.interpolate(logits, scale_factor=4, mode="bilinear")[..., :94]
    logits = F.interpolate(logits, (66, 97), mode="bilinear")
    # pixels are rounded to bytes where a picture is resized
    torch.testing.assert_close(result.scores, logits[0].softmax(0), rtol=0, atol=0.02)
    windows = segkern.segment(model, image, window=48, stride=32, flip=True)
    assert windows.segmentation.shape == (66, 97)


@pytest.mark.slow
def test_it_trains_and_its_run_opens(tmp_path):
    config = segkern.recipes.digits_segformer(size=(32, 32))
    changes = {"steps": 3, "batch_size": 2, "evaluate_every": 3, "evaluate_scenes": 2}
    run = segkern.train(replace(config, output=tmp_path, **changes), progress=False)
    opened = segkern.open_model(tmp_path)
    assert opened.config == config.model
    assert all(map(torch.equal, opened.state_dict().values(), run.model.state_dict().values()))
    last = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1]
    assert 0 <= last["metrics"]["miou"] <= 1


# millions of parameters in the paper's table of ADE20K
PAPER = {"b0": 3.8, "b1": 13.7, "b2": 27.5, "b3": 47.3, "b4": 64.1, "b5": 84.7}


@pytest.mark.parametrize("name", PAPER)
def test_presets(name):
    config = SegFormerConfig.preset(name)
    with torch.device("meta"):
        model = SegFormer(config)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(PAPER[name], abs=0.06)
    side = 640 if name == "b5" else 512
    takes = config.input
    assert (takes.crop, takes.shortest_edge, takes.longest_edge) == ((side,) * 2, side, 2048)
    assert takes.window is None
    streets = SegFormerConfig.preset(name, "cityscapes")
    assert (streets.num_labels, streets.input.crop) == (19, (1024, 1024))
    assert (streets.input.window, streets.input.stride) == (1024, 768)


def test_checkpointing_gives_the_same_gradients():
    x, labels, grads = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64)), []
    for enable in (False, True):
        model = built(drop_path_rate=0.5)
        model.gradient_checkpointing_enable(enable)
        torch.manual_seed(1)
        model.train()(x, labels).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_roles():
    model = built()
    roles = model.parameter_roles()
    assert roles.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        role = roles[name]
        assert role.backbone == name.startswith("backbone.")
        assert role.decayed == (p.ndim > 1), name
        assert role.matrix == (".blocks." in name and p.ndim == 2), name
    depths = [roles[f"backbone.stages.{i}.patch_embed.proj.weight"].depth for i in range(4)]
    assert depths == [3, 2, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled(training):
    depths = {"depths": (1, 1, 1, 1), "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    model = built(**depths).train(training)
    x = torch.randn(1, 3, 40, 64)
    want = model(x).logits
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(x).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


INPUTS = {
    "no batch": (lambda m, x: m(x[0]), r"pixel_values must be \[B, 3, H, W\] float"),
    "integers": (lambda m, x: m(x.long()), r"pixel_values must be .* got \[1, 3, 64, 64\] int64"),
    "channels": (lambda m, x: m(x[:, :1]), r"pixel_values must be \[B, 3, H, W\] float"),
    "empty": (lambda m, x: m(x[:0]), r"pixel_values must not be empty"),
    "too small": (lambda m, x: m(x[..., :28]), r"sides >= 29, got \[1, 3, 64, 28\] float32"),
    "labels' batch": (
        lambda m, x: m(x, torch.zeros(2, 64, 64, dtype=torch.int64)),
        r"labels must be \[B, H, W\] int64 with B = 1",
    ),
    "labels' type": (lambda m, x: m(x, torch.zeros(1, 64, 64)), "labels must be .* int64"),
    "a label": (
        lambda m, x: m(x, torch.full((1, 64, 64), 5)),
        r"labels must be in \[0, 5\) or 255, got 5 in image 0",
    ),
    "no map": (
        lambda m, x: m.loss(
            x, Targets.from_lists([torch.ones(1, 64, 64)], [torch.zeros(1).long()])
        ),
        "targets must have a semantic map, got None",
    ),
    "one class": (
        lambda m, x: built(num_labels=1)(x, torch.zeros(1, 64, 64, dtype=torch.int64)),
        "num_labels must be >= 2 for a loss, got 1",
    ),
}


@pytest.mark.parametrize("case", INPUTS)
def test_bad_inputs_are_named(case):
    call, message = INPUTS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call(built(), torch.randn(1, 3, 64, 64))


SETTINGS = {
    "depths": ({"depths": (2, 2, 2)}, r"depths must have 4 numbers, got \(2, 2, 2\)"),
    "a depth": ({"depths": (2, 2, 0, 2)}, "depths must be >= 1, got 0"),
    "text": ({"sr_ratios": ("8", 4, 2, 1)}, "sr_ratios must be an integer, got '8'"),
    "heads": ({"num_attention_heads": (1, 2, 5, 7)}, "num_attention_heads must divide hidden_siz"),
    "even patches": ({"patch_sizes": (8, 3, 3, 3)}, "patch_sizes must be odd and above strides"),
    "small patches": ({"patch_sizes": (3, 3, 3, 3)}, "patch_sizes must be odd and above strides"),
    "rate": ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
    "eps": ({"layer_norm_eps": 0.0}, "layer_norm_eps must be above 0, got 0.0"),
    "stride alone": ({"window_stride": 64}, "window_stride must be None without window_size"),
    "stride": ({"window_size": 64, "window_stride": 65}, r"window_stride must be <= window_size"),
    "backbone": ({"backbone_pretrained": True}, "backbone must name an encoder with backbone_pre"),
    "size": ({"image_size": (64,)}, r"image_size must have 2 numbers, got \(64,\)"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_bad_settings_are_named(case):
    changes, message = SETTINGS[case]
    with pytest.raises((TypeError, ValueError), match=f"SegFormerConfig: {message}"):
        SegFormerConfig(5, **changes)


def test_no_such_preset():
    for name, dataset in (("b6", "ade20k"), ("b0", "coco")):
        with pytest.raises(ValueError, match=r"name must be one of b0, b1.*dataset one of ade20k"):
            SegFormerConfig.preset(name, dataset)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_autocast(training):
    rates = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    model = built(**rates).train(training)
    x, labels, found = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64)), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(x, labels)
        out.loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((out.logits.detach().float(), grads))
    (exact, slope), (mixed, other) = found
    assert not torch.equal(exact, mixed)
    assert (exact - mixed).std() < 0.05 * exact.std()
    assert (slope - other).norm() < 0.1 * slope.norm()
