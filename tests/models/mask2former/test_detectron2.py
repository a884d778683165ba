"""Checkpoints of detectron2 in and out: the same outputs as the original's equations, the same
bits and names after every way round."""

from ast import literal_eval
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Mask2FormerConfig as TheirConfig
from transformers import Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig

from segkern.models import Mask2Former, Mask2FormerConfig, open_model
from segkern.models.mask2former import original
from segkern.models.mask2former.huggingface_keys import to_huggingface
from segkern.models.mask2former.original_keys import from_original, to_original
from segkern.nn.backbones.swin import VARIANTS
from support import detectron2_mask2former as detectron2
from support.detectron2_files import SIZES, assert_equal, reference, saved, written

EXPECTED = Path(__file__).parents[2] / "expected"
STAGES = ["stage1", "stage2", "stage3", "stage4"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*which no published checkpoint has",
    "ignore:.*the original code itself opens models with encoder_feedforward_dim",
)


FILES = [("swin", ".pkl"), ("swin", ".pth"), ("resnet", ".pth")]


def batch(sizes, dtype=torch.float64):
    """Pictures of several sizes, zero-padded to the largest, sides multiples of 32."""
    h, w = (-(-max(n) // 32) * 32 for n in zip(*sizes))
    x = torch.zeros(len(sizes), 3, h, w, dtype=dtype)
    g = torch.Generator().manual_seed(2)
    for picture, (y, x_) in zip(x, sizes):
        picture[:, :y, :x_] = torch.randn(3, y, x_, generator=g).to(dtype)
    return x


# --- the same outputs -----------------------------------------------------------------------

PICTURES = {
    "two sizes padded": ("swin", [(160, 128), (97, 224)]),
    "one window covers the coarsest maps": ("swin", [(64, 96)]),
    "resnet, two sizes padded": ("resnet", [(96, 64), (64, 128)]),
}


@pytest.mark.parametrize("case", PICTURES)
@torch.no_grad()
def test_imported_models_compute_what_the_original_does(case, tmp_path):
    backbone, sizes = PICTURES[case]
    theirs = reference(backbone)
    ours = open_model(saved(tmp_path / "model_final.pth", theirs.state_dict()))
    for dtype, classes, masks in ((torch.float64, 1e-8, 1e-8), (torch.float32, 2e-5, 2e-4)):
        x = batch(sizes, dtype)
        have, want = ours.to(dtype)(x, output_auxiliary_logits=True), theirs.to(dtype)(x)
        have = [tuple(p.values()) for p in have.auxiliary_logits] + [
            (have.class_queries_logits, have.masks_queries_logits)
        ]
        assert len(have) == len(want) == SIZES["decoder"] + 1
        for a, b in zip(have, want):
            torch.testing.assert_close(a[0], b[0], rtol=0, atol=classes)
            torch.testing.assert_close(a[1], b[1], rtol=0, atol=masks)
    theirs.float()
    assert want[-1][1].std() > 0.05  # masks are neither all open nor all closed


@torch.no_grad()
def test_blocks_stay_shifted_where_one_window_covers_a_map(tmp_path):
    """As in detectron2 and in transformers' backbone, and unlike transformers' classifier."""
    x = batch([(64, 96)])
    ours = open_model(saved(tmp_path / "m.pth", reference("swin").state_dict())).double()
    want = reference("swin").double()(x)[-1][0]
    reference("swin").float()
    assert (ours(x).class_queries_logits - want).abs().max() < 1e-8
    ours.backbone.layers[3].blocks[1].attn.shift = 0  # whose map is 2 x 3, its window 4 x 4
    assert (ours(x).class_queries_logits - want).abs().max() > 1e-2


# --- round trips ----------------------------------------------------------------------------


@cache
def transformers_model(family):
    """A model of transformers with random weights."""
    torch.manual_seed(1)
    swin = {"embed_dim": 24, "depths": [1, 2, 1, 2], "num_heads": [1, 2, 3, 6], "window_size": 4}
    backbones = {
        "swin": lambda: SwinConfig(**swin, out_features=STAGES, drop_path_rate=0.2),
        "resnet": lambda: ResNetConfig(out_features=STAGES),
    }
    sizes = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 64)
    sizes |= {"num_queries": 5, "encoder_layers": 1, "decoder_layers": 4, "dim_feedforward": 48}
    labels = {"id2label": {i: f"class {i}" for i in range(7)}, "no_object_weight": 0.2}
    config = TheirConfig(backbone_config=backbones[family](), **sizes, **labels)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and "running_var" not in name:
                value += torch.randn_like(value) * (0.3 if "offsets.bias" in name else 0.03)
            if "num_batches" in name:
                value += 5
    return model


def unused(name):
    return ".swin.layernorm." in name  # that transformers writes and never uses


@pytest.mark.parametrize(("family", "suffix"), FILES)
@torch.no_grad()
def test_from_transformers_to_detectron2_and_back(family, suffix, tmp_path):
    theirs = transformers_model(family)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Mask2Former.from_pretrained(tmp_path / "theirs")
    path = tmp_path / f"model{suffix}"
    ours.save_original(path)

    sizes = SIZES | {"M": 64, "Q": 5, "decoder": 3, "inner": 1024, "width": 48}
    backbone = detectron2.ResNet()
    if family == "swin":
        backbone = detectron2.Swin(24, (1, 2, 1, 2), (1, 2, 3, 6), 4)
    original = detectron2.Mask2Former(backbone, **sizes)
    counts = original.load_state_dict(written(path), strict=False)
    assert not counts.missing_keys
    assert all(name.endswith("num_batches_tracked") for name in counts.unexpected_keys)
    x = batch([(64, 96), (96, 64)])
    want = theirs.double()(x)
    theirs.float()
    have = original.double().eval()(x)[-1]
    for found, name in zip(have, ("class_queries_logits", "masks_queries_logits")):
        torch.testing.assert_close(found, want[name], rtol=0, atol=1e-8)

    again = open_model(path)
    assert again.config == ours.config  # labels, rates and weights of the loss, too
    again.save_pretrained(tmp_path / "again")
    state, before = (load_file(tmp_path / n / "model.safetensors") for n in ("again", "theirs"))
    changed = [name for name in before if unused(name)]
    assert_equal(
        {k: v for k, v in state.items() if k not in changed},
        {k: v for k, v in before.items() if k not in changed},
    )
    assert state.keys() == before.keys()


@pytest.mark.parametrize(("backbone", "suffix"), FILES)
def test_from_detectron2_and_back(backbone, suffix, tmp_path):
    state = reference(backbone).state_dict()
    ours = open_model(saved(tmp_path / f"a{suffix}", state))
    ours.save_original(tmp_path / f"b{suffix}")
    norm = "FrozenBN" if backbone == "resnet" else "GN"
    assert f"NORM: {norm}\n" in (tmp_path / "config.yaml").read_text()
    assert_equal(written(tmp_path / f"b{suffix}"), state)
    ours.save_pretrained(tmp_path / "folder")  # through a folder of Hugging Face's format
    open_model(tmp_path / "folder").save_original(tmp_path / f"c{suffix}")
    assert_equal(written(tmp_path / f"c{suffix}"), state)
    state["backbone.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"unexpected: backbone\.extra"):
        open_model(saved(tmp_path / f"d{suffix}", state))


@pytest.mark.parametrize("backbone", ["swint", "resnet50"])
def test_names_of_published_models_both_ways(backbone):
    """Names that others wrote: of the original code, and of transformers."""
    with torch.device("meta"):
        swin = backbone == "swint"
        body = detectron2.ResNet() if not swin else detectron2.Swin()
        state = detectron2.Mask2Former(body, 133).state_dict()
    if swin:
        lines = (EXPECTED / "mask2former_original_keys.txt").read_text().splitlines()
        rows = [line.split("\t") for line in lines if line[0] != "#"]
        assert {k: tuple(v.shape) for k, v in state.items()} == {
            name: literal_eval(shape) for name, shape in rows
        }
    weights = from_original(state)
    shapes = {k: v.shape for k, v in to_original(weights).items()}
    assert shapes == {k: v.shape for k, v in state.items()}
    config = Mask2FormerConfig.preset("swin_tiny" if swin else "resnet50")
    with torch.device("meta"):
        full = Mask2Former(config).state_dict()
    lines = (EXPECTED / f"mask2former_{backbone}_huggingface_names.txt").read_text().splitlines()
    names = {line for line in lines if line[0] != "#"}
    assert to_huggingface(full, "swin" if swin else "resnet").keys() == names
    frozen = {k for k in full if k.endswith("num_batches_tracked")} | {"criterion.seed"}
    assert full.keys() - weights.keys() == frozen
    assert not weights.keys() - full.keys()


PUBLISHED = {
    "resnet50": lambda: detectron2.ResNet(),
    "resnet101": lambda: detectron2.ResNet((3, 4, 23, 3)),
    **{name: lambda name=name: detectron2.Swin(**VARIANTS[name]) for name in VARIANTS},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_models(name):
    with torch.device("meta"):
        queries = 200 if name == "swin_large" else 100
        state = detectron2.Mask2Former(PUBLISHED[name](), 133, Q=queries).state_dict()
        weights = original.from_original(state)
        settings = original.read_sizes(weights, name) | original.dataset_of(133, name)
        config = Mask2FormerConfig(**settings)
        assert config == Mask2FormerConfig.preset(name)
        frozen = name.startswith("resnet")
        own = Mask2Former(config).state_dict()
        back = {k: v.shape for k, v in original.to_original(own, frozen).items()}
    assert back == {k: v.shape for k, v in state.items()}


def test_the_deepest_resnet_is_told_by_its_blocks():
    with torch.device("meta"):
        state = detectron2.Mask2Former(detectron2.ResNet((3, 8, 36, 3)), 133).state_dict()
    assert original.read_sizes(original.from_original(state), "deep")["backbone"] == "resnet152"


def test_norms_that_count_batches_train(tmp_path):
    """As SyncBN's do; published models have frozen ones, which count none."""
    state = dict(reference("resnet").state_dict())
    norms = [name.removesuffix(".running_var") for name in state if "running_var" in name]
    state |= {f"{name}.num_batches_tracked": torch.tensor(3) for name in norms}
    model = open_model(saved(tmp_path / "a.pth", state)).train()
    assert model.config.backbone_options == {}
    assert model.backbone.body.bn1.training
    model.save_original(tmp_path / "out/a.pth")
    assert "NORM: SyncBN\n" in (tmp_path / "out/config.yaml").read_text()
    assert_equal(written(tmp_path / "out/a.pth"), state)
