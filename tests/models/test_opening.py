"""What a checkpoint may be named by, and models that start from one."""

import itertools
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

import segkern
from segkern.models import EoMT, EoMTConfig, find_kind, initialize, open_model
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

MODELS = {
    "Mask2Former": queries,
    "MaskFormer": pyramid,
    "OneFormer": tasks,
    "OneFormer without texts": lambda *a, **c: tasks(*a, is_training=False, **c),
    "Segmenter, mask": pixels,
    "Segmenter, linear": lambda *a, **changes: pixels(*a, decoder="linear", **changes),
    "SegFormer": levels,
    "Seq2Seg, semantic": sequence,
    "Seq2Seg, instance": partial(sequence, head="instance", mask="fine"),
    "U-Net, semantic": convolutions,
    "U-Net, instance": partial(convolutions, head="instance", bert_layers=1),
    "EoMT": tokens,
    "EoMT, DINOv3": lambda *a, **c: tokens(*a, encoder="dinov3", key_bias=False, **c),
}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def equal(one, other, but=()):
    """Names of weights in which two models differ."""
    there = other.state_dict()
    return [
        k for k, v in one.state_dict().items() if k not in but and not torch.equal(v, there[k])
    ]


@models
def test_a_run_opens_by_its_folder_its_parts_and_their_files(build, tmp_path):
    newest, best = build().eval(), build().eval()
    newest.save_pretrained(tmp_path / "model")
    (tmp_path / "last.pt").write_bytes(b"of the training loop")
    parts = ("", "last.pt", "model", "model/config.json", "model/model.safetensors")
    for name in parts:
        assert equal(segkern.open_model(tmp_path / name), newest) == []
        assert equal(type(newest).from_pretrained(str(tmp_path / name)), newest) == []
    best.save_pretrained(tmp_path / "best")
    assert equal(segkern.open_model(tmp_path), best) == []
    assert equal(segkern.open_model(tmp_path / "model"), newest) == []
    (tmp_path / "best/model.safetensors").unlink()
    assert find_kind(tmp_path) == newest.config.kind  # which the weights are not needed for


@models
def test_another_file_is_called_a_file(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    for way in (type(model).from_pretrained, segkern.open_model):
        with pytest.raises(ValueError, match=r"other.safetensors is a file; give the folder"):
            way(tmp_path / "other.safetensors")


@models
@pytest.mark.parametrize("labels", [3, 7], ids=["same labels", "other labels"])
def test_a_model_starts_from_a_run(build, labels, tmp_path):
    build().save_pretrained(tmp_path / "model")
    donor, model = segkern.open_model(tmp_path), build(labels).double().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    line = initialize(model, tmp_path)
    head = () if labels == 3 else model.class_head
    assert model.training
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert equal(model, donor.double(), (*head, "criterion.empty_weight")) == []
    for name in before.keys() & set(head):
        assert torch.equal(model.state_dict()[name], before[name]), name
    assert ("class head (3 labels there, 7 here)" in line) == (labels == 7)
    again = type(model).from_pretrained(tmp_path, num_labels=labels)
    assert again.config.num_labels == labels
    assert equal(again.double(), model, head) == []


@models
def test_layers_that_share_a_tensor_are_saved(build, tmp_path):
    model = build().eval()
    biased = [m for m in model.modules() if getattr(m, "bias", None) is not None]
    pairs = itertools.combinations(biased, 2)
    one, other = next((a, b) for a, b in pairs if a.bias.shape == b.bias.shape)
    other.bias = one.bias
    model.save_pretrained(tmp_path)
    assert equal(type(model).from_pretrained(tmp_path), model) == []


BAD = [
    ({"num_labels": 0}, "num_labels must be >= 1, got 0"),
    ({"num_labels": -1}, "num_labels must be >= 1, got -1"),
    ({"image_mean": ()}, "image_mean must be numbers, one a channel, got \\(\\)"),
    ({"image_std": (0.5, 0.5)}, "image_std must have 3 numbers, one a channel as image_mean"),
    ({"image_std": (0.5, 0.5, 0.0)}, "image_std must be numbers above 0, one a channel"),
]


@models
@pytest.mark.parametrize(("settings", "message"), BAD, ids=str)
def test_settings_that_no_model_has(build, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(**settings)
    if "num_labels" in settings:
        model = build()
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            type(model).from_pretrained(tmp_path, **settings)


UNFIT = {
    "another kind": (queries, pixels, "is a mask2former, the model a segmenter"),
    "another kind of masks": (pyramid, queries, "is a maskformer, the model a mask2former"),
    "another shape": (
        pixels,
        lambda: pixels(image_size=(64, 32)),
        r"encoder.pos_embed \[1, 5, 64\] instead of \[1, 9, 64\]",
    ),
    "another depth": (pixels, lambda: pixels(depth=2), "missing: encoder.blocks.1"),
    "other heads": (pixels, lambda: pixels(num_heads=2), "num_heads is 1 there, 2 here"),
    "another sum": (sequence, lambda: sequence(skip=False), "skip is True there, False here"),
    "another head": (convolutions, MODELS["U-Net, instance"], "missing: bert.pos_embed"),
    "other frequencies": (
        MODELS["EoMT, DINOv3"],
        lambda: MODELS["EoMT, DINOv3"](rope_theta=10.0),
        "rope_theta is 100.0 there, 10.0 here",
    ),
    "other points": (
        queries,
        lambda: queries(num_attention_heads=4, num_points_encoder=8),
        "num_attention_heads is 8 there, 4 here; num_points_encoder is 4 there, 8 here",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_named_and_not_loaded(case, tmp_path):
    donor, build, message = UNFIT[case]
    donor().save_pretrained(tmp_path)
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialize(model, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_losss_own_numbers_stay_the_configs(tmp_path):
    queries(no_object_weight=0.5).save_pretrained(tmp_path)
    model = queries()
    initialize(model, tmp_path)
    assert model.criterion.empty_weight[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".bin", ".ckpt"])
def test_files_that_are_not_there_are_called_so(suffix, tmp_path):
    name = f"model{suffix}"
    with pytest.raises(ValueError, match=f"no such file: .*{name}|{name}: no such file"):
        open_model(tmp_path / f"model{suffix}")


HOMES = {
    "SegFormer, pth": (levels, "model.pth", ""),
    "EoMT, bin": (lambda: EoMT(replace(EoMTConfig.tiny(3), num_attention_heads=2)), "a.bin", ""),
    "Segmenter, a file of its folder": (pixels, "model", "/checkpoint.pth"),
}


@pytest.mark.parametrize("case", HOMES)
@pytest.mark.filterwarnings("ignore:.*(no published checkpoint|weights alone|layer_norm_eps)")
def test_a_tilde_is_the_home(case, tmp_path, monkeypatch):
    build, name, inside = HOMES[case]
    monkeypatch.setenv("HOME", str(tmp_path))
    model = build()
    model.save_original(tmp_path / name)
    for way in (open_model, type(model).from_pretrained):
        assert isinstance(way(f"~/{name}{inside}"), type(model))


def test_weights_of_a_segmenter_alone_are_told_what_they_lack(tmp_path):
    pixels().save_original(tmp_path)
    (tmp_path / "variant.yml").unlink()
    with pytest.raises(ValueError, match=r"lie beside variant\.yml \(segmenter\)"):
        open_model(tmp_path / "checkpoint.pth")
