"""Checkpoints of detectron2 in and out: the same outputs as the original's equations, the same
bits and names after every way round, and what people's files have beside weights."""

import pickle
import warnings
from ast import literal_eval
from collections import OrderedDict
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Mask2FormerConfig as TheirConfig
from transformers import Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig

from segkern.models import Mask2Former, Mask2FormerConfig, open_model
from segkern.models.mask2former.huggingface_keys import to_huggingface
from segkern.models.mask2former.original_keys import from_original, to_original
from support import detectron2_mask2former as detectron2

EXPECTED = Path(__file__).parents[2] / "expected"
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SIZES = {"K": 7, "C": 64, "M": 32, "Q": 9, "encoder": 1, "decoder": 4, "inner": 96, "width": 80}
SWIN = {"embed_dim": 24, "depths": (1, 2, 2, 2), "num_heads": (1, 2, 3, 6), "window_size": 4}
BACKBONES = {
    "swin": lambda: detectron2.Swin(**SWIN),
    "resnet": lambda: detectron2.ResNet(),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*which no published checkpoint has",
    "ignore:.*the original code itself opens models with encoder_feedforward_dim",
)


@cache
def reference(backbone):
    """The original's model with weights that all matter: noise moves what starts as a constant,
    and samples away from the kinks of bilinear interpolation."""
    torch.manual_seed(0)
    model = detectron2.Mask2Former(BACKBONES[backbone](), **SIZES).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running" in name or name.endswith("norm.weight"):
                value.mul_(torch.rand_like(value) + 0.5)
            if value.is_floating_point() and "running_var" not in name:
                value.add_(torch.randn_like(value) * (0.3 if "offsets.bias" in name else 0.03))
    return model


def saved(path, state, **beside):
    """As detectron2's checkpointer writes it."""
    content = {"model": state, **beside}
    if path.suffix == ".pth":
        torch.save(content, path)
    else:
        arrays = OrderedDict((name, value.numpy()) for name, value in state.items())
        arrays._metadata = getattr(state, "_metadata", None)
        path.write_bytes(pickle.dumps({"__author__": "x", **content, "model": arrays}, 4))
    return path


def written(path):
    """Weights that a file holds, as it holds them."""
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)["model"]
    found = pickle.loads(path.read_bytes())["model"]
    return OrderedDict((name, torch.from_numpy(value)) for name, value in found.items())


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
        assert a[name].dtype == b[name].dtype, name


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
        have, want = ours.to(dtype)(x, auxiliary_logits=True), theirs.to(dtype)(x)
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


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("family", ["swin", "resnet"])
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


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_from_detectron2_and_back(backbone, suffix, tmp_path):
    state = reference(backbone).state_dict()
    ours = open_model(saved(tmp_path / f"a{suffix}", state))
    ours.save_original(tmp_path / f"b{suffix}")
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


# --- what people's files have ---------------------------------------------------------------


def versions(state, version):
    state = OrderedDict(state)
    names = ("sem_seg_head", "sem_seg_head.predictor")
    state._metadata = OrderedDict(
        (n, {} if version is None else {"version": version}) for n in names
    )
    return state


def old(state):
    """Names of the code's first versions."""
    out = OrderedDict()
    for name, value in state.items():
        name = name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.")
        out[name.replace("query_feat", "static_query")] = value
    return out


FORMS = {
    "as training writes it": lambda s: {
        "model": versions(s, 2),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "scheduler": {"base_lrs": [np.float64(1e-4)], "last_epoch": 9},
        "iteration": 9,
    },
    "no versions": lambda s: {"model": dict(s)},
    "first version": lambda s: {"model": versions(old(s), None)},
    "version 1": lambda s: {"model": versions(old(s), 1)},
    "of DDP": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "of DDP and compile": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "averaged weights alone": lambda s: {"ema_state": dict(s)},
    "the weights themselves": lambda s: dict(s),
    "arrays": lambda s: {"model": {k: v.numpy() for k, v in s.items()}},
    "statistics of pixels": lambda s: {
        "model": dict(s)
        | {
            "pixel_mean": torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1),
            "pixel_std": torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1),
        }
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old torch"])
def test_forms_of_pth_files(form, zipped, tmp_path):
    state = reference("swin").state_dict()
    path = tmp_path / "model_final.pth"
    torch.save(FORMS[form](state), path, _use_new_zipfile_serialization=zipped)
    opened = open_model(path)
    assert_equal(to_original(opened.state_dict()), state)
    assert opened.config.image_mean == pytest.approx((0.485, 0.456, 0.406), abs=1e-7)


def test_averaged_weights_beside_others_are_told_of(tmp_path):
    state = reference("swin").state_dict()
    other = {name: value * 0 for name, value in state.items()}
    path = saved(tmp_path / "a.pth", state, ema_state=other)
    with pytest.warns(
        UserWarning, match="weights are those of 'model'; there is 'ema_state', too"
    ):
        opened = open_model(path)
    assert_equal(to_original(opened.state_dict()), state)


def config_yaml(folder, **changes):
    """As detectron2 writes it, all merged: much of it is of no matter here."""
    tree = {
        "CUDNN_BENCHMARK": False,
        "DATASETS": {"TRAIN": ["mine_train"]},
        "INPUT": {"MIN_SIZE_TEST": 640, "MAX_SIZE_TEST": 2560, "FORMAT": "RGB"},
        "MODEL": {
            "META_ARCHITECTURE": "MaskFormer",
            "MASK_FORMER": {
                "NUM_OBJECT_QUERIES": 9,
                "HIDDEN_DIM": 64,
                "DEC_LAYERS": 5,
                "DROPOUT": 0.1,
                "CLASS_WEIGHT": 1.5,
                "NO_OBJECT_WEIGHT": 0.1,
                "SIZE_DIVISIBILITY": 64,
                "TRAIN_NUM_POINTS": 256,
                "PRE_NORM": False,
            },
            "PIXEL_MEAN": [127.5, 127.5, 127.5],
            "PIXEL_STD": "(51.0, 51.0, 51.0)",
            "RESNETS": {"STRIDE_IN_1X1": True},  # of no matter with a Swin
            "SEM_SEG_HEAD": {"NUM_CLASSES": 7},
            "SWIN": {"DROP_PATH_RATE": 0.4, "APE": False},
        },
        "SOLVER": {"STEPS": [3, 4]},
        "VERSION": 2,
    }
    for path, value in changes.items():
        *sections, field = path.split("__")
        inner = tree
        for section in sections:
            inner = inner[section]
        inner[field] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


def test_config_yaml_beside_the_weights_is_read(tmp_path):
    path = saved(tmp_path / "model_final.pth", reference("swin").state_dict())
    config_yaml(tmp_path)
    with pytest.warns(UserWarning, match="has 7 classes") as told:
        opened = open_model(path)
    assert [str(w.message) for w in told] == [
        f"{path}: has 7 classes, which no published checkpoint has: no class is stuff"
    ]
    config = opened.config
    want = replace(
        config,
        shortest_edge=640,
        longest_edge=2560,
        dropout=0.1,
        class_weight=1.5,
        size_divisor=64,
        train_num_points=256,
        image_mean=(0.5,) * 3,
        image_std=(0.2,) * 3,
        drop_path_rate=0.4,
    )
    assert config == want


OTHERS = {
    "MODEL__MASK_FORMER__PRE_NORM": (True, "PRE_NORM must be False, got True"),
    "MODEL__SWIN__APE": (True, "MODEL.SWIN.APE must be False, got True"),
    "INPUT__FORMAT": ("BGR", "INPUT.FORMAT must be RGB, got BGR"),
    "MODEL__META_ARCHITECTURE": ("MaskDINO", "META_ARCHITECTURE must be MaskFormer, got MaskDINO"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_options_of_config_yaml_that_are_not_here(name, tmp_path):
    path = saved(tmp_path / "model_final.pth", reference("swin").state_dict())
    config_yaml(tmp_path, **{name: OTHERS[name][0]})
    with pytest.raises(ValueError, match=OTHERS[name][1]):
        open_model(path)


def test_config_yaml_of_other_weights_and_with_a_base(tmp_path):
    path = saved(tmp_path / "model_final.pth", reference("swin").state_dict())
    config_yaml(tmp_path, MODEL__SEM_SEG_HEAD__NUM_CLASSES=133)
    with pytest.warns(UserWarning, match=r"of other weights; num_labels is 133 there, 7 here"):
        assert open_model(path).config.shortest_edge == 800
    text = "_BASE_: ../base.yaml\nINPUT:\n  MIN_SIZE_TEST: 640\n  OTHER: !!python/name:os.system\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.warns(UserWarning, match=r"its _BASE_, ../base.yaml, is not read"):
        assert open_model(path).config.shortest_edge == 640
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        open_model(path)


def test_the_config_yaml_that_is_written(tmp_path):
    config = replace(open_model(saved(tmp_path / "a.pth", reference("swin").state_dict())).config)
    config = replace(config, shortest_edge=512, no_object_weight=0.3, drop_path_rate=0.1)
    Mask2Former(config).save_original(tmp_path / "out/model.pth")
    tree = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert tree["MODEL"]["SWIN"]["DEPTHS"] == [1, 2, 2, 2]
    assert tree["MODEL"]["SWIN"]["WINDOW_SIZE"] == 4
    assert tree["MODEL"]["MASK_FORMER"]["DEC_LAYERS"] == 5
    assert tree["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    # a file that has lost our settings has them from there
    content = torch.load(tmp_path / "out/model.pth", weights_only=True)
    del content["segkern"]
    torch.save(content, tmp_path / "out/model.pth")
    assert open_model(tmp_path / "out/model.pth").config == config


# --- what is refused ------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_code_in_a_pth_is_not_run(tmp_path, capsys):
    for zipped in (True, False):
        content = {"model": reference("swin").state_dict(), "trainer": Evil()}
        path = tmp_path / f"{zipped}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        for way in (open_model, Mask2Former.from_pretrained):
            with pytest.raises(ValueError, match=r"holds a (builtins\.)?print, which is code"):
                way(path)
    assert "run" not in capsys.readouterr().out


def test_a_pth_is_told_by_what_it_holds(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"open_model: .*a\.pth must hold weights of a model of"):
        open_model(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is no checkpoint of Mask2Former's original"):
        Mask2Former.from_pretrained(tmp_path / "a.pth")
    for way in (open_model, Mask2Former.from_pretrained):  # and never a name on the hub
        for name in ("models/nothing.pth", "nothing.pkl"):
            with pytest.raises(ValueError, match="No such file"):
                way(name)


WRONG = {
    "suffix": (Mask2FormerConfig.tiny(3), "a.bin", "path must end in .pkl or .pth, got"),
    "backbone": (Mask2FormerConfig.tiny(3), "a.pth", "a plain ResNet-50, .* got resnet_digits"),
    "points": (
        replace(Mask2FormerConfig.tiny(3), backbone="swin_tiny", num_points_encoder=2),
        "a.pth",
        "num_points_encoder must be 4, got 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_models_that_the_original_has_not(case, tmp_path):
    config, name, message = WRONG[case]
    with torch.device("meta"):
        model = Mask2Former(config)
    with pytest.raises(ValueError, match=message):
        model.save_original(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_bfloat16_in_both_files(tmp_path):
    model = open_model(saved(tmp_path / "a.pth", reference("swin").state_dict())).bfloat16()
    for suffix, dtype in ((".pth", torch.bfloat16), (".pkl", torch.float32)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_original(tmp_path / f"b{suffix}")
        state = written(tmp_path / f"b{suffix}")
        name = "sem_seg_head.predictor.query_feat.weight"
        assert state[name].dtype == dtype
        assert torch.equal(state[name].bfloat16(), model.query_decoder.query_feat.weight)
