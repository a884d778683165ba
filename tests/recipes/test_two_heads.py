"""Seq2Seg and U-Net by what a newcomer types: recipes train, and their runs are evaluated, go on
and give models."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import segkern
from segkern import recipes
from segkern.cli import main
from segkern.data import build_dataset
from support.pictures import noise, write, write_coco

QUICK = ["--steps", "2", "--batch-size", "2", "--evaluate-every", "2", "--evaluate-scenes", "2"]
QUICK += ["--no-tensorboard", "--threads", "1", "--log-every", "1"]
HEADS = {
    "digits-seq2seg": ("seq2seg", "instance", {"class", "mask", "dice", "true_class"}),
    "digits-seq2seg-semantic": ("seq2seg", "semantic", {"bce"}),
    "digits-unet": ("unet", "instance", {"class", "mask", "dice", "true_class"}),
    "digits-unet-semantic": ("unet", "semantic", {"bce"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", HEADS)
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_on_digits(recipe, tmp_path, capsys):
    kind, head, losses = HEADS[recipe]
    assert main(["train", "--recipe", recipe, *QUICK, "--output", str(tmp_path)]) == 0, capsys
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert set(lines[-1]["losses"]) == losses
    assert lines[-1]["metrics"].keys() & {"pq", "miou"}
    model = segkern.open_model(tmp_path / "model")
    assert (model.config.kind, model.config.task_head) == (kind, head)
    picture = np.full((64, 48, 3), 127, np.uint8)
    for task in model.config.tasks:
        assert segkern.segment(model, picture, task).segmentation.shape == (64, 48)
    more = ["train", "--resume", str(tmp_path), "--steps", "3", "--evaluate-every", "0"]
    assert main(more) == 0, capsys
    scenes = build_dataset(recipes.RECIPES[recipe]().data, "test")
    assert segkern.evaluate(model, scenes, limit=2, progress=False)["images"] == 2


def folder_of_maps(root):
    for split in ("train", "val"):
        for i in range(2):
            write(root / f"images/{split}/{i}.png", noise(i))
            write(root / f"labels/{split}/{i}.png", noise(i)[..., 0] % 2)
    (root / "classes.txt").write_text("road\nriver\n")


OWN = [
    ("seq2seg", "tiny"),
    ("seq2seg", "tiny-instance"),
    ("unet", "tiny"),
    ("unet", "tiny-hungarian"),
]


def _case(case):
    """One model of each kind of data is trained in every run of the tests, the others in slow."""
    fast = case in (("seq2seg", "tiny"), ("unet", "tiny-hungarian"))
    return pytest.param(case, marks=() if fast else pytest.mark.slow, id=" ".join(case))


@pytest.mark.parametrize("case", map(_case, OWN))
@pytest.mark.filterwarnings("ignore")
def test_a_recipe_on_maps_of_ones_own(case, tmp_path, capsys):
    recipe, preset = case
    folder_of_maps(tmp_path / "own")
    own = ["train", "--recipe", recipe, "--data.root", str(tmp_path / "own"), *QUICK]
    run = tmp_path / "run"
    assert main([*own, "--preset", preset, "--output", str(run)]) == 0, capsys.readouterr().err
    model = segkern.open_model(run)
    assert model.config.id2label == {0: "road", 1: "river"}
    assert model.config.labels.stuff == (0, 1)
    again = [*own, "--init", str(run), "--output", str(tmp_path / "again")]
    assert main(again) == 0, capsys.readouterr().err
    assert segkern.open_model(tmp_path / "again").config == model.config
    assert main([*again, "--preset", preset]) == 2
    assert "preset must be left out where init gives the model" in capsys.readouterr().err


def test_objects_of_ones_own(tmp_path):
    write_coco(tmp_path)
    config = recipes.unet(tmp_path, preset="tiny-hungarian")
    assert (config.data.kind, config.model.num_labels) == ("coco", 3)
    assert config.data.views.size == (64, 64)
    with pytest.raises(
        ValueError, match=r"seq2seg: .* must hold maps of classes for a model with"
    ):
        recipes.seq2seg(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        recipes.unet(tmp_path / "nothing")


# steps of 100 pictures, batch, rate
PAPER = {
    (recipes.seq2seg, "semantic"): (1000, 24, 1e-4),
    (recipes.unet, "semantic-bert2"): (1000, 24, 1e-3),
}


@pytest.mark.parametrize("case", PAPER, ids=lambda c: c[1])
def test_the_papers_settings(case, tmp_path):
    recipe, preset = case
    folder_of_maps(tmp_path)
    config = recipe(tmp_path, layout="plain", preset=preset)
    assert (config.steps, config.batch_size, config.lr) == PAPER[case]
    assert (config.optimizer, config.weight_decay, config.schedule) == ("adamw", 0.0, "thirds")
    assert (config.clip, config.warmup, config.backbone_lr_factor) == (0.0, 0, 1.0)
    assert config.model == replace(
        type(config.model).preset(preset), num_labels=2, id2label={0: "road", 1: "river"}
    )
    assert type(config).from_dict(config.to_dict()) == config


def test_a_recipe_needs_its_folder(capsys):
    assert main(["train", "--recipe", "unet"]) == 2
    assert re.search("--recipe unet needs --data.root", capsys.readouterr().err)
