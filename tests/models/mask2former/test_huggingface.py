"""Hugging Face's format both ways: names, folders, settings, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
    SwinConfig,
    TimmBackboneConfig,
)

from segkern.models import Mask2Former
from segkern.models import Mask2FormerConfig as OurConfig
from segkern.models.mask2former import huggingface
from segkern.models.mask2former.huggingface import read_config, read_folder, write_config
from segkern.models.mask2former.huggingface_keys import from_huggingface, to_huggingface
from segkern.structures.processing import Processing
from segkern.weights import hf_folders

with torch.device("meta"):
    torch.empty(0)  # torch keeps a list of its constructors, before conftest replaces this one

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SEED = {"criterion.seed": torch.zeros(1, dtype=torch.int64)}
IMAGES = {
    "image_mean": (0.4, 0.5, 0.6),
    "image_std": (0.1, 0.2, 0.3),
    "shortest_edge": 96,
    "longest_edge": 160,
    "size_divisor": 16,
}
BACKBONES = {
    "swin": SwinConfig(
        embed_dim=24, depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 6], out_features=STAGES
    ),
    "resnet": ResNetConfig(depths=[1, 1, 1, 1], out_features=STAGES),
    "timm_backbone": TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3, 4]),
}


def their_config(backbone, **settings):
    sizes = {"hidden_dim": 64, "feature_size": 64, "mask_feature_size": 64, "num_queries": 5}
    widths = {"encoder_feedforward_dim": 32, "dim_feedforward": 48, "decoder_layers": 4}
    return Mask2FormerConfig(
        backbone_config=backbone,
        **{"encoder_layers": 1, "num_labels": 7, **sizes, **widths, **settings},
    )


@pytest.fixture(scope="module")
def theirs():
    """transformers' model of each family with random weights, made once."""
    models = {}

    def get(family):
        if family not in models:
            torch.manual_seed(1)
            model = Mask2FormerForUniversalSegmentation(their_config(BACKBONES[family])).double()
            with torch.no_grad():
                for name, value in model.named_parameters():
                    # at the start samples sit on the kinks of bilinear interpolation
                    value += torch.randn_like(value) * (0.3 if "offsets.bias" in name else 0.02)
            models[family] = model.eval()
        return models[family]

    return get


@pytest.fixture
def folder(theirs, tmp_path):
    """A folder that transformers wrote; of the Swin family."""
    theirs("swin").save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def rewrite(folder, change):
    """The same folder with other weights."""
    state = change(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def v4(state):
    """The spelling of the hub and of transformers 4, out of that of transformers 5 on disk."""
    out = {k: v for k, v in state.items() if ".swin.layernorm." not in k}
    for name in list(out):
        if name.endswith("relative_position_bias_table"):
            index = name.replace("bias_table", "index")
            out[index] = torch.zeros(49, 49, dtype=torch.int64)
    return out


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# names


@pytest.mark.parametrize("family", BACKBONES)
def test_three_spellings_are_one(theirs, family, tmp_path):
    model = theirs(family)
    model.save_pretrained(tmp_path)
    disk = load_file(tmp_path / "model.safetensors")
    memory = model.state_dict()
    ours = from_huggingface(disk, family)
    assert_equal(from_huggingface(memory, family), ours)
    assert_equal(from_huggingface(v4(disk), family), ours)
    parts = r"(backbone|pixel_decoder|query_decoder|criterion)\."
    assert all(re.match(parts, name) for name in ours)
    back = to_huggingface(ours | SEED, family)
    assert back.keys() == disk.keys()
    for name, value in disk.items():  # float64 to the bit; one norm is never used
        assert ".swin.layernorm." in name or torch.equal(back[name], value), name


def test_queries_keys_and_values_keep_their_places(theirs):
    state = theirs("swin").state_dict()
    ours = from_huggingface(state, "swin")
    block = "model.pixel_level_module.encoder.swin.encoder.layers.2.blocks.1.attention"
    parts = [state[f"{block}.{p}_proj.weight"] for p in "qkv"]
    assert torch.equal(ours["backbone.layers.2.blocks.1.attn.qkv.weight"], torch.cat(parts))
    cross = state["model.transformer_module.decoder.layers.1.cross_attn.in_proj_bias"].chunk(3)
    for part, value in zip("qkv", cross):
        assert torch.equal(ours[f"query_decoder.layers.1.cross_attn.{part}_proj.bias"], value)


# settings


DEEP = {"depths": [2, 2, 18, 2], "window_size": 12}
PUBLISHED = [
    ("swin_tiny", {}),
    ("swin_small", {"depths": [2, 2, 18, 2]}),
    ("swin_base", DEEP | {"embed_dim": 128, "num_heads": [4, 8, 16, 32]}),
    ("swin_large", DEEP | {"embed_dim": 192, "num_heads": [6, 12, 24, 48]}),
]


@pytest.mark.parametrize(("name", "sizes"), PUBLISHED, ids=[p[0] for p in PUBLISHED])
def test_settings_of_published_swins(name, sizes):
    labels = {i: f"thing {i}" for i in range(9)}
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(out_features=STAGES, drop_path_rate=0.3, **sizes),
        id2label=labels,
        num_queries=200,
    )
    for written in (config.to_dict(), config.to_diff_dict()):
        settings = read_config(json.loads(json.dumps(written)))
        assert settings["backbone"] == name
        assert settings["backbone_options"] == {}
        assert settings["drop_path_rate"] == 0.3
        assert settings["decoder_layers"] == 9
        assert settings["num_queries"] == 200
        assert settings["num_labels"] == 9
        assert settings["id2label"] == labels


@pytest.mark.parametrize(("name", "blocks"), [("resnet50", 6), ("resnet101", 23)])
def test_settings_of_published_resnets(name, blocks):
    backbone = ResNetConfig(depths=[3, 4, blocks, 3], out_features=STAGES)
    settings = read_config(Mask2FormerConfig(backbone_config=backbone).to_dict())
    assert (settings["backbone"], settings["backbone_options"]) == (name, {})


@pytest.mark.parametrize("family", BACKBONES)
def test_settings_come_back(family):
    settings = read_config(their_config(BACKBONES[family]).to_dict()) | {"stuff": (1, 3)}
    again = read_config(json.loads(json.dumps(write_config(settings))))
    assert again["stuff"] == (1, 3)
    assert json.dumps(again, sort_keys=True) == json.dumps(settings, sort_keys=True)


def test_stuff_of_coco_is_known():
    names = [*(f"thing {i}" for i in range(79)), "toothbrush", "banner", *map(str, range(81, 133))]
    config = Mask2FormerConfig(id2label=dict(enumerate(names)))
    assert read_config(config.to_dict())["stuff"] == tuple(range(80, 133))
    assert read_config(their_config(BACKBONES["swin"]).to_dict())["stuff"] == ()


def test_transformers_reads_our_preprocessor(folder, tmp_path):
    settings, weights = read_folder(folder)
    settings |= IMAGES | {"processing": Processing(ignore_index=255, do_reduce_labels=True)}
    huggingface.write_folder(tmp_path / "ours", settings, weights | SEED)
    processor = Mask2FormerImageProcessor.from_pretrained(tmp_path / "ours")
    assert (processor.size.shortest_edge, processor.size.longest_edge) == (96, 160)
    assert processor.size_divisor == 16
    assert tuple(processor.image_mean) == IMAGES["image_mean"]
    assert (processor.ignore_index, processor.do_reduce_labels) == (255, True)
    again = read_folder(tmp_path / "ours")[0]
    assert {k: again[k] for k in settings} == settings


# folders


def test_every_layout_of_a_folder(theirs, folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    expected = from_huggingface(state, "swin")
    layouts = {name: tmp_path / name for name in ("shards", "bin", "v4", "memory")}
    for path in layouts.values():
        path.mkdir()
        shutil.copy(folder / "config.json", path)
    theirs("swin").save_pretrained(layouts["shards"], max_shard_size="1MB")
    assert len(list(layouts["shards"].glob("*.safetensors"))) > 1
    torch.save(state, layouts["bin"] / "pytorch_model.bin")
    save_file(v4(state), layouts["v4"] / "model.safetensors")
    save_file(theirs("swin").state_dict(), layouts["memory"] / "model.safetensors")
    for path in (folder, *layouts.values()):
        settings, weights = read_folder(path)
        assert settings["num_labels"] == 7
        assert_equal(weights, expected)


def test_a_save_that_fails_leaves_the_folder_as_it_was(folder, tmp_path, monkeypatch):
    settings, weights = read_folder(folder)
    settings |= IMAGES
    ours = tmp_path / "ours"
    huggingface.write_folder(ours, settings, weights | SEED)
    (ours / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in ours.iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    more = {k: v + 1 for k, v in weights.items()}
    with monkeypatch.context() as patch:
        patch.setattr(hf_folders, "write_json", interrupted)  # the weights are written by then
        with pytest.raises(KeyboardInterrupt):
            huggingface.write_folder(ours, settings, more)
    assert {p.name: p.read_bytes() for p in ours.iterdir()} == before
    (ours / "pytorch_model.bin").write_bytes(b"old")
    huggingface.write_folder(ours, settings, more)
    assert {p.name for p in ours.iterdir()} == before.keys()
    name = "criterion.empty_weight"
    assert torch.equal(read_folder(ours)[1][name], weights[name] + 1)
    renamed = []
    monkeypatch.setattr("os.replace", lambda _, to: renamed.append(to.name))
    huggingface.write_folder(ours, settings, more)
    assert renamed == ["model.safetensors", "preprocessor_config.json", "config.json"]


# what is refused


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def broken_bin(data):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        if isinstance(data, bytes):
            (folder / "pytorch_model.bin").write_bytes(data)
        else:
            torch.save(data, folder / "pytorch_model.bin")

    return damage


def lose_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = [
    ("truncated", truncate, r"model\.safetensors cannot be read"),
    ("truncated bin", broken_bin(b"PK\3\4 and no more"), r"pytorch_model\.bin cannot be read"),
    ("text bin", broken_bin(b"hello world\n"), r"pytorch_model\.bin cannot be read"),
    ("pickled code", broken_bin({"a": print}), r"bin cannot be read: holds a print"),
    ("no dict", broken_bin([1, 2]), r"pytorch_model\.bin must hold a dict of tensors"),
    ("lost shard", lose_shard, r"model-2\.safetensors cannot be read"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors"),
    ("no config", lambda f: (f / "config.json").unlink(), "has no config.json"),
    ("half a config", lambda f: (f / "config.json").write_text('{"a'), "is not valid JSON"),
    ("no object", lambda f: (f / "config.json").write_text("[]"), "must hold an object"),
]


@pytest.mark.parametrize(("name", "damage", "message"), BROKEN, ids=[b[0] for b in BROKEN])
def test_broken_folders_are_refused(folder, name, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


SWIN_PATCH = {"backbone_config": {"model_type": "swin", "patch_size": 2}}
SWIN_MAPS = {"backbone_config": {"model_type": "swin", "out_features": STAGES[:3]}}
OPTIONS = [
    ({"model_type": "detr"}, "model_type must be mask2former, got detr"),
    ({"pre_norm": True}, "pre_norm must be False, got True"),
    ({"enforce_input_projection": True}, "enforce_input_projection must be False, got True"),
    ({"backbone_config": {"model_type": "focalnet"}}, "resnet or timm_backbone, got focalnet"),
    ({"backbone_config": None}, "resnet or timm_backbone, got None"),
    (SWIN_PATCH, "patch_size must be 4, got 2"),
    (SWIN_MAPS, r"out_features must be stage1, .*, got"),
    (
        {"id2label": {str(i): "x" for i in range(4)}},
        "names 4 classes, the weights have 7; num_lab",
    ),
    ({"id2label": {"1": "a", "2": "b"}}, "id2label must name labels 0, 1, 2"),
]


@pytest.mark.parametrize(("change", "message"), OPTIONS, ids=[o[1][:30] for o in OPTIONS])
def test_options_that_are_not_here_are_refused(folder, change, message):
    edit_config(folder, change)
    with pytest.raises(ValueError, match=message):
        read_folder(folder)


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", Path("nowhere")], ids=str)
def test_no_such_folder(name):
    with pytest.raises(ValueError, match="from_pretrained: no such folder: "):
        read_folder(name)


def test_the_hub_is_asked_for_safetensors_first(folder, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns, **place):
        asked.append((name, "pytorch_model*" in allow_patterns))
        return str(folder)

    monkeypatch.setattr("segkern.weights.folders.snapshot_download", snapshot_download)
    read_folder("someone/model")
    assert asked == [("someone/model", False)]
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    read_folder("someone/model")
    assert asked[1:] == [("someone/model", False), ("someone/model", True)]


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"someone/no-model is no folder here, and the hub "):
        read_folder("someone/no-model")


# with the model


@pytest.mark.parametrize("backbone", ["swin_tiny", "swin_base", "resnet50"])
def test_published_models_have_a_place_for_every_key(backbone):
    """Names and shapes of whole checkpoints, without their weights."""
    config = OurConfig.preset(backbone, task="panoptic", dataset="ade20k")
    settings = write_config({**vars(config)})
    family = settings["backbone_config"]["model_type"]
    with torch.device("meta"):
        ours = Mask2Former(config).state_dict()
        theirs = Mask2FormerForUniversalSegmentation(Mask2FormerConfig.from_dict(settings))
    expected = from_huggingface(theirs.state_dict(), family)
    expected = {k: list(v.shape) for k, v in expected.items()}
    assert expected == {k: list(v.shape) for k, v in ours.items() if k != "criterion.seed"}


@pytest.mark.parametrize("family", BACKBONES)
def test_the_same_logits_both_ways(theirs, family, tmp_path):
    theirs(family).save_pretrained(tmp_path / "theirs")
    ours = Mask2Former.from_pretrained(tmp_path / "theirs").double()
    ours.load_state_dict(read_folder(tmp_path / "theirs")[1] | SEED)  # float64 again
    ours.save_pretrained(tmp_path / "ours")
    again, info = Mask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path / "ours", dtype=torch.float64, output_loading_info=True
    )
    assert not any(info.values()), info  # nothing missing, nothing unexpected
    x = torch.randn(2, 3, 70, 96, dtype=torch.float64)
    with torch.no_grad():
        results = [model(x) for model in (theirs(family), ours, again.eval())]
    for other in results[1:]:
        for field in ("class_queries_logits", "masks_queries_logits"):
            expected = getattr(results[0], field)
            torch.testing.assert_close(getattr(other, field), expected, rtol=1e-8, atol=1e-8)


def test_a_folder_in_the_spelling_of_the_hub_opens(folder):
    expected = Mask2Former.from_pretrained(folder).state_dict()
    rewrite(folder, v4)
    assert_equal(Mask2Former.from_pretrained(folder).state_dict(), expected)


def test_the_tiny_model_comes_back(tmp_path):
    model = Mask2Former(OurConfig.tiny(3)).eval()
    model.config.id2label, model.config.stuff = {0: "a", 1: "b", 2: "c"}, (1,)
    model.save_pretrained(tmp_path)
    again = Mask2Former.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_equal(again.state_dict() | SEED, model.state_dict() | SEED)


QUERY = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.query.weight"
FEW = {"model.transformer_module.queries_features.weight": torch.zeros(4, 64)}
SPOILED = [  # without, with, message
    ("", {"bert.layer": torch.zeros(2)}, "unexpected: bert.layer"),
    ("class_predictor.bias", {}, "missing: query_decoder.class_embed.bias"),
    (QUERY, {}, "missing: backbone.layers.0.blocks.0.attn.qkv.weight"),  # a third of a product
    ("", FEW, r"query_decoder.query_feat.weight \[4, 64\] instead of \[5, 64\]"),
]


@pytest.mark.parametrize(
    ("less", "more", "message"), SPOILED, ids=["foreign", "missing", "third", "shape"]
)
def test_weights_that_do_not_fit_are_named(folder, less, more, message):
    rewrite(folder, lambda state: {k: v for k, v in state.items() if k != less} | more)
    with pytest.raises(ValueError, match=message):
        Mask2Former.from_pretrained(folder)


def test_another_number_of_classes(folder):
    edit_config(folder, {"id2label": {str(i): "x" for i in range(4)}})
    with pytest.raises(ValueError, match="names 4 classes, the weights have 7"):
        Mask2Former.from_pretrained(folder)
    for count in (4, 7):  # 4: the head starts anew; 7: as it is
        model = Mask2Former.from_pretrained(folder, num_labels=count)
        rows = model.query_decoder.class_embed.out_features, len(model.criterion.empty_weight)
        assert rows == (count + 1, count + 1)
