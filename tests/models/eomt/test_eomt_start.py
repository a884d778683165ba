"""EoMT's encoder against timm's, the start from its weights, and the original code's files."""

from ast import literal_eval
from pathlib import Path

import pytest
import timm
import torch

import segkern
from segkern.models import EoMT, EoMTConfig, initialize
from segkern.models.eomt.original import from_original

KEYS = Path(__file__).parents[2] / "expected/eomt_original_keys.txt"
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
KINDS = {  # timm's name, our settings
    "dinov2": ("vit_small_patch14_dinov2", {"num_register_tokens": 0}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov3": (
        "vit_small_patch16_dinov3",
        {"encoder": "dinov3", "key_bias": False, "layer_norm_eps": 1e-5},
    ),
    "dinov3, biases": (
        "vit_small_patch16_dinov3_qkvb",
        {"encoder": "dinov3", "key_bias": False, "layer_norm_eps": 1e-5},
    ),
    "gated": (
        "vit_small_plus_patch16_dinov3",
        {"encoder": "dinov3", "key_bias": False, "layer_norm_eps": 1e-5, "gated": True},
    ),
}


def config(**changes):
    sizes = {"num_hidden_layers": 2, "image_size": 96, "num_blocks": 1, "num_queries": 3}
    return EoMTConfig(**(SMALL | sizes | changes))


def of_timm(name, **options):
    """timm's model of two blocks with random weights, none of which is 0 or 1."""
    torch.manual_seed(0)
    options = {"img_size": 96, "patch_size": 16, "num_classes": 0, "depth": 2} | options
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_encoder_is_timms(kind):
    name, changes = KINDS[kind]
    theirs, model = of_timm(name).double(), EoMT(config(**changes)).eval().double()
    model.load_encoder(theirs)
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    want, have = theirs.forward_features(x), model.encoder(x)
    assert have.shape == want.shape
    # DINOv3's positions are rounded to float32 on both sides, at other places
    assert (have - want).abs().max() <= (2e-5 if "dinov3" in name else 1e-10)
    assert want.std() > 0.5


def test_a_pretrained_encoder_is_asked_for_in_our_sizes(monkeypatch):
    asked = {}

    def given(name, **options):
        asked.update(options, name=name)
        return of_timm(name, depth=12, **options)

    monkeypatch.setattr(segkern.models.eomt.pretrained, "pretrained_model", given)
    name, (_, changes) = "vit_tiny_patch16_dinov3_qkvb", KINDS["dinov3"]
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    sizes |= {"num_hidden_layers": 12, "backbone": name, "backbone_pretrained": True}
    model = EoMT(config(**(changes | sizes)))
    wanted = {"img_size": 96, "patch_size": 16, "num_classes": 0, "in_chans": 3}
    assert asked == wanted | {"name": name}
    theirs = of_timm(name, depth=12)
    assert torch.equal(model.encoder.blocks[3].ls1, theirs.blocks[3].gamma_1)


UNFIT = {
    "depth": (
        "vit_small_patch14_reg4_dinov2",
        {},
        "does not fit the encoder; unexpected: blocks.2",
    ),
    "width": ("vit_base_patch14_reg4_dinov2", {}, r"another shape: .*\[1, 1, 768\]"),
    "positions": ("vit_small_patch16_dinov3", {}, "missing: pos_embed"),
    "unknown": ("vit_smal_patch16_dinov3", {}, "did you mean"),
    "no transformer": ("resnet18", {}, "timm cannot give backbone 'resnet18'"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_told_before_a_download(case, monkeypatch):
    name, changes, message = UNFIT[case]
    monkeypatch.setattr(segkern.models.eomt.pretrained, "pretrained_model", None)
    with pytest.raises(ValueError, match=message):
        EoMT(config(backbone=name, backbone_pretrained=True, **changes))


def test_other_heads_do_not_fit():
    with pytest.raises(ValueError, match="6 attention heads instead of 12"):
        EoMT(config(num_attention_heads=12)).load_encoder(
            of_timm(KINDS["dinov2 with registers"][0])
        )


# --- the original code's files --------------------------------------------------------------


def original(model):
    """A state dict as the original code writes it, from ours."""
    out = {}
    for name, value in model.state_dict().items():
        if name.startswith("encoder."):
            name = name.replace(".ls1", ".ls1.gamma").replace(".ls2", ".ls2.gamma")
            out[f"network.encoder.backbone.{name.removeprefix('encoder.')}"] = value
        elif name.startswith("mask_head."):
            _, i, kind = name.split(".")
            out[f"network.mask_head.{2 * int(i)}.{kind}"] = value
        elif not name.startswith("criterion."):
            name = name.replace("query.", "q.").replace("class_predictor", "class_head")
            out[f"network.{name}"] = value
    out["network.encoder.pixel_mean"] = torch.zeros(1, 3, 1, 1)
    out["criterion.empty_weight"] = torch.tensor([1.0, 1.0, 1.0, 0.1])
    return out


def test_the_names_of_the_original_code_are_known():
    """A list that the original code wrote, not the way back from our names."""
    lines = KEYS.read_text().splitlines()[1:]
    shapes = {k: literal_eval(shape) for k, shape in (line.split("\t") for line in lines)}
    found = from_original({k: torch.empty(v) for k, v in shapes.items()})
    sizes = {"num_hidden_layers": 12, "num_blocks": 3, "num_queries": 200, "num_labels": 133}
    own = EoMT(config(**sizes)).state_dict()
    rest = {"criterion.seed", "criterion.empty_weight"}
    assert own.keys() - found.keys() == rest
    assert all(v.shape == own[k].shape for k, v in found.items())


@pytest.mark.parametrize(
    ("wrap", "name"),
    [(lambda s: s, "pytorch_model.bin"), (lambda s: {"state_dict": s}, "last.ckpt")],
    ids=["bin", "ckpt"],
)
def test_a_file_of_the_original_code_opens(wrap, name, tmp_path):
    torch.manual_seed(0)
    model = EoMT(config(num_labels=3, num_queries=5)).eval()
    model.attn_mask_probs.zero_()
    path = tmp_path / name
    torch.save(wrap(original(model)), path)
    with pytest.warns(UserWarning, match="taken for a model of 3 classes with 6 heads"):
        opened = segkern.open_model(path)
    own = model.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in opened.state_dict().items())
    assert not opened.config.windows
    assert not opened.training
    torch.manual_seed(1)
    other = EoMT(config(num_labels=7, num_queries=5))
    with pytest.warns(UserWarning, match="taken for"):
        assert "class head (3 labels there, 7 here)" in initialize(other, path)
    assert torch.equal(other.query.weight, model.query.weight)


SPOILT = {
    "other weights": ({"weight": torch.ones(2)}, "is no checkpoint of EoMT's original code"),
    "no dict": ([1], "is no checkpoint of EoMT's original code"),
    "another encoder": ({"network.q.weight": torch.ones(5, 8)}, "original code with a DINOv2"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_foreign_file_is_refused(case, tmp_path):
    content, message = SPOILT[case]
    torch.save(content, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=message):
        segkern.open_model(tmp_path / "model.bin")


def test_weights_beside_settings_are_those_of_the_folder(tmp_path):
    segkern.Mask2Former(segkern.Mask2FormerConfig.tiny(3)).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    assert isinstance(segkern.open_model(tmp_path / "pytorch_model.bin"), segkern.Mask2Former)


@pytest.mark.filterwarnings("ignore:.*taken for a model")
@pytest.mark.parametrize("registers", [4, 0], ids=["registers", "none"])
@pytest.mark.parametrize("suffix", [".bin", ".pth", ".ckpt"])
def test_files_go_out_as_they_came(registers, suffix, tmp_path):
    torch.manual_seed(0)
    model = EoMT(config(num_labels=3, num_queries=5, num_register_tokens=registers)).eval()
    model.save_original(tmp_path / f"a{suffix}")
    opened = segkern.open_model(tmp_path / f"a{suffix}")
    own = model.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in opened.state_dict().items())
    opened.save_original(tmp_path / f"b{suffix}")
    a, b = (torch.load(tmp_path / f"{n}{suffix}", weights_only=True) for n in "ab")
    a, b = (x.get("state_dict", x) for x in (a, b))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.filterwarnings("ignore:.*taken for a model")
def test_the_weight_of_no_object_is_in_the_file(tmp_path):
    EoMT(config(no_object_weight=0.3)).save_original(tmp_path / "a.bin")
    assert segkern.open_model(tmp_path / "a.bin").config.no_object_weight == 0.3


def test_the_names_that_go_out_are_those_of_the_original_code(tmp_path):
    lines = KEYS.read_text().splitlines()[1:]
    shapes = {k: literal_eval(shape) for k, shape in (line.split("\t") for line in lines)}
    sizes = {"num_hidden_layers": 12, "num_blocks": 3, "num_queries": 200, "num_labels": 133}
    EoMT(config(**sizes)).save_original(tmp_path / "a.bin")
    found = torch.load(tmp_path / "a.bin", weights_only=True)
    assert {k: tuple(v.shape) for k, v in found.items()} == shapes
    for changes, message in (
        ({"encoder": "dinov3"}, "encoder must be dinov2, got dinov3"),
        ({"num_attention_heads": 12}, "num_attention_heads must be 6, got 12"),
    ):
        with pytest.raises(ValueError, match=message):
            EoMT(config(**changes)).save_original(tmp_path / "b.bin")
    with pytest.raises(ValueError, match=r"path must end in \.bin, \.pth, \.ckpt, got"):
        EoMT(config()).save_original(tmp_path / "b.pkl")
