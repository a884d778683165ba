"""Files of detectron2 as people have them: wrapped, old, averaged, with config.yaml beside them;
what is written beside weights; and what is refused, above all code."""

import pickle
import warnings
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from segkern.models import Mask2Former, Mask2FormerConfig, open_model
from segkern.models.mask2former.original_keys import to_original
from support.detectron2_files import assert_equal, reference, saved, written

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*which no published checkpoint has",
    "ignore:.*the original code itself opens models with encoder_feedforward_dim",
)


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


NO_NUMBERS = {
    "MODEL__PIXEL_MEAN": (128, "PIXEL_MEAN must be a list of numbers, got 128"),
    "MODEL__PIXEL_STD": (["a"], r"PIXEL_STD must be a list of numbers, got \['a'\]"),
    "MODEL__MASK_FORMER__DEC_LAYERS": ("ten", "DEC_LAYERS must be a number, got 'ten'"),
    "MODEL__MASK_FORMER__NO_OBJECT_WEIGHT": (None, "NO_OBJECT_WEIGHT must be a number, got None"),
    "INPUT__MIN_SIZE_TEST": ([512], r"MIN_SIZE_TEST must be a number, got \[512\]"),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_words_of_config_yaml_where_numbers_belong(name, tmp_path):
    path = saved(tmp_path / "model_final.pth", reference("swin").state_dict())
    config_yaml(tmp_path, **{name: NO_NUMBERS[name][0]})
    with pytest.raises(ValueError, match=rf"config\.yaml: .*{NO_NUMBERS[name][1]}"):
        open_model(path)


def test_a_least_edge_of_0_leaves_pictures_as_they_are(tmp_path):
    path = saved(tmp_path / "model_final.pth", reference("swin").state_dict())
    config_yaml(tmp_path, INPUT__MIN_SIZE_TEST=0)
    config = open_model(path).config
    assert (config.shortest_edge, config.longest_edge) == (None, None)


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


def test_a_width_that_the_original_does_not_read_is_told_of(tmp_path):
    model = open_model(saved(tmp_path / "a.pth", reference("swin").state_dict()))
    with pytest.warns(UserWarning, match=r"encoder_feedforward_dim 1024 alone, this one has 96"):
        model.save_original(tmp_path / "b.pth")


def test_what_detectron2_asks_of_a_file(tmp_path):
    """It takes a .pkl without an author for one of Caffe2, and names without versions for old."""
    model = open_model(saved(tmp_path / "a.pth", reference("swin").state_dict()))
    for path in (tmp_path / "b.pkl", tmp_path / "c.pth"):
        model.save_original(path)
        if path.suffix == ".pth":
            content = torch.load(path, weights_only=True)
        else:
            content = pickle.loads(path.read_bytes(), encoding="latin1")
            assert b"numpy._core" not in path.read_bytes()  # which NumPy below 2 has not
            assert {type(v) for v in content["model"].values()} == {np.ndarray}
        assert content["__author__"]
        versions = content["model"]._metadata
        for name in ("sem_seg_head", "sem_seg_head.predictor"):
            assert versions[name] == {"version": 2}


FOREIGN = {
    "a backbone from the hub": {"backbone": "hub:someone/model", "backbone_options": {}},
    "options of timm": {"backbone": "resnet50", "backbone_options": {"checkpoint_path": "x"}},
    "no settings": [1, 2],
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_settings_in_our_place_are_not_read(case, tmp_path):
    state = reference("swin").state_dict()
    plain = open_model(saved(tmp_path / "a.pth", state)).config
    assert open_model(saved(tmp_path / "b.pth", state, segkern=FOREIGN[case])).config == plain


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
            with pytest.raises(ValueError, match="no such file"):
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
