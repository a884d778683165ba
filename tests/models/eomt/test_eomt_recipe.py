"""EoMT's recipe on pictures of one's own."""

import numpy as np
import pytest

from segkern import recipes
from segkern.cli import main
from segkern.data import build_dataset
from segkern.models import EoMT, EoMTConfig, Mask2Former, Mask2FormerConfig
from support.pictures import noise, write, write_coco


@pytest.fixture
def objects(tmp_path):
    write_coco(tmp_path / "objects")
    return tmp_path / "objects"


def test_the_papers_settings(objects):
    config = recipes.eomt(objects, preset="small")
    model = config.model
    assert (model.hidden_size, model.num_blocks, model.image_size) == (384, 3, 640)
    assert model.backbone_pretrained
    assert model.backbone == "vit_small_patch14_reg4_dinov2.lvd142m"
    assert (config.lr, config.backbone_level_decay, config.weight_decay) == (1e-4, 0.8, 0.05)
    assert (config.schedule, config.warmup, config.backbone_warmup) == ("poly", 100, 200)
    assert (config.batch_size, config.steps, config.clip) == (16, 2000, 0.01)
    assert type(config).from_dict(config.to_dict()) == config
    turned = recipes.eomt(objects, preset="base", encoder="dinov3")
    assert (turned.lr, turned.model.encoder) == (2e-4, "dinov3")
    assert turned.model.backbone == "vit_base_patch16_dinov3.lvd1689m"


def test_views_are_of_the_models_size_and_padded_with_black(objects):
    config = recipes.eomt(objects, preset="tiny")
    data = build_dataset(config.data, "train", config.model)
    pixels = data[0]["pixel_values"]
    assert pixels.shape == (3, 64, 64)
    model = config.model.input
    assert model.padding == pytest.approx([-m / s for m, s in zip(model.mean, model.std)])
    black = np.array(model.padding, np.float32)[:, None, None]
    views = [data[(i % len(data), i)]["pixel_values"] for i in range(12)]
    assert any((view[:, -1:, -1:].numpy() == black).all() for view in views)
    assert not any((view[:, -1:, -1:] == 0).all() for view in views)


def test_maps_of_classes_make_a_model_of_windows(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / f"images/{split}/a.png", noise(0))
        write(tmp_path / f"labels/{split}/a.png", noise(0)[..., 0] % 2)
    (tmp_path / "classes.txt").write_text("road\nriver\n")
    config = recipes.eomt(tmp_path, preset="large")
    assert config.model.tasks == ("semantic",)
    assert (config.model.image_size, config.model.num_queries) == (512, 100)
    assert config.task == "semantic"


BAD = {
    "preset": ({"preset": "huge"}, "preset must be one of tiny, small, base, large, giant"),
    "both": ({"preset": "tiny", "init": "somewhere"}, "preset must be left out where init"),
    "task": ({"task": "semantic"}, "task must be instance or panoptic, got"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_recipe_does_not_take(case, objects):
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        recipes.eomt(objects, **settings)


def test_init_gives_the_sizes(objects, tmp_path):
    EoMT(EoMTConfig.tiny(7)).save_pretrained(tmp_path / "start")
    config = recipes.eomt(objects, init=tmp_path / "start")
    assert (config.model.hidden_size, config.optimizer) == (128, "muon")
    Mask2Former(Mask2FormerConfig.tiny(7)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="init must be a eomt, got a mask2former"):
        recipes.eomt(objects, init=tmp_path / "other")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command_trains_evaluates_and_predicts(objects, tmp_path, capsys):
    run, sizes = tmp_path / "run", "--model.hidden-size 32 --model.num-attention-heads 2"
    sizes += " --model.intermediate-size 32 --model.num-hidden-layers 2 --optimizer adamw"
    more = "--steps 2 --batch-size 2 --evaluate-every 2 --checkpoint-every 2 --warmup 1"
    train = (
        f"train --recipe eomt --preset tiny --data.root {objects} --output {run} {sizes} {more}"
    )
    assert main(train.split()) == 0, capsys.readouterr()
    assert main(["evaluate", str(run), "--out", str(tmp_path / "figures.json")]) == 0
    picture = tmp_path / "picture.png"
    write(picture, noise(0))
    assert main(["predict", str(picture), "--model", str(run), "--out", str(tmp_path / "o")]) == 0
    assert "ap" in (tmp_path / "figures.json").read_text()
