"""Fine-tuning: what is taken from a checkpoint, parts that stay, and rates by level."""

import re
from dataclasses import replace

import pytest
import torch
from test_loop import config
from test_step import SMALL_SWIN
from test_validation import maps, of_maps  # noqa: F401  (a fixture)

from segkern.models import Mask2Former, Segmenter, SegmenterConfig, build_model, initialize
from segkern.training import loop
from segkern.training.config import TrainConfig
from segkern.training.loop import train
from segkern.training.optimizer import build_optimizer, freeze, parameter_groups


def named(count, *names):
    """A config of so many labels, the first of which have names."""
    setting = config("unused").model
    return replace(setting, num_labels=count, id2label=dict(enumerate(names)) or None)


ABC, ABD = ("a", "b", "c"), ("a", "b", "d")
STARTS = [
    ("same", named(3, *ABC), False, r"all \d+ weights are those of \S+$"),
    ("renamed", named(3, *ABD), False, r"all .* too, where label 2 was 'c' and is 'd' now \("),
    ("fresh", named(3, *ABD), True, r"new is the class head \(3 labels there, 3 here\)"),
    ("more", named(5), False, r"new is the class head \(3 labels there, 5 here\)"),
]


@pytest.mark.parametrize(
    ("model", "fresh", "line"), [s[1:] for s in STARTS], ids=next(zip(*STARTS))
)
def test_what_is_reused_and_what_is_new(model, fresh, line, tmp_path):
    there, here = Mask2Former(named(3, *ABC)), Mask2Former(model)
    there.save_pretrained(tmp_path)
    own = {name: value.clone() for name, value in here.state_dict().items()}
    said = initialize(here, tmp_path, fresh)
    assert re.search(line, said)
    for name, value in here.state_dict().items():
        new = name.startswith("criterion.") or (name in here.class_head and "new is" in said)
        wanted = own[name] if new else there.state_dict()[name]
        assert torch.equal(value, wanted), name


def test_the_weights_that_are_new_are_counted(tmp_path):
    sizes = {"image_size": (32, 32), "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}
    there, here = (Segmenter(SegmenterConfig(num_labels=n, **sizes)) for n in (3, 4))
    there.save_pretrained(tmp_path)
    kept, everything = re.match(r"(\d+) of (\d+) ", initialize(here, tmp_path)).groups()
    donor = there.state_dict()
    same = [k for k, value in here.state_dict().items() if value.shape == donor[k].shape]
    assert (int(kept), int(everything)) == (len(same), len(donor))


PARTS = [
    ("mask2former", ("backbone", "pixel_decoder"), "adamw"),
    ("mask2former", ("backbone.stages.0",), "muon"),
    ("segmenter", ("encoder",), "adamw"),
    ("segmenter", ("decoder", "encoder.blocks.0"), "muon"),
]


@pytest.mark.parametrize(("kind", "parts", "optimizer"), PARTS, ids=lambda x: str(x))
def test_frozen_parts_stay_and_take_no_state(kind, parts, optimizer, maps, tmp_path):  # noqa: F811
    settings = {"steps": 2, "freeze": parts, "optimizer": optimizer, "warmup": 0}
    make = config if kind == "mask2former" else lambda *a, **k: of_maps(maps, *a, **k)
    setting = make(tmp_path / "run", **settings)
    start = build_model(setting.model)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    run = train(setting, model=start, progress=False)
    for name, value in run.model.state_dict().items():
        moved = not torch.equal(value, before[name])
        if name.startswith(tuple(f"{part}." for part in parts)):
            assert not moved, name  # statistics of norms neither
        elif name.endswith("weight") and "criterion" not in name:
            assert moved, name
    frozen = {id(p) for part in parts for p in run.model.get_submodule(part).parameters()}
    assert all(p.grad is None for p in run.model.parameters() if id(p) in frozen)
    assert all(p.requires_grad for p in run.model.parameters())  # for the next training
    assert {id(p) for p in freeze(run.model, parts)} == frozen
    groups = build_optimizer(run.model, setting).param_groups
    assert not frozen & {id(p) for group in groups for p in group["params"]}
    more = train(replace(setting, steps=3), resume=tmp_path / "run", progress=False)
    assert more.steps == 3


def test_what_was_frozen_trains_again_after_a_run_that_failed(tmp_path, monkeypatch):
    setting = config(tmp_path / "run", steps=2, freeze=("backbone",))
    model = build_model(setting.model)
    monkeypatch.setattr(loop, "learning_rate", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(setting, model=model, progress=False)
    assert all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_frozen(maps, tmp_path):  # noqa: F811
    parts = "backbone, pixel_decoder, query_decoder, or parts of these, got 'neck'"
    with pytest.raises(ValueError, match=f"freeze must name parts of the model: {parts}"):
        train(config(tmp_path, freeze=("neck",)), progress=False)
    with pytest.raises(
        ValueError, match="freeze must leave a part to train, got encoder, decoder"
    ):
        train(of_maps(maps, tmp_path, freeze=("encoder", "decoder")), progress=False)
    with pytest.raises(ValueError, match="fresh_head must be False without init"):
        config(tmp_path, fresh_head=True)
    with pytest.raises(ValueError, match=r"backbone_level_decay must be in \(0, 1\], got 0"):
        config(tmp_path, backbone_level_decay=0.0)


def model_with(backbone):
    setting = config("unused").model
    if backbone == "segmenter":
        return of_maps(".", "unused").model
    options = SMALL_SWIN if backbone == "swin_tiny" else {}
    return replace(setting, backbone=backbone, backbone_options=options)


LEVELS = {  # of parameters the level from the image on
    "resnet_digits": {"stem.0.weight": 0, "stages.0": 0, "stages.2": 2, "stages.3": 3},
    "swin_tiny": {"patch_embed": 0, "layers.0": 0, "layers.1": 1, "layers.3": 3, "norms": 3},
    "resnet18": {"body.conv1": 0, "body.layer1": 0, "body.layer2": 1, "body.layer4": 3},
    "efficientnet_b0": {"body.conv_stem": 0, "body.blocks.3": 2, "body.blocks.6": 3},
    "convnext_atto": {"body.stem_0": 0, "body.stages_1": 1, "body.stages_3": 3},
    "segmenter": {"pos_embed": 0, "blocks.0": 0, "norm": 0},
}


@pytest.mark.parametrize("backbone", LEVELS)
def test_rates_fall_by_level_towards_the_image(backbone):
    setting = TrainConfig(
        backbone_lr_factor=0.5, backbone_level_decay=0.1, model=config("unused").model
    )
    model = build_model(model_with(backbone))
    prefix = "encoder." if backbone == "segmenter" else "backbone."
    names = {id(p): n for n, p in model.named_parameters()}
    levels, top = LEVELS[backbone], max(LEVELS[backbone].values())
    seen = set()
    for group in parameter_groups(model, setting):
        for name in (names[id(p)] for p in group["params"]):
            if not name.startswith(prefix):
                assert group["factor"] == 1.0
                continue
            name = name.removeprefix(prefix)
            for part in (part for part in levels if f"{name}.".startswith(f"{part}.")):
                seen.add(part)
                wanted = 0.5 * 0.1 ** (top - levels[part])
                assert group["factor"] == pytest.approx(wanted), name
    assert seen == levels.keys()
