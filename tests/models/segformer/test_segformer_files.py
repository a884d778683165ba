"""SegFormer's checkpoints: Hugging Face's spellings, NVlabs' files, ImageNet encoders, and what is
refused."""

import json
import re
import shutil
from ast import literal_eval
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SegformerConfig as ReferenceConfig
from transformers import (
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from segkern.models import SegFormer, SegFormerConfig, initialize, open_model
from segkern.models.segformer import huggingface, original
from segkern.weights.hf_folders import SIZES_TOLD

KEYS = Path(__file__).parents[2] / "expected/segformer_original_keys.txt"
SIZES = {"hidden_sizes": [8, 16, 40, 64], "depths": [1, 2, 1, 1], "decoder_hidden_size": 24}
SMALL = SegFormerConfig(5, **SIZES, id2label=dict(enumerate("abcde")), do_reduce_labels=True)


def small(**changes):
    torch.manual_seed(0)
    return SegFormer(replace(SMALL, **changes)).eval()


def equal(a, b):
    assert a.keys() == b.keys()
    assert [k for k, v in a.items() if not torch.equal(v, b[k])] == []


@pytest.fixture
def folder(tmp_path):
    """A folder that transformers wrote, with a processor's file."""
    torch.manual_seed(1)
    path = tmp_path / "theirs"
    model = SegformerForSemanticSegmentation(ReferenceConfig(num_labels=5, **SIZES))
    model.save_pretrained(path)
    SegformerImageProcessor(do_reduce_labels=True, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        path
    )
    torch.save(model.state_dict(), tmp_path / "memory.pt")
    return path


# --- Hugging Face ---------------------------------------------------------------------------


def test_every_spelling_is_one(folder, tmp_path):
    disk = load_file(folder / "model.safetensors")
    assert "segformer.encoder.block.1.1.attention.self.key.weight" in disk  # of the hub and of 4
    memory = torch.load(tmp_path / "memory.pt")
    assert "segformer.stages.1.blocks.1.attention.k_proj.weight" in memory
    ours = huggingface.from_huggingface(disk)
    equal(ours, huggingface.from_huggingface(memory))
    assert all(re.match(r"(backbone|head)\.", name) for name in ours)
    equal(huggingface.to_huggingface(ours), disk)
    want = SegFormer.from_pretrained(folder).state_dict()
    for name in ("bin", "memory"):
        other = tmp_path / name
        other.mkdir()
        shutil.copy(folder / "config.json", other)
        torch.save({"bin": disk, "memory": memory}[name], other / "pytorch_model.bin")
        equal(open_model(other).state_dict(), want)


def test_keys_and_values_keep_their_places(folder):
    disk, weights = load_file(folder / "model.safetensors"), open_model(folder).state_dict()
    for part in ("weight", "bias"):
        theirs = [
            disk[f"segformer.encoder.block.2.0.attention.self.{name}.{part}"]
            for name in ("key", "value")
        ]
        assert torch.equal(
            weights[f"backbone.stages.2.blocks.0.attn.kv.{part}"], torch.cat(theirs)
        )


def test_settings_come_back(tmp_path):
    model = small(
        layer_norm_eps=1e-6,
        shortest_edge=640,
        longest_edge=2048,
        window_size=96,
        window_stride=64,
        image_size=(96, 128),
        backbone="nvidia/mit-b0",
        image_std=(0.1, 0.2, 0.3),
    )
    model.save_pretrained(tmp_path)
    assert SegFormer.from_pretrained(tmp_path).config == model.config
    assert (
        model.backbone.stages[0].blocks[0].norm2.eps == model.backbone.stages[3].norm.eps == 1e-6
    )
    norms = (
        model.backbone.stages[0].patch_embed["norm"],
        model.backbone.stages[0].blocks[0].attn.norm,
    )
    assert {norm.eps for norm in norms} == {1e-5}
    config = ReferenceConfig.from_pretrained(tmp_path)
    assert config.hidden_sizes == SIZES["hidden_sizes"]
    assert (config.num_labels, config.id2label[4]) == (5, "e")
    processor = SegformerImageProcessor.from_pretrained(tmp_path)
    assert dict(processor.size) == {"shortest_edge": 640, "longest_edge": 2048}
    assert processor.do_reduce_labels
    assert list(processor.image_std) == [0.1, 0.2, 0.3]


PROCESSORS = {  # what a file says; size, edges, crop of training; whether labels begin with 1
    "square": (
        {"size": {"height": 640, "width": 640}, "do_reduce_labels": True},
        ((640, 640), None, None, (640, 640)),
        True,
    ),
    "oblong": (
        {"size": {"height": 512, "width": 1024}},
        ((512, 1024), None, None, (512, 1024)),
        False,
    ),
    "old": ({"size": 512, "reduce_labels": True}, ((512, 512), None, None, (512, 512)), True),
    "edge": ({"size": {"shortest_edge": 96}}, (None, 96, None, (96, 96)), False),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_a_processors_file_says_how_pictures_are_taken(case, folder, tmp_path):
    written, sizes, reduce = PROCESSORS[case]
    (folder / "preprocessor_config.json").write_text(json.dumps(written))
    config = open_model(folder).config
    takes = config.input
    assert (takes.size, takes.shortest_edge, takes.longest_edge, takes.crop) == sizes
    assert (takes.multiple, takes.window) == (1, None)
    assert config.do_reduce_labels == reduce
    open_model(folder).save_pretrained(tmp_path / "again")
    assert open_model(tmp_path / "again").config == config
    (folder / "preprocessor_config.json").unlink()
    assert open_model(folder).config.input.shortest_edge == 512


def test_a_changed_file_of_ours_is_obeyed(tmp_path):
    small(shortest_edge=64, longest_edge=128).save_pretrained(tmp_path)
    processor = SegformerImageProcessor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert open_model(tmp_path).config.input.multiple is None
    assert open_model(tmp_path).config.shortest_edge == 64
    for other in (processor, SegformerImageProcessor()):
        other.size = {"height": 96, "width": 32}
        other.save_pretrained(tmp_path)
        assert open_model(tmp_path).config.input.size == (96, 32)


def test_a_square_in_an_old_file_of_ours_was_no_square(tmp_path):
    small(shortest_edge=64, longest_edge=128).save_pretrained(tmp_path)
    want = open_model(tmp_path).config
    SegformerImageProcessor(
        size={"height": 64, "width": 64}, do_reduce_labels=True
    ).save_pretrained(tmp_path)
    assert open_model(tmp_path).config.input.size == (64, 64)  # of now it is one
    config = json.loads((tmp_path / "config.json").read_text())
    del config["segkern"][SIZES_TOLD]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_model(tmp_path).config == want


# --- NVlabs ---------------------------------------------------------------------------------


def as_the_original(model):
    """The state dict of a model under NVlabs' names."""
    state = {}
    for name, value in model.state_dict().items():
        if name in original._FILTERS:
            value = value[..., None, None]
        for pattern, replacement in (
            (r"backbone\.stages\.(\d)\.patch_embed\.", "backbone.patch_embed{}."),
            (
                r"backbone\.stages\.(\d)\.(?=blocks.*dwconv)blocks\.(\d)\.mlp\.",
                "backbone.block{}.{}.mlp.dwconv.",
            ),
            (r"backbone\.stages\.(\d)\.blocks\.(\d)\.", "backbone.block{}.{}."),
            (r"backbone\.stages\.(\d)\.norm\.", "backbone.norm{}."),
            (r"head\.linears\.(\d)\.", "decode_head.linear_c{}.proj."),
        ):
            if match := re.match(pattern, name):
                stage, *block = match.groups()
                name = replacement.format(int(stage) + 1, *block) + name[match.end() :]
        for ours, theirs in (
            ("fuse", "linear_fuse.conv"),
            ("norm", "linear_fuse.bn"),
            ("classifier", "linear_pred"),
        ):
            name = re.sub(rf"^head\.{ours}\.", f"decode_head.{theirs}.", name)
        state[name] = value
    return state | {"decode_head.conv_seg.weight": torch.zeros(5, 24, 1, 1)}


def written(path, model, **changes):
    meta = {"CLASSES": ("a", "b", "c", "d", "e"), "PALETTE": [[0, 0, 0]], "mmseg_version": "0.11"}
    torch.save({"meta": meta, "state_dict": as_the_original(model)} | changes, path)
    return path


@pytest.mark.filterwarnings("ignore:.*of no published checkpoint")
@torch.no_grad()
def test_a_file_of_the_original_opens_to_the_same_model(tmp_path):
    model = small(layer_norm_eps=1e-6)
    opened = open_model(written(tmp_path / "segformer.b0.512x512.ade.160k.pth", model))
    equal(opened.state_dict(), model.state_dict())
    x = torch.randn(1, 3, 61, 77)
    assert torch.equal(opened(x).logits, model(x).logits)
    config = opened.config
    assert (config.layer_norm_eps, config.id2label) == (1e-6, dict(enumerate("abcde")))
    assert (config.sr_ratios, config.mlp_ratios) == ((8, 4, 2, 1), (4, 4, 4, 4))
    opened.save_pretrained(tmp_path / "ours")
    assert open_model(tmp_path / "ours").config == config


def test_the_names_of_the_original_code_are_known():
    """A list that the original code wrote, not the way back from our names."""
    lines = KEYS.read_text().splitlines()[1:]
    shapes = {k: literal_eval(shape) for k, shape in (line.split("\t") for line in lines)}
    found = original.from_original({k: torch.empty(v) for k, v in shapes.items()})
    with torch.device("meta"):
        own = SegFormer(SegFormerConfig.preset("b0", "ade20k")).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}


PUBLISHED = [("b0", "ade20k"), ("b5", "ade20k"), ("b2", "cityscapes")]


@pytest.mark.parametrize("case", PUBLISHED, ids="/".join)
def test_sizes_of_the_published_files(case, recwarn):
    name, dataset = case
    preset = SegFormerConfig.preset(name, dataset)
    with torch.device("meta"):
        model = SegFormer(preset)
    weights = original.from_original(as_the_original(model))
    assert SegFormerConfig(**original.read_sizes(weights, name)) == replace(
        preset, layer_norm_eps=1e-6
    )
    assert not recwarn.list


OTHERS = {
    "another model": {"state_dict": {"weight": torch.zeros(2)}},
    "no weights": {"state_dict": None},
    "MMSegmentation's own": {
        "state_dict": {"backbone.layers.0.0.projection.weight": torch.zeros(8, 3, 7, 7)}
    },
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_files_are_refused(case, tmp_path):
    path = written(tmp_path / "model.pth", small(), **OTHERS[case])
    with pytest.raises(
        ValueError, match=r"model.pth is no checkpoint of SegFormer's original code"
    ):
        SegFormer.from_pretrained(path)
    with pytest.raises(ValueError, match=r"patch_embed1\.proj\.weight \(segformer\)"):
        open_model(path)
    path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match=r"model.pth: not a whole checkpoint"):
        open_model(path)


# --- encoders -------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path):
    """A folder as those of nvidia/mit-b0 to b5, and its model."""
    torch.manual_seed(2)
    sizes = {k: v for k, v in SIZES.items() if k != "decoder_hidden_size"}
    model = SegformerForImageClassification(ReferenceConfig(num_labels=10, **sizes))
    model.save_pretrained(tmp_path / "mit")
    return tmp_path / "mit", model.eval()


@pytest.mark.filterwarnings("ignore:.*of no published checkpoint")
@torch.no_grad()
def test_a_model_starts_from_an_image_classifier(encoder, tmp_path):
    folder, theirs = encoder
    model = SegFormer(replace(SMALL, backbone=str(folder), backbone_pretrained=True)).eval()
    x = torch.randn(1, 3, 64, 96)
    want = theirs(x, output_hidden_states=True).hidden_states
    for a, b in zip(want, model.backbone(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    state = {
        name.removeprefix("backbone."): value
        for name, value in as_the_original(model).items()
        if name.startswith("backbone.")
    }
    torch.save(state | {"head.weight": torch.zeros(10, 64)}, tmp_path / "mit_b0.pth")
    other = SegFormer(SMALL)
    with pytest.warns(
        UserWarning, match=r"b0\.pth: heads are taken .*of no published checkpoint$"
    ):
        other.load_encoder(tmp_path / "mit_b0.pth")
    equal(other.backbone.state_dict(), model.backbone.state_dict())
    for source in (folder, tmp_path / "mit_b0.pth"):
        with pytest.raises(
            ValueError, match=r"holds an encoder alone: .*backbone_pretrained=True"
        ):
            open_model(source)


UNFIT = {
    "depth": ({"depths": (1, 1, 1, 1)}, r"unexpected: stages\.1\.blocks\.1"),
    "width": ({"hidden_sizes": (8, 16, 40, 72)}, r"another shape: stages\.3\.patch_embed"),
    "heads": (
        {"num_attention_heads": (1, 1, 1, 1)},
        r"num_attention_heads .*1, 2, 5, 8.* instead",
    ),
    "strides": ({"strides": (2, 2, 2, 2)}, r"strides .*4, 2, 2, 2.* instead"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_encoder_of_other_sizes_is_refused_and_not_loaded(case, encoder):
    changes, message = UNFIT[case]
    model = SegFormer(replace(SMALL, **changes))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"does not fit the encoder; .*{message}"):
        model.load_encoder(encoder[0])
    equal(model.state_dict(), before)


def test_a_model_starts_from_another(tmp_path):
    donor = small()
    donor.save_pretrained(tmp_path)
    model = small(num_labels=3, id2label=None)
    assert "new is the class head (5 labels there, 3 here)" in initialize(model, tmp_path)
    assert torch.equal(model.head.fuse.weight, donor.head.fuse.weight)
    with pytest.raises(ValueError, match=r"strides is \(4, 2, 2, 2\) there, \(2, 2, 2, 2\) here"):
        initialize(small(strides=(2, 2, 2, 2)), tmp_path)


# --- what is refused ------------------------------------------------------------------------

CONFIGS = {
    "another model": ({"model_type": "swin"}, "model_type must be segformer, got swin"),
    "activation": ({"hidden_act": "relu"}, "hidden_act must be gelu, got relu"),
    "five stages": ({"num_encoder_blocks": 5}, "num_encoder_blocks must be 4, got 5"),
    "sizes": ({"depths": [1, 1]}, r"depths must have 4 numbers, got \(1, 1\)"),
    "heads": ({"num_attention_heads": [3, 2, 5, 8]}, r"num_attention_heads must divide hidden_si"),
    "another depth": ({"depths": [2, 2, 1, 1]}, r"missing: backbone\.stages\.0\.blocks\.1"),
    "channels": ({"num_channels": 4}, r"image_mean .* must have num_channels \(4\) numbers"),
    "labels": ({"id2label": {"0": "x"}}, "names 1 classes, the weights have 5; num_labels=... st"),
    "label numbers": ({"id2label": {"1": "x"}}, "id2label must name labels 0, 1, 2, ..."),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_folders_are_named(case, folder):
    change, message = CONFIGS[case]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        SegFormer.from_pretrained(folder)
    if case == "labels":
        assert SegFormer.from_pretrained(folder, num_labels=3).config.num_labels == 3


def test_what_only_training_reads_is_a_warning(folder):
    path = folder / "config.json"
    change = {"hidden_dropout_prob": 0.1, "semantic_loss_ignore_index": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.warns(UserWarning, match="training here has") as said:
        open_model(folder)
    for text in ("hidden_dropout_prob is 0.1; tr", "semantic_loss_ignore_index is 0; training h"):
        assert sum(text in str(warning.message) for warning in said) == 1


WEIGHTS = {
    "missing": (lambda w: w.pop("decode_head.linear_fuse.weight"), r"missing: head\.fuse"),
    "foreign": (lambda w: w.update(foreign=torch.zeros(1)), "unexpected: foreign"),
    "shape": (
        lambda w: w.update({"decode_head.linear_c.1.proj.bias": torch.zeros(3)}),
        r"another shape: head\.linears\.1\.bias \[3\] instead of \[24\]",
    ),
    "no head": (
        lambda w: [w.pop(k) for k in list(w) if k.startswith("decode")],
        "holds an encoder alone",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_are_named(case, folder):
    spoil, message = WEIGHTS[case]
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        open_model(folder)


# --- out again ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*of no published checkpoint")
def test_a_file_of_the_original_goes_out_as_it_came(tmp_path):
    path = written(tmp_path / "a.pth", small(layer_norm_eps=1e-6))
    open_model(path).save_original(tmp_path / "b.pth")
    a, b = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in "ab")
    assert b["meta"]["CLASSES"] == a["meta"]["CLASSES"]
    unused = "decode_head.conv_seg.weight", "decode_head.conv_seg.bias"
    equal(*({k: v for k, v in x["state_dict"].items() if k not in unused} for x in (a, b)))
    with pytest.warns(UserWarning, match="layer_norm_eps is 1e-05 here, and 1e-06 in"):
        small().save_original(tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"path must end in \.pth"):
        small().save_original(tmp_path / "c.pkl")


def test_the_names_that_go_out_are_those_of_the_original_code():
    lines = KEYS.read_text().splitlines()[1:]
    shapes = {k: literal_eval(shape) for k, shape in (line.split("\t") for line in lines)}
    with torch.device("meta"):
        own = SegFormer(SegFormerConfig.preset("b0", "ade20k")).state_dict()
    found = {k: tuple(v.shape) for k, v in original.to_original(own).items()}
    assert found == shapes
