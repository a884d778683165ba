"""The recipes hold what their papers say, and their models and data fit together."""

from dataclasses import replace

import pytest

from segkern import recipes
from segkern.data import FolderConfig, build_dataset
from segkern.models import Mask2Former, Mask2FormerConfig, SegFormer, SegFormerConfig
from segkern.training.optimizer import learning_rate

DIGITS = [name for name in recipes.RECIPES if name.startswith("digits")]


@pytest.mark.parametrize("name", DIGITS)
def test_model_and_data_fit(name):
    config = recipes.RECIPES[name]()
    data = build_dataset(config.data, "train")
    assert len(data.classes) == config.model.num_labels
    assert list(config.model.id2label.values()) == data.classes
    assert type(config).from_dict(config.to_dict()) == config


# steps, batch, rate, crop, window stride, labels
PAPER = {
    ("Seg-S-Mask/16", "ade20k"): (161_664, 8, 1e-3, 512, 512, 150),
    ("Seg-L-Mask/16", "ade20k"): (161_664, 8, 1e-3, 640, 640, 150),
    ("Seg-B-Mask/16", "pascal_context"): (79_872, 16, 1e-3, 480, 320, 60),
    ("Seg-L-Mask/16", "cityscapes"): (80_136, 8, 1e-2, 768, 512, 19),
}


@pytest.mark.parametrize("case", PAPER, ids="/".join)
def test_segmenters_recipes(case):
    config = recipes.segmenter(*case)
    steps, batch, lr, crop, stride, labels = PAPER[case]
    assert (config.steps, config.batch_size, config.lr) == (steps, batch, lr)
    assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 0.0)
    assert (config.schedule, config.min_lr, config.warmup, config.clip) == ("poly", 1e-5, 0, 0.0)
    model = config.model
    assert (model.image_size, model.input.window, model.input.stride) == (
        (crop,) * 2,
        crop,
        stride,
    )
    assert model.num_labels == labels
    assert model.decoder_layers == (1 if case[1] == "cityscapes" else 2)


def test_a_segmenters_labels_are_those_of_its_folder(tmp_path):
    (tmp_path / "classes.txt").write_text("road\nriver\n")
    config = recipes.segmenter("Seg-L-Mask/16", "plain", root=tmp_path)
    assert config.model.num_labels == 2
    assert config.model.id2label == {0: "road", 1: "river"}
    assert config.model.image_size == (640, 640)
    assert config.model.input.stride == 640
    assert config.data == FolderConfig(tmp_path, "plain")
    assert type(config).from_dict(config.to_dict()) == config
    streets = recipes.segmenter("Seg-T/16", "cityscapes", root=tmp_path)
    assert streets.data == FolderConfig(tmp_path, "cityscapes")
    assert streets.model.id2label[18] == "bicycle"
    things = recipes.segmenter("Seg-T/16", "pascal_context", root=tmp_path)
    assert things.data == FolderConfig(tmp_path, "pascal_context")
    assert (things.model.num_labels, things.model.id2label[59]) == (60, "wood")
    assert recipes.segmenter().model.id2label is None


# steps, batch, crop, window, labels, pretrained encoder
SEGFORMER = {
    ("b0", "ade20k"): (160_000, 16, 512, None, 150, "nvidia/mit-b0"),
    ("b5", "ade20k"): (160_000, 16, 640, None, 150, "nvidia/mit-b5"),
    ("b2", "cityscapes"): (160_000, 8, 1024, 1024, 19, "nvidia/mit-b2"),
}


@pytest.mark.parametrize("case", SEGFORMER, ids="/".join)
def test_segformers_recipes(case):
    config = recipes.segformer(*case)
    steps, batch, crop, window, labels, backbone = SEGFORMER[case]
    assert (config.steps, config.batch_size, config.warmup) == (steps, batch, 1500)
    assert (config.optimizer, config.weight_decay, config.clip) == ("adamw", 0.01, 0.0)
    assert config.lr * config.backbone_lr_factor == pytest.approx(6e-5)
    assert (config.lr, config.schedule, config.power) == (6e-4, "poly", 1.0)
    rates = [learning_rate(i, config) / config.lr for i in (0, 749, 80_000, 159_999)]
    assert rates == pytest.approx([1 / 1500, 0.5, 0.5, 1 / 160_000], rel=0.01)
    model = config.model
    assert (model.input.crop, model.input.window) == ((crop,) * 2, window)
    assert (model.num_labels, model.backbone, model.backbone_pretrained) == (
        labels,
        backbone,
        True,
    )
    assert type(config).from_dict(config.to_dict()) == config


def test_a_segformers_labels_and_start(tmp_path):
    (tmp_path / "classes.txt").write_text("road\nriver\n")
    config = recipes.segformer(None, "plain", False, tmp_path)
    assert (config.model.num_labels, config.model.id2label) == (2, {0: "road", 1: "river"})
    assert (config.model.hidden_sizes[0], config.model.backbone_pretrained) == (32, False)
    small = replace(SegFormerConfig.tiny(4), layer_norm_eps=1e-6)
    SegFormer(small).save_pretrained(tmp_path / "run")
    again = recipes.segformer(None, "plain", True, tmp_path, tmp_path / "run")
    want = replace(small, num_labels=2, id2label={0: "road", 1: "river"})
    assert (again.model, again.init) == (want, str(tmp_path / "run"))
    Mask2Former(Mask2FormerConfig.tiny(2)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="init must be a segformer, got a mask2former"):
        recipes.segformer(None, "plain", True, tmp_path, tmp_path / "other")


@pytest.mark.parametrize("recipe", [recipes.segmenter, recipes.segformer])
def test_no_such_data_set(recipe):
    with pytest.raises(ValueError, match=r"dataset must be one of ade20k, .*, got 'coco'"):
        recipe(dataset="coco")
