"""A Segmenter's folders: the original's format and ours, both ways, and what damages them."""

import argparse
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_segmenter import CASES, SMALL

import segkern
from segkern.models.segmenter.config import SegmenterConfig
from segkern.models.segmenter.model import Segmenter

WAYS = {"segkern": Segmenter.save_pretrained, "original": Segmenter.save_original}


def random_model(**changes):
    torch.manual_seed(1)
    return Segmenter(replace(SMALL, **changes)).eval()


@pytest.mark.parametrize("format", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_folders_open_as_they_were_random_model(case, format, tmp_path):
    model = random_model(**CASES[case])
    WAYS[format](model, tmp_path)
    again = Segmenter.from_pretrained(tmp_path)
    wanted = asdict(model.config)
    assert again.config.input == model.config.input
    if format == "original" and model.config.decoder == "linear":
        wanted |= {k: getattr(SegmenterConfig(), k) for k in ("decoder_layers", "decoder_dropout")}
    if format == "original":
        wanted |= {k: getattr(model.config.input, k) for k in ("shortest_edge", "longest_edge")}
    assert asdict(again.config) == wanted
    assert not again.training
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name


def test_the_original_format_has_the_originals_names(tmp_path):
    random_model(distilled=True).save_original(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    assert state["encoder.head.weight"].shape == (1000, 64)
    assert state["encoder.head_dist.bias"].shape == (1000,)
    assert type(segkern.open_model(tmp_path / "checkpoint.pth")) is Segmenter  # not another's .pth
    text = (tmp_path / "variant.yml").read_text()
    assert "!!python/tuple" in text
    variant = yaml.load(text, yaml.FullLoader)
    assert variant["net_kwargs"]["decoder"]["name"] == "mask_transformer"
    assert variant["net_kwargs"]["image_size"] == (64, 64)


DAMAGED = {
    "no variant.yml": ("variant.yml", None, "it has no variant.yml"),
    "no checkpoint.pth": ("checkpoint.pth", None, "it has no checkpoint.pth"),
    "yaml cut short": ("variant.yml", b"a: [1, ", "variant.yml cannot be read: while parsing"),
    "cut checkpoint": ("checkpoint.pth", b"PK\x03\x04 cut", "not a whole checkpoint"),
    "foreign yaml": ("variant.yml", b"a: 1\n", "has no section net_kwargs"),
    "code in yaml": (
        "variant.yml",
        b"net_kwargs: !!python/object/apply:os.system ['true']\n",
        "has no section net_kwargs",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folders_are_named(case, tmp_path):
    name, content, message = DAMAGED[case]
    random_model().save_original(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Segmenter.from_pretrained(tmp_path)


def ran(*_):
    raise AssertionError("a checkpoint ran code")


class Code:
    """What runs something where it is unpickled."""

    def __init__(self, function=None, *arguments):
        self.call = function or ran, arguments

    def __reduce__(self):
        return self.call


HARMLESS = {
    "NumPy's scalar": np.float64(0.5),
    "NumPy's integer": np.int64(7),
    "NumPy's array": np.arange(3.0),
    "frozenset": frozenset("ab"),
    "argparse.Namespace": argparse.Namespace(lr=1e-3, output_dir=Path("runs"), best=np.float32(1)),
}


@pytest.mark.parametrize("value", HARMLESS.values(), ids=HARMLESS)
def test_what_people_keep_beside_weights_does_not_matter(value, tmp_path):
    allowed = set(torch.serialization.get_safe_globals())
    model = random_model()
    model.save_original(tmp_path)
    path = tmp_path / "checkpoint.pth"
    torch.save(torch.load(path) | {"args": value}, path)
    again = Segmenter.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    added = set(torch.serialization.get_safe_globals()) - allowed
    assert all(kind.__module__.startswith("torch.") for kind in added)


def test_code_is_named_and_does_not_run(tmp_path):
    random_model().save_original(tmp_path)
    path = tmp_path / "checkpoint.pth"
    whole = torch.load(path)
    for code, name in ((Code(), r"\S+\.ran"), (Code(os.system, "exit"), "posix.system")):
        torch.save(whole | {"args": code}, path)
        with pytest.raises(ValueError, match=f"pth: holds a {name}, which is code") as found:
            Segmenter.from_pretrained(tmp_path)
        assert str(found.value).isprintable()
    text = (tmp_path / "variant.yml").read_text()
    tag = "log_dir: !!python/object/apply:pathlib.PosixPath [runs]\n"
    (tmp_path / "variant.yml").write_text(tag + text)
    random_model().save_original(tmp_path / "whole")
    (tmp_path / "whole/checkpoint.pth").rename(path)
    Segmenter.from_pretrained(tmp_path)


NAMED = {
    "decoder": ("name: mask_transformer", "name: deeplab_dec", "decoder.name must be one of mask"),
    "normalization": ("ion: vit", "ion: clip", "normalization must be one of vit, deit, got clip"),
    "no depth": ("  n_layers: 2\n  normal", "  normal", "has no n_layers in net_kwargs"),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_cannot_be_obeyed_is_named(case, tmp_path):
    old, new, message = NAMED[case]
    random_model().save_original(tmp_path)
    path = tmp_path / "variant.yml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        Segmenter.from_pretrained(tmp_path)


def test_unknown_settings_and_other_shapes_are_named(tmp_path):
    random_model().save_original(tmp_path)
    path = tmp_path / "variant.yml"
    text = path.read_text()
    path.write_text(text.replace("  distilled: false", "  distilled: false\n  colour: blue"))
    with pytest.warns(UserWarning, match="not known and not used, in net_kwargs: colour"):
        Segmenter.from_pretrained(tmp_path)
    path.write_text(text.replace("n_layers: 2", "n_layers: 3"))
    with pytest.raises(ValueError, match=r"does not fit the model; missing: encoder\.blocks\.2"):
        Segmenter.from_pretrained(tmp_path)


@pytest.mark.parametrize("format", WAYS)
@pytest.mark.parametrize("decoder", ["mask", "linear"])
def test_another_number_of_labels_is_named(decoder, format, tmp_path):
    WAYS[format](random_model(decoder=decoder), tmp_path)
    path = tmp_path / {"segkern": "config.json", "original": "variant.yml"}[format]
    text = path.read_text()
    for name in ("n_cls: ", '"num_labels": '):
        text = text.replace(f"{name}5", f"{name}6")
    path.write_text(text)
    with pytest.raises(ValueError, match="has weights for 5 labels, its settings say 6"):
        Segmenter.from_pretrained(tmp_path)


OWN = {
    "unknown setting": ({"colour": "blue"}, ValueError, "has unknown settings: colour"),
    "text for a number": (
        {"patch_size": "16"},
        TypeError,
        "patch_size must be an integer, got '16'",
    ),
    "another decoder": ({"decoder": "linear"}, ValueError, "missing: decoder.head.weight"),
    "another model": ({"model_type": "mask2former"}, ValueError, "is not of a Segmenter"),
}


@pytest.mark.parametrize("case", OWN)
def test_bad_settings_in_our_format(case, tmp_path):
    change, error, message = OWN[case]
    random_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        Segmenter.from_pretrained(tmp_path)


def test_settings_that_are_missing_have_their_defaults(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    for name in ("backbone", "backbone_pretrained", "image_mean"):
        del settings[name]
    path.write_text(json.dumps(settings))
    assert Segmenter.from_pretrained(tmp_path).config == model.config


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, (128, 128, 128, 512)),
        ({"image_size": (64, 96)}, (64, 64, 64, 256)),
        ({"window_size": 32}, (32, 32, 128, 512)),
        ({"window_stride": 100}, (128, 100, 128, 512)),
        ({"shortest_edge": 200}, (128, 128, 200, 800)),
        ({"longest_edge": 300}, (128, 128, 128, 300)),
    ],
    ids=str,
)
def test_sizes_that_are_not_given_follow_the_crops(changes, sizes):
    preset = SegmenterConfig.preset("Seg-T/16", 5)
    takes = replace(preset, **{"image_size": (128, 128)} | changes).input
    assert (takes.window, takes.stride, takes.shortest_edge, takes.longest_edge) == sizes


def test_a_variant_without_inference_has_the_sizes_of_its_crops(tmp_path):
    random_model().save_original(tmp_path)
    path = tmp_path / "variant.yml"
    variant = yaml.load(path.read_text(), yaml.FullLoader)
    del variant["inference_kwargs"]
    path.write_text(yaml.dump(variant))
    assert Segmenter.from_pretrained(tmp_path).config.input.window == 64
