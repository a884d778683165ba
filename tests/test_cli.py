"""The command line: every command once, and one clear line for every error."""

import importlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from segkern import recipes
from segkern.cli import main
from segkern.data import DigitsConfig
from segkern.models import Mask2Former, Mask2FormerConfig
from segkern.training import checkpoint
from segkern.training.config import TrainConfig
from support.runs import write_checkpoint
from support.small_models import tokens


@pytest.fixture(scope="module")
def small():
    """A recipe of three quick steps."""
    setting = recipes.digits()
    model = replace(setting.model, num_queries=5, train_num_points=32, decoder_layers=1)
    return replace(
        setting,
        steps=3,
        batch_size=2,
        log_every=1,
        evaluate_every=2,
        evaluate_scenes=2,
        tensorboard=False,
        data=replace(setting.data, size=(32, 32)),
        model=model,
    )


@pytest.fixture(autouse=True)
def _small_recipe(small, monkeypatch):
    monkeypatch.setattr(recipes, "digits", lambda: replace(small))
    monkeypatch.setattr("segkern.recipes.demo.digits", lambda: replace(small))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model of the digits' labels, not trained."""
    folder = tmp_path_factory.mktemp("model")
    Mask2Former(replace(recipes.digits().model)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["evaluate"], ["predict"], ["demo"], ["convert"], ["info"], ["serve"]],
    ids=str,
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: segkern")
    for word in {"train": ["--output", "--steps", "--resume", "--data.level"]}.get(
        "".join(command), command
    ):
        assert word in text


def test_demo_writes_figures_and_pictures(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path), "--steps", "2", "--scenes", "6"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    names = "pq sq rq class_accuracy train_seconds images_per_second hard"
    assert set(names.split()) <= metrics.keys()
    assert metrics["hard"].keys() == {"pq", "class_accuracy", "dice"}
    assert metrics["steps"] == 2
    for name in ("easy", "hard", "curves", "confusion", "example"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.verify()
    assert {"model", "checkpoints", "log.jsonl"} <= {p.name for p in tmp_path.iterdir()}
    assert str(tmp_path) in capsys.readouterr().out


def test_train_resume_evaluate_predict(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["train", "--output", str(run), "--lr", "2e-3", "--model.num-queries", "6"]) == 0
    assert main(["train", "--resume", str(run), "--steps", "5"]) == 0  # the rest is remembered
    state = checkpoint.settings(run)
    assert (state["step"], state["config"]["lr"]) == (5, 2e-3)
    assert state["config"]["model"]["num_queries"] == 6
    figures = tmp_path / "figures.json"
    command = ["evaluate", str(run), "--scenes", "4", "--level", "hard", "--out", str(figures)]
    assert main(command) == 0
    assert json.loads(figures.read_text())["images"] == 4
    page = figures.with_suffix(".html").read_text(encoding="utf-8")
    for part in ("run on hard scenes", 'id="curves"', 'id="worst"', "model.num_queries", "torch"):
        assert part in page
    assert not (run / "evaluation").exists()
    pictures = [tmp_path / name for name in ("grey.png", "alpha.png", "odd.jpg")]
    for path, shape in zip(pictures, ((70, 50), (64, 64, 4), (33, 91, 3))):
        Image.fromarray(np.full(shape, 90, np.uint8)).save(path)
    command = ["predict", *map(str, pictures), "--model", str(run), "--out", str(out)]
    options = ["--threshold", "0", "--device", "cpu", "--no-cuda-graphs", "--size", "48"]
    assert main([*command, *options]) == 0
    for path in pictures:
        assert json.loads((out / f"{path.stem}.json").read_text())["task"] == "panoptic"
        assert (out / f"{path.stem}_overlay.png").is_file()
        assert (out / f"{path.stem}_labels.png").is_file()
    assert "written: " in capsys.readouterr().out


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "cpu kernels", "SIMD"):
        assert word in text


def spoilt_model(folder):
    Mask2Former(recipes.digits().model).save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return ["evaluate", str(folder)]


def other_model(folder):
    Mask2Former(Mask2FormerConfig.tiny(7)).save_pretrained(folder)
    return ["evaluate", str(folder), "--scenes", "2"]


def no_image(folder):
    (folder / "note.png").write_text("not a picture")
    return ["predict", str(folder / "note.png"), "--out", str(folder / "out")]


def empty_folder(folder):
    (folder / "empty").mkdir()
    return ["predict", str(folder / "empty"), "--out", str(folder / "out")]


def closed_folder(folder):
    (folder / "file").write_text("")
    return ["train", "--output", str(folder / "file" / "run")]


def spoilt_run(folder):
    (folder / "last.pt").write_bytes(b"PK\x03\x04 cut short")
    return ["train", "--resume", str(folder)]


def foreign_run(folder):
    torch.save({"weights": torch.zeros(2)}, folder / "last.pt")
    return ["train", "--resume", str(folder)]


def other_run(folder):
    setting = replace(recipes.digits(), output=folder)
    save_run(folder, setting.to_dict())
    return ["train", "--resume", str(folder), "--model.num-queries", "9"]


def later_run(folder):
    save_run(folder, recipes.digits().to_dict() | {"colour": 0.9})
    return ["train", "--resume", str(folder)]


def save_run(folder, settings):
    write_checkpoint(folder, {"config": settings, "step": 2, "seconds": 1.0})


def wrong_device(folder):
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    return ["predict", str(folder / "a.png"), "--out", str(folder / "out"), "--device", "abacus"]


ERRORS = [
    (spoilt_model, "model.safetensors"),
    (other_model, "as many classes as the model has labels, 7, got 10"),
    (no_image, "note.png: not an image that PIL can read"),
    (empty_folder, "empty holds no image"),
    (closed_folder, "cannot write into folder"),
    (spoilt_run, "last.pt: not a whole checkpoint"),
    (foreign_run, "last.pt: not a checkpoint of segkern train"),
    (other_run, "cannot go on from it: model.num_queries is 5 there, 9 here"),
    (later_run, "settings of another version of segkern"),
    (lambda f: ["train", "--resume", str(f)], "no such checkpoint"),
    (lambda f: ["train", "--output", str(f), "--steps", "0"], "steps must be >= 1, got 0"),
    (lambda f: ["evaluate", str(f / "none")], "no such folder"),
    (lambda f: ["evaluate", str(f)], "config.json"),
    (lambda f: ["evaluate", str(f), "--out", str(f / "x.html")], "--out must be a JSON file, got"),
    (wrong_device, "device 'abacus' cannot be used"),
    (lambda f: ["demo", "--output", str(f), "--scenes", "0"], "scenes must be >= 1, got 0"),
    (lambda f: ["serve", str(f), "--batch", "0"], "serve: batch must be at least 1, got 0"),
    (lambda f: ["serve", str(f / "none"), "--host", "192.0.2.1"], "cannot listen at 192.0.2.1:80"),
]


@pytest.mark.parametrize(
    ("make", "message"), ERRORS, ids=[m.__name__.strip("<>") + m_[:12] for m, m_ in ERRORS]
)
def test_errors_are_one_line_and_exit_code_2(make, message, tmp_path, model_folder, capsys):
    command = make(tmp_path)
    if command[0] == "predict":
        command += ["--model", str(model_folder)]
    assert main(command) == 2
    errors = capsys.readouterr().err.strip()
    assert message in errors
    assert errors.count("\n") == 0
    assert errors.startswith("segkern")


@pytest.mark.parametrize(
    "command", [["fly"], ["train", "--no-such-option"], ["train", "--steps", "many"], ["predict"]]
)
def test_usage_errors_exit_with_2(command, tmp_path, capsys):
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert command != ["predict"] or "predict: no image given" in capsys.readouterr().err


def test_demo_leaves_a_run_of_the_users_own(tmp_path, capsys):
    save_run(tmp_path, replace(recipes.digits(), lr=0.5).to_dict())
    file = checkpoint.find(tmp_path) / "__0_0.distcp"
    before = file.read_bytes()
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "holds a run that is no demo" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_debug_shows_where(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint"):
        main(["--debug", "train", "--resume", str(tmp_path)])


def test_failed_training_exits_with_1_and_ctrl_c_with_130(monkeypatch, capsys):
    for error, code in (
        (FloatingPointError("not finite"), 1),
        (KeyboardInterrupt("stopped"), 130),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("segkern.cli.train.run_train", fail)
        assert main(["train"]) == code
        assert str(error) in capsys.readouterr().err


def test_recipes_fit_their_data():
    for task, labels in (("panoptic", 11), ("instance", 10), ("semantic", 11)):
        setting = REAL(task=task)
        assert setting.model.num_labels == labels == len(setting.model.id2label)
        assert setting.data == DigitsConfig(level="mixed", task=task)


def test_config_survives_a_checkpoint(tmp_path):
    before = replace(REAL("hard", size=(96, 64)), output=tmp_path)
    torch.save(before.to_dict(), tmp_path / "config.pt")
    assert TrainConfig.from_dict(torch.load(tmp_path / "config.pt")) == before


REAL = recipes.digits  # before the fixture puts the small one in its place


@pytest.mark.slow
def test_export_says_what_it_wrote(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    tokens().save_pretrained(tmp_path / "model")
    file = tmp_path / "out" / "model.onnx"
    command = ["export", str(tmp_path / "model"), str(file), "--fixed", "--post", "semantic"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "task semantic; gives labels; 1 at a time, 32 x 32" in said
    assert "for pixels [1, 3, 32, 32]: labels 0.0e+00" in said
    assert f"written: {file}" in said
    assert [p.name for p in file.parent.iterdir()] == ["model.onnx"]
    for more, words in (
        (["--one-size"], "give --fixed or --one-size, got both"),
        (["--bundle"], "are for a file"),
        (["--task", "panoptic"], "post must be the task"),
    ):
        assert main([*command, *more]) == 2
        assert words in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "model.tflite")]) == 2
    assert "path must end in .onnx, .xml, .pt2" in capsys.readouterr().err

    def differs(*_, bound, **__):
        raise ValueError(f"must equal the model to {bound}")

    monkeypatch.setattr(importlib.import_module("segkern.cli.export"), "write_file", differs)
    assert main([*command, "--bound", "0.5"]) == 2
    assert "must equal the model to 0.5" in capsys.readouterr().err
