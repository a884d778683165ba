"""Conversions between the formats of a model: every tensor told of, nothing lost, the same bits
back, and nothing written where that fails."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    EomtConfig,
    EomtForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
)

import segkern
from segkern.cli import main
from segkern.models.convert import convert
from segkern.models.mask2former import original
from segkern.models.segformer import original as segformer_original
from segkern.models.segmenter import Segmenter, SegmenterConfig
from segkern.models.unet import UNet, UNetConfig

STAGES = ["stage1", "stage2", "stage3", "stage4"]
LABELS = {i: f"class {i}" for i in range(7)}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*which no published checkpoint has",
    "ignore:.*opens models with encoder_feedforward_dim",
    "ignore:.*(is taken for a model|have not faded)",
    "ignore:.*of no published checkpoint",
    "ignore:.*in the original code, whose outputs differ",
)


def swin():
    sizes = {"embed_dim": 24, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 3, 6], "window_size": 4}
    return SwinConfig(**sizes, out_features=STAGES)


def mask2former(folder):
    widths = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 64)
    widths |= {"num_queries": 5, "encoder_layers": 1, "decoder_layers": 3, "dim_feedforward": 48}
    config = Mask2FormerConfig(backbone_config=swin(), **widths, id2label=LABELS)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def maskformer(folder):
    widths = {"fpn_feature_size": 32, "mask_feature_size": 32}
    config = MaskFormerConfig(backbone_config=swin(), **widths, id2label=LABELS)
    MaskFormerForInstanceSegmentation(config).save_pretrained(folder)


def segformer(folder, **changes):
    sizes = {"hidden_sizes": [8, 16, 20, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}
    config = SegformerConfig(**sizes, id2label=LABELS, **changes)
    SegformerForSemanticSegmentation(config).save_pretrained(folder)


def eomt(folder):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"num_blocks": 1, "num_queries": 5, "image_size": 64, "intermediate_size": 512}
    config = EomtConfig(**sizes, mlp_ratio=4, patch_size=16, id2label=LABELS)
    EomtForUniversalSegmentation(config).save_pretrained(folder)


def segmenter(folder):
    sizes = {"image_size": (32, 32), "embed_dim": 64, "depth": 1, "num_heads": 1}
    Segmenter(SegmenterConfig(7, **sizes)).save_pretrained(folder)


def unet(folder):
    UNet(UNetConfig(7, image_size=(32, 32), channels=4, depth=2)).save_pretrained(folder)


_ORIGINAL = {"renamed": 158, "taken": 1, "merged": 42, "not used": 2, "made": 5}
SIZES = ("layer_norm_eps", "backbone", "shortest_edge", "longest_edge", "do_reduce_labels")
WINDOWS = ("window_size", "window_stride", "shortest_edge", "longest_edge")
# the writer of the source, the target, what becomes of how many tensors, what is not held there
WAYS = {
    "Mask2Former, pkl": (mask2former, "model.pkl", _ORIGINAL, ()),
    "Mask2Former, pth": (mask2former, "model.pth", _ORIGINAL, ()),
    "Mask2Former, folder": (mask2former, "out", {"taken": 201, "not used": 2, "made": 2}, ()),
    "MaskFormer, folder": (maskformer, "out", {"taken": 299, "not used": 7, "made": 7}, ()),
    "SegFormer, pth": (segformer, "m.pth", {"renamed": 108, "merged": 16, "made": 2}, SIZES),
    "EoMT, bin": (
        eomt,
        "model.bin",
        {"renamed": 51, "taken": 1, "merged": 12, "made": 2},
        ("id2label",),
    ),
    "Segmenter, original": (segmenter, "original", {"taken": 51, "made": 2}, WINDOWS),
    "Segmenter, folder": (segmenter, "out", {"taken": 51}, ()),
    "U-Net, folder": (unet, "out", {"taken": 66}, ()),
}


def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", WAYS)
def test_there_and_back(case, tmp_path):
    write, name, fates, unheld = WAYS[case]
    torch.manual_seed(0)
    write(tmp_path / "source")
    format = name if name == "original" else None
    there = convert(tmp_path / "source", tmp_path / name, format)
    before = tensors(tmp_path / "source")
    assert {key.name for key in there.keys if key.name} == before.keys()
    assert Counter(key.fate for key in there.keys) == fates
    assert tuple(name for name, *_ in there.settings) == unheld
    assert (there.difference == 0) == ("layer_norm_eps" not in unheld)
    back = convert(tmp_path / name, tmp_path / "back", "pretrained")
    assert back.kind == there.kind
    after = tensors(tmp_path / "back")
    assert after.keys() - {"criterion.seed"} == before.keys() - {"criterion.seed"}
    skipped = {key.name for key in there.keys if key.fate == "not used"}
    for key in before.keys() - skipped - {"criterion.seed"}:
        assert torch.equal(before[key], after[key]), key
    assert not list(tmp_path.glob(".*"))


def test_every_tensor_is_told_of(tmp_path, capsys):
    mask2former(tmp_path / "source")
    line = ["convert", str(tmp_path / "source"), str(tmp_path / "model.pkl")]
    assert main(line) == 0
    text = capsys.readouterr().out
    query, whole = "attention.self.query.weight", "attn.qkv.weight"
    block = "backbone.layers.#.blocks.#"
    theirs = "model.pixel_level_module.encoder.encoder.layers.#.blocks.#"
    assert f"    5 merged   {theirs}.{query} -> {block}.{whole}\n" in text
    assert f"    5 made     {block}.attn.relative_position_index\n" in text
    assert "1 taken; left over: none; outputs: the same\n" in text
    assert text.endswith(f"written: {tmp_path / 'model.pkl'}\n")
    assert main(line) == 2
    assert "target must not be there yet, got" in capsys.readouterr().err


def test_queries_keys_and_values_are_told_apart(tmp_path):
    mask2former(tmp_path / "source")
    keys = {key.name: key for key in segkern.convert(tmp_path / "source", tmp_path / "a.pth").keys}
    layer = "model.transformer_module.decoder.layers.1"
    predictor = "sem_seg_head.predictor"
    name = f"{predictor}.transformer_self_attention_layers.1.self_attn.in_proj_weight"
    for part in "qkv":
        key = keys[f"{layer}.self_attn.{part}_proj.weight"]
        assert (key.fate, key.targets) == ("merged", (name,))
    key = keys[f"{layer}.cross_attn.in_proj_weight"]
    name = f"{predictor}.transformer_cross_attention_layers.1.multihead_attn.in_proj_weight"
    assert (key.fate, key.targets) == ("renamed", (name,))


def lost(state):
    del state["sem_seg_head.predictor.level_embed.weight"]
    return state


def unnamed(state):
    state["spare"] = state.pop("sem_seg_head.predictor.level_embed.weight")
    return state


def swapped(state):
    names = [f"sem_seg_head.predictor.{n}.weight" for n in ("query_feat", "query_embed")]
    state[names[0]], state[names[1]] = state[names[1]], state[names[0]]
    return state


FAULTS = {
    "a tensor that is lost": (lost, "missing: query_decoder.level_embed.weight"),
    "a tensor under a name that nobody knows": (unnamed, "unexpected: spare"),
    "two tensors in each other's place": (swapped, "come back as others: query_decoder.query_"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_fails_leaves_nothing(case, tmp_path, monkeypatch):
    mask2former(tmp_path / "source")
    spoil, message = FAULTS[case]
    right = original.to_original
    monkeypatch.setattr(original, "to_original", lambda *a: spoil(right(*a)))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "model.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_tensors_without_a_place_are_left_over(tmp_path, monkeypatch):
    """A reader that makes up what the file lacks does not hide that the file lacks it."""
    mask2former(tmp_path / "source")
    name = "criterion.empty_weight"
    write, read = original.to_original, original.from_original

    def without(*a):
        return {k: v for k, v in write(*a).items() if k != name}

    monkeypatch.setattr(original, "to_original", without)
    made = torch.tensor([1.0] * 7 + [0.1])
    monkeypatch.setattr(original, "from_original", lambda s: read(s) | {name: made})
    with pytest.raises(ValueError, match=f"no place in the target's format for {name}$"):
        convert(tmp_path / "source", tmp_path / "model.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_other_outputs_are_refused(tmp_path):
    """Heads show in no weight of a SegFormer: the original's file takes those of the paper."""
    segformer(tmp_path / "source", num_attention_heads=[1, 1, 1, 1])
    state = tensors(tmp_path / "source")
    for name, value in state.items():
        value.mul_(40 if name.endswith(("query.weight", "key.weight", "value.weight")) else 1)
    save_file(state, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    message = r"outputs of a random picture differ by .*num_attention_heads is \[1, 1, 1, 1\] here"
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "model.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


REFUSED = {
    "no such folder": ("./nothing", "out", None, "no such folder"),
    "no such file": ("nothing.pth", "out", None, "no such file: nothing.pth"),
    "no such format": ("source", "out", "onnx", "format must be one of pretrained, original"),
    "no original": ("source", "out", "original", "a unet has no original format that is known"),
    "a target that is there": ("source", "source", None, "target must not be there yet"),
    "a folder called as a file": (
        "source",
        "deep/model.PTH",
        None,
        r"target must be called as a folder for the pretrained format of a unet, got deep/model",
    ),
    "a target without a name": ("source", ".", None, "target must be called as a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unet("source")
    source, target, format, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        convert(source, target, format)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_targets_are_called_by_their_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    segformer("source")
    file, folder = "target must end in .pth for", "target must be called as a folder for"
    for target, format, message in (
        ("out", "original", f"{file} the original format of a segformer, got out$"),
        ("model.pkl", "original", file),
        ("model.pkl", None, folder),
        ("model.pth", "pretrained", folder),
    ):
        with pytest.raises(ValueError, match=message):
            convert("source", target, format)
    segmenter("windows")
    with pytest.raises(ValueError, match=f"{folder} the original format of a segmenter"):
        convert("windows", "checkpoint.pth", "original")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "windows"}


def test_empty_folders_give_way_to_folders_alone(tmp_path):
    segformer(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "model.pth").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    convert(tmp_path / "source", tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "source").keys()
    for name in ("model.pth", "link"):
        with pytest.raises(ValueError, match=f"must not be there yet, got .*{name}"):
            convert(tmp_path / "source", tmp_path / name)


def test_messages_name_the_target(tmp_path, monkeypatch):
    """And not the hidden folder that holds it until it is proved, in which nobody can look."""
    segformer(tmp_path / "source")
    target = tmp_path / "deep/er/model.pth"
    with pytest.warns(UserWarning, match="layer_norm_eps is 1e-05 here") as told:
        convert(tmp_path / "source", target)
    assert str(told[0].message).startswith(f"{target}: ")
    target = tmp_path / "other/model.pth"
    right, gone = segformer_original.to_original, "backbone.patch_embed4.proj.weight"

    def without(weights):
        return {k: v for k, v in right(weights).items() if k != gone}

    monkeypatch.setattr(segformer_original, "to_original", without)
    with pytest.raises(ValueError, match=f"from_pretrained: {target} is no checkpoint"):
        convert(tmp_path / "source", target)
    assert not target.parent.exists()


def test_a_warning_comes_once(tmp_path):
    mask2former(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "a/model.pth")
    state = torch.load(tmp_path / "a/model.pth", weights_only=True)["model"]
    torch.save({"model": state, "ema_state": state}, tmp_path / "both.pth")
    with pytest.warns(UserWarning, match="weights are those of 'model'") as told:
        convert(tmp_path / "both.pth", tmp_path / "out")
    assert sum("weights are those of" in str(warning.message) for warning in told) == 1


def test_a_run_and_a_file_beside_others(tmp_path):
    """Of a run the best model is taken; a config.yaml that is there already stays."""
    unet(tmp_path / "run/model")
    torch.manual_seed(5)
    unet(tmp_path / "run/best")
    convert(tmp_path / "run", tmp_path / "out")
    best, out = tensors(tmp_path / "run/best"), tensors(tmp_path / "out")
    assert all(torch.equal(best[k], out[k]) for k in best if k != "criterion.seed")
    mask2former(tmp_path / "source")
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(ValueError, match=r"must not be there yet, got .*config\.yaml"):
        convert(tmp_path / "source", tmp_path / "model.pth")
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"
    assert not (tmp_path / "model.pth").exists()
