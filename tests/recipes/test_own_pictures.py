"""From a folder of pictures to a model, by what a newcomer types."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from segkern.cli import main, train
from segkern.models import (
    Mask2Former,
    Mask2FormerConfig,
    SegFormer,
    SegFormerConfig,
    Segmenter,
    SegmenterConfig,
)
from support.own_pictures import PHOTOS, SHAPES, write_shapes
from support.pictures import noise, write, write_coco

ROOT = Path(__file__).parents[2]
ONE_THREAD = ("--threads", 1)  # the same rounding, and so the same model, with any number of cores


def segkern(*arguments):
    """The command as a process; its output."""
    command = [sys.executable, "-m", "segkern", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on scenes of digits, half a minute of it: what the others start from."""
    folder = tmp_path_factory.mktemp("digits")
    segkern("train", "--steps", 150, "--evaluate-every", 0, "--output", folder, *ONE_THREAD)
    return folder


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_a_small_model_learns_new_classes_from_48_pictures(task, digits, tmp_path):
    root, run, figures = tmp_path / "own", tmp_path / "run", tmp_path / "metrics.json"
    write_shapes(root, task)
    segkern("data", "check", root, "--out", tmp_path / "report")
    steps = ("--steps", 300, "--evaluate-every", 150, "--ema", 0.98, *ONE_THREAD)
    shown = segkern("train", "--data.root", root, "--init", digits, "--output", run, *steps)
    assert "new is the class head (11 labels there," in " ".join(shown.split())
    segkern("evaluate", run, "--out", figures)
    value = json.loads(figures.read_text())
    names = [*SHAPES, *(name.removesuffix(".jpg") for name in PHOTOS)]
    assert [row["name"] for row in value["classes"]] == names[: 3 if task == "instance" else 5]
    assert value["ap"] >= 0.6
    if task == "panoptic":
        assert value["pq"] >= 0.6
    picture = next((root / "val").glob("*.png"))
    shown = segkern("predict", picture, "--model", run, "--out", tmp_path / "found")
    assert "written" in shown


@pytest.fixture
def steps(monkeypatch):
    """The settings of the runs that commands ask for, in place of the runs."""
    asked = []

    class Done:
        steps, seconds = 0, 0.0

    monkeypatch.setattr(train, "run_train", lambda config, resume: asked.append(config) or Done())
    return asked


@pytest.mark.filterwarnings("ignore")
def test_the_data_tell_the_recipe(steps, tmp_path, capsys):
    """Objects give a Mask2Former, maps of classes a Segmenter, nothing digits."""
    write_coco(tmp_path / "objects")
    for split in ("train", "val"):
        write(tmp_path / f"maps/images/{split}/a.png", noise(0))
        write(tmp_path / f"maps/labels/{split}/a.png", noise(0)[..., 0] % 2)
    (tmp_path / "maps/classes.txt").write_text("road\nriver\n")
    Mask2Former(Mask2FormerConfig.tiny(7)).save_pretrained(tmp_path / "start")
    objects = ["--data.root", str(tmp_path / "objects")]
    maps = ["--data.root", str(tmp_path / "maps"), "--model.no-backbone-pretrained"]
    start = ["--init", str(tmp_path / "start")]
    for given in ([*objects, *start], maps, [*maps, "--data.layout", "plain"], []):
        assert main(["train", *given]) == 0, capsys.readouterr().err
    kinds = [(config.model.kind, config.data.kind) for config in steps]
    segmenter = ("segmenter", "folder")
    assert kinds == [("mask2former", "coco"), segmenter, segmenter, ("mask2former", "digits")]
    assert steps[0].init == start[1]
    assert main(["train", *objects, "--recipe", "mask2former", *start]) == 0
    assert steps[-1] == steps[0]
    assert main(["train", *maps, "--recipe", "segformer", "--preset", "b1"]) == 0
    model = steps[-1].model
    assert (model.kind, model.hidden_sizes[0], model.num_labels) == ("segformer", 64, 2)
    assert not model.backbone_pretrained


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_is_that_of_the_model_it_starts_from(steps, tmp_path, capsys):
    for split in ("train", "val"):
        write(tmp_path / f"own/images/{split}/a.png", noise(0))
        write(tmp_path / f"own/labels/{split}/a.png", noise(0)[..., 0] % 2)
    (tmp_path / "own/classes.txt").write_text("road\nriver\n")
    sizes = {"image_size": (32, 32), "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}
    Segmenter(SegmenterConfig(num_labels=5, **sizes)).save_pretrained(tmp_path / "start")
    own = ["train", "--data.root", str(tmp_path / "own"), "--init"]
    assert main([*own, str(tmp_path / "start")]) == 0, capsys.readouterr().err
    model = steps[0].model
    assert {name: getattr(model, name) for name in sizes} == sizes
    assert model.id2label == {0: "road", 1: "river"}
    assert (model.num_labels, model.backbone_pretrained) == (2, False)
    others = Mask2Former(Mask2FormerConfig.tiny(7)), SegFormer(SegFormerConfig.tiny(7))
    for kind, other in zip(("mask2former", "segformer"), others):
        other.save_pretrained(tmp_path / kind)
        assert main([*own, str(tmp_path / kind)]) == 0, capsys.readouterr().err
        assert (steps[-1].model.kind, steps[-1].model.num_labels) == (kind, 2)
    assert main([*own, str(tmp_path / "mask2former"), "--recipe", "segmenter"]) == 2
    assert "init must be a segmenter, got a mask2former" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_presets_are_models_of_the_recipe(steps, tmp_path, capsys):
    write_coco(tmp_path)
    own = ["train", "--data.root", str(tmp_path)]
    for preset in ("tiny", "resnet50", "swin_large"):
        assert main([*own, "--preset", preset]) == 0
    assert main([*own, "--preset", "swin_tiny", "--model.no-backbone-pretrained"]) == 0
    tiny, resnet, swin, random = steps
    assert (tiny.model.backbone, tiny.model.backbone_pretrained) == ("resnet_digits", False)
    assert (tiny.data.views.size, tiny.batch_size, tiny.schedule) == ((64, 64), 8, "cosine")
    assert (resnet.model.backbone, resnet.model.backbone_options) == (
        "resnet50",
        {"freeze_norm": True},
    )
    assert (swin.model.backbone, swin.model.num_queries) == ("swin_large", 200)
    assert (swin.data.views.size, swin.batch_size, swin.schedule) == ((1024, 1024), 16, "steps")
    assert [c.model.backbone_pretrained for c in (resnet, swin, random)] == [True, True, False]
    assert {c.model.num_labels for c in steps} == {3}
    assert main([*own, "--recipe", "maskformer", "--preset", "swin_small"]) == 0
    masks = steps[-1]
    assert (masks.model.kind, masks.model.backbone) == ("maskformer", "swin_small")
    assert (masks.lr, masks.weight_decay, masks.backbone_lr_factor, masks.clip) == (
        *(1e-4, 1e-4, 0.1, 0.01),
    )
    assert masks.output.name == "maskformer"
    Mask2Former(Mask2FormerConfig.tiny(7)).save_pretrained(tmp_path / "start")
    for wrong, message in {
        ("--recipe", "maskformer", "--init", str(tmp_path / "start")): (
            "maskformer: init must be a maskformer, got a mask2former"
        ),
        ("--preset", "huge"): "preset must be one of tiny, resnet50, .*, got 'huge'",
        ("--preset", "tiny", "--init", str(tmp_path / "start")): "preset must be left out",
    }.items():
        assert main([*own, *wrong]) == 2
        assert re.search(message, capsys.readouterr().err)
