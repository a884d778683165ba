"""The recipes hold what their papers say, and their models and data fit together."""

import pytest

from segkern import recipes
from segkern.data import FolderConfig, build_dataset


@pytest.mark.parametrize("name", ["digits", "digits-segmenter", "digits-eomt"])
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


def test_no_such_data_set():
    with pytest.raises(ValueError, match=r"dataset must be one of ade20k, .*, got 'coco'"):
        recipes.segmenter(dataset="coco")
