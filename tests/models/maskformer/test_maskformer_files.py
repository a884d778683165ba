"""MaskFormer in Hugging Face's format both ways: names, settings, and what is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MaskFormerConfig as ReferenceConfig
from transformers import MaskFormerForInstanceSegmentation as Reference
from transformers import (
    MaskFormerImageProcessor,
    MaskFormerSwinConfig,
    ResNetConfig,
    SwinConfig,
    TimmBackboneConfig,
)

import segkern
from segkern.models import MaskFormer, MaskFormerConfig
from segkern.models.maskformer.huggingface import (
    from_huggingface,
    read_config,
    read_folder,
    to_huggingface,
    write_config,
)

with torch.device("meta"):
    torch.empty(0)  # torch keeps a list of its constructors, before conftest replaces this one

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 4], "window_size": 4}
BACKBONES = {
    "swin": SwinConfig(**SWIN, out_features=STAGES),
    "resnet": ResNetConfig(depths=[1, 1, 1, 1], out_features=STAGES),
    "timm_backbone": TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3, 4]),
}
DECODER = {"model_type": "detr", "d_model": 64, "num_queries": 5, "decoder_layers": 2}
DECODER |= {"decoder_ffn_dim": 48, "decoder_attention_heads": 4, "dropout": 0.0}


def their_config(backbone):
    sizes = {"fpn_feature_size": 64, "mask_feature_size": 32, "num_labels": 7}
    return ReferenceConfig(backbone_config=backbone, decoder_config=dict(DECODER), **sizes)


@pytest.fixture(scope="module", params=BACKBONES)
def written(request, tmp_path_factory):
    """(family, transformers' model with random weights, the folder that it wrote)."""
    torch.manual_seed(1)
    model = Reference(their_config(BACKBONES[request.param])).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.fixture
def folder(tmp_path):
    MaskFormer(MaskFormerConfig.tiny(7)).save_pretrained(tmp_path)
    return tmp_path


def test_spellings_on_disk_and_in_memory_are_one(written):
    family, model, folder = written
    disk, memory = load_file(folder / "model.safetensors"), model.state_dict()
    ours = from_huggingface(disk, family)
    assert from_huggingface(memory, family).keys() == ours.keys()
    assert all(torch.equal(v, ours[k]) for k, v in from_huggingface(memory, family).items())
    parts = r"(backbone|pixel_decoder|query_decoder|criterion)\."
    assert all(re.match(parts, name) for name in ours)
    back = to_huggingface(ours, family, SWIN["window_size"] if family == "swin" else None)
    assert back.keys() == disk.keys()
    for name, value in disk.items():  # one norm is never used
        assert ".model.layernorm." in name or torch.equal(back[name], value), name
    assert any("encoder_attn.o_proj" in name for name in memory)
    assert any("encoder_attn.out_proj" in name for name in disk)


def test_the_same_logits_both_ways(written, tmp_path):
    _, theirs, folder = written
    ours = segkern.open_model(folder)
    assert isinstance(ours, MaskFormer)
    ours.save_pretrained(tmp_path)
    again, info = Reference.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, nothing unexpected
    x = torch.randn(2, 3, 70, 96)
    with torch.no_grad():
        results = [model(x) for model in (theirs, ours, again.eval())]
    for other in results[1:]:
        for field in ("class_queries_logits", "masks_queries_logits"):
            expected = getattr(results[0], field)
            torch.testing.assert_close(getattr(other, field), expected, rtol=1e-4, atol=1e-4)


def test_settings_come_back(written):
    folder = written[2]
    settings = read_config(json.loads((folder / "config.json").read_text())) | {"stuff": (1, 3)}
    assert (settings["hidden_dim"], settings["num_queries"]) == (64, 5)
    assert settings["use_auxiliary_loss"] is False  # transformers' default
    again = read_config(json.loads(json.dumps(write_config(settings))))
    assert json.dumps(again, sort_keys=True) == json.dumps(settings, sort_keys=True)


def test_transformers_own_swin_and_the_hubs_are_one():
    hub = read_config(their_config(SwinConfig(out_features=STAGES)).to_dict())
    own = their_config(SwinConfig(out_features=STAGES)).to_dict()
    own["backbone_config"] = MaskFormerSwinConfig(out_features=STAGES).to_dict()
    assert own["backbone_config"]["model_type"] == "maskformer-swin"
    assert read_config(own) == hub
    assert (hub["backbone"], hub["backbone_options"]) == ("swin_tiny", {})


@pytest.mark.parametrize("backbone", ["swin_tiny", "swin_base", "resnet50"])
def test_published_models_have_a_place_for_every_key(backbone):
    """Names and shapes of whole checkpoints, without their weights."""
    config = MaskFormerConfig.preset(backbone, task="semantic")
    settings = write_config({**vars(config)})
    family = settings["backbone_config"]["model_type"]
    with torch.device("meta"):
        ours = MaskFormer(config).state_dict()
        theirs = Reference(ReferenceConfig.from_dict(settings)).state_dict()
    expected = {k: list(v.shape) for k, v in from_huggingface(theirs, family).items()}
    assert expected == {k: list(v.shape) for k, v in ours.items()}
    if backbone == "swin_tiny":
        assert len(theirs) == 432  # of the published ones


def test_transformers_reads_our_preprocessor(tmp_path):
    config = MaskFormerConfig.tiny(3)
    config.image_mean, config.shortest_edge, config.longest_edge = (0.4, 0.5, 0.6), 96, 160
    MaskFormer(config).save_pretrained(tmp_path)
    processor = MaskFormerImageProcessor.from_pretrained(tmp_path)
    assert (processor.size.shortest_edge, processor.size.longest_edge) == (96, 160)
    assert processor.size_divisor == 16
    assert tuple(processor.image_mean) == (0.4, 0.5, 0.6)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "MaskFormerImageProcessor"


def test_the_tiny_model_comes_back(tmp_path):
    model = MaskFormer(MaskFormerConfig.tiny(3)).eval()
    model.config.id2label, model.config.stuff = {0: "a", 1: "b", 2: "c"}, (1,)
    model.save_pretrained(tmp_path)
    again = MaskFormer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def edited(**decoder):
    return {"decoder_config": {"model_type": "detr"} | decoder}


OPTIONS = [
    ({"model_type": "mask2former"}, "model_type must be maskformer, got mask2former"),
    (edited(model_type="conditional_detr"), "decoder_config: model_type must be detr, got cond"),
    (edited(auxiliary_loss=True), "decoder_config: auxiliary_loss must be False, got True"),
    (edited(activation_function="gelu"), "activation_function must be relu, got gelu"),
    (
        {"backbone_config": {"model_type": "focalnet"}, "segkern": {}},
        "the backbone must be swin, dinat, resnet or timm_backbone, got focalnet",
    ),
    ({"id2label": {str(i): "x" for i in range(4)}}, "names 4 classes, the weights have 7"),
    ({"id2label": {"1": "a", "2": "b"}}, "id2label must name labels 0, 1, 2"),
]


@pytest.mark.parametrize(("change", "message"), OPTIONS, ids=[o[1][:30] for o in OPTIONS])
def test_options_that_are_not_here_are_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


SPOILED = [  # without, with, message
    ("", {"bert.layer": torch.zeros(2)}, "MaskFormer: .* unexpected: bert.layer"),
    ("class_predictor.bias", {}, "missing: query_decoder.class_embed.bias"),
    (
        "",
        {"model.transformer_module.queries_embedder.weight": torch.zeros(4, 64)},
        r"query_decoder.query_embed.weight \[4, 64\] instead of \[8, 64\]",
    ),
]


@pytest.mark.parametrize(("less", "more", "message"), SPOILED, ids=["foreign", "missing", "shape"])
def test_weights_that_do_not_fit_are_named(folder, less, more, message):
    state = load_file(folder / "model.safetensors")
    state = {k: v for k, v in state.items() if k != less} | more
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        MaskFormer.from_pretrained(folder)
