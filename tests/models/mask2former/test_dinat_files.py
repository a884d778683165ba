"""Mask2Former with a DiNAT: Hugging Face's files both ways, and those of the original code."""

import contextlib
import json
import pickle
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from test_original import as_the_original
from transformers import DinatConfig, Mask2FormerForUniversalSegmentation
from transformers import Mask2FormerConfig as TheirConfig
from transformers.models.dinat import modeling_dinat

from segkern.models import Mask2Former, Mask2FormerConfig, open_model
from segkern.models.mask2former import huggingface, original
from segkern.nn.backbones import dinat
from segkern.weights.state_dicts import misfits

SMALL = {
    "embed_dim": 24,
    "depths": [1, 2, 1, 1],
    "num_heads": [3, 3, 4, 8],
    "kernel_size": 3,
    "dilations": [[2], [1, 3], [1], [1]],
    "mlp_ratio": 2.0,
    "layer_scale": 0.1,
}
LARGE = [[1, 14, 1], [1, 4, 1, 7], [1, 2] + [1, 3, 1, 2] * 3 + [1, 3, 1, 3], [1, 1, 1, 1, 1]]


def config(name="dinat_tiny", **options):
    tiny = Mask2FormerConfig.tiny(133)
    return replace(tiny, backbone=name, backbone_options=options, num_queries=9, size_divisor=32)


SETTINGS = {
    "a variant": ("dinat_base", {}),
    "its own kernel": ("dinat_large", {"kernel_size": 11}),
    "its own dilations": ("dinat_large", {"kernel_size": 11, "dilations": LARGE}),
    "mini, which is transformers' default": ("dinat_mini", {}),
    "no variant": ("dinat_tiny", SMALL),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_go_there_and_back(case):
    name, options = SETTINGS[case]
    settings = vars(config(name, **options)) | {"drop_path_rate": 0.3}
    written = json.loads(json.dumps(huggingface.write_config(settings)))
    theirs = DinatConfig(**written["backbone_config"])
    sizes = dinat.arguments(name, options)
    for there, here in (("embed_dim", "embed_dim"), ("layer_scale_init_value", "layer_scale")):
        assert getattr(theirs, there) == sizes[here]
    assert list(theirs.dilations) == sizes["dilations"]
    assert theirs.out_features == ["stage1", "stage2", "stage3", "stage4"]
    written.pop("segkern")  # as others write it
    read = huggingface.read_config(written)
    assert (read["backbone"], read["drop_path_rate"]) == (name, 0.3)
    assert dinat.arguments(name, read["backbone_options"]) == sizes
    if case != "no variant":
        assert read["backbone_options"] == options


def test_a_file_without_sizes_has_those_of_transformers():
    backbone = {"model_type": "dinat", "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    read = huggingface.read_config({"model_type": "mask2former", "backbone_config": backbone})
    assert (read["backbone"], read["backbone_options"]) == ("dinat_mini", {})
    theirs, sizes = DinatConfig(), dinat.arguments("dinat_mini", {})
    assert list(theirs.depths) == sizes["depths"]
    assert theirs.dilations == sizes["dilations"]
    assert (theirs.kernel_size, theirs.mlp_ratio) == (sizes["kernel_size"], sizes["mlp_ratio"])


def test_what_transformers_cannot_choose_here_is_refused():
    backbone = {"model_type": "dinat", "qkv_bias": False, "out_features": ["stage4"]}
    with pytest.raises(ValueError, match="out_features must be stage1, stage2"):
        huggingface.read_config({"model_type": "mask2former", "backbone_config": backbone})
    del backbone["out_features"]
    with pytest.raises(ValueError, match="qkv_bias"):
        huggingface.read_config({"model_type": "mask2former", "backbone_config": backbone})


@pytest.mark.parametrize("scale", [0.1, 0.0], ids=["layer scale", "none"])
def test_weights_that_transformers_wrote_and_reads(scale, tmp_path, monkeypatch):
    """transformers asks for NATTEN before it makes a DiNAT, though it makes no use of it there."""
    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *_: None)
    ours = Mask2Former(config(**SMALL | {"layer_scale": scale})).eval()
    ours.save_pretrained(tmp_path / "ours")
    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert "segkern" in json.loads((tmp_path / "theirs/config.json").read_text())
    again = open_model(tmp_path / "theirs")
    for name, value in ours.state_dict().items():
        if name != "criterion.seed":
            assert torch.equal(again.state_dict()[name], value), name
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert torch.equal(again(x).class_queries_logits, ours(x).class_queries_logits)
    fresh = TheirConfig.from_pretrained(tmp_path / "ours")
    torch.manual_seed(1)
    Mask2FormerForUniversalSegmentation(fresh).save_pretrained(tmp_path / "fresh")
    opened = open_model(tmp_path / "fresh").state_dict()
    key = "backbone.layers.1.blocks.1.attn.rpb"
    assert opened[key].shape == ours.state_dict()[key].shape


def as_published(model):
    """The state dict of a model under the names of the original code with a DiNAT."""
    state = as_the_original(model)
    return OrderedDict(
        (name.replace("backbone.layers.", "backbone.levels."), value)
        for name, value in state.items()
    )


PUBLISHED = {"kernel_size": 11, "dilations": LARGE}


@pytest.mark.parametrize("labels", [80, 150], ids=["COCO", "ADE20K"])
def test_a_dinat_large_is_told_from_its_weights(labels):
    """All names of one, and what the file does not hold: the dilations that all published have."""
    preset = Mask2FormerConfig(
        labels, "dinat_large", backbone_options=PUBLISHED, drop_path_rate=0.3, num_queries=200
    )
    with torch.device("meta"):
        own = Mask2Former(preset).state_dict()
    own.pop("criterion.seed")
    names = {}
    for name in own:  # as SHI-Labs' files have the backbone's
        there = name.replace("backbone.layers.", "backbone.levels.")
        names[there.replace("backbone.norms.", "backbone.norm")] = own[name]
    assert names["backbone.levels.0.blocks.0.attn.rpb"].shape == (6, 21, 21)
    assert {"backbone.norm3.bias", "backbone.patch_embed.proj.1.weight"} <= names.keys()
    backbone = {n: v for n, v in names.items() if n.startswith("backbone.")}
    weights = original.from_original(backbone) | {
        n: v for n, v in own.items() if not n.startswith("backbone.")
    }
    assert misfits(weights, own) == []
    settings = original.read_sizes(weights, "model.pkl")
    assert settings["backbone"] == "dinat_large"
    assert settings["backbone_options"] == PUBLISHED
    assert (settings["drop_path_rate"], settings["num_queries"]) == (0.3, 200)


@pytest.mark.parametrize("told", [False, True], ids=["weights alone", "config.yaml"])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_file_with_a_dinat_opens_to_the_same_model(suffix, told, tmp_path):
    """Its dilations are in config.yaml beside it, or else those of classifiers, with a warning."""
    sizes = SMALL | {"layer_scale": 1e-5}
    if not told:
        sizes["dilations"] = [[1], [1, 4], [1], [1]]
    model = Mask2Former(config(**sizes)).eval()
    path = tmp_path / f"model_final{suffix}"
    content = {"model": as_published(model), "__author__": "someone"}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save({"model": {n: torch.tensor(v) for n, v in content["model"].items()}}, path)
    said = pytest.warns(UserWarning, match="it gets those of classifiers")
    if told:
        backbone = {"NAME": "D2DiNAT"}
        of_dinat = {"DILATIONS": sizes["dilations"], "KERNEL_SIZE": 3, "DROP_PATH_RATE": 0.2}
        content = {"VERSION": 2, "MODEL": {"BACKBONE": backbone, "DINAT": of_dinat}}
        (tmp_path / "config.yaml").write_text(json.dumps(content))  # which is YAML, too
        said = contextlib.nullcontext()
    with said:
        opened = open_model(str(path))
    assert ("dilations" in opened.config.backbone_options) == told
    assert opened.config.drop_path_rate == (0.2 if told else 0.3)
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(opened(x).class_queries_logits, model(x).class_queries_logits)
