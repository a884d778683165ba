"""What training checks before the first step, its evaluations and the best model, its start."""

import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_loop import Custom, config, same
from torch.utils.data import DataLoader

from segkern.cli import main
from segkern.data import Digits, Folder, FolderConfig
from segkern.data import folder as folder_format
from segkern.evaluation.evaluate import evaluate
from segkern.models import Segmenter, SegmenterConfig, open_model
from segkern.training import checkpoint
from segkern.training.loop import _line, train
from segkern.training.validation import Validation


@pytest.fixture
def maps(tmp_path):
    """Two images of training and one of validation, two classes."""
    root = tmp_path / "own"
    for split, count in (("train", 2), ("val", 1)):
        for i in range(count):
            values = np.random.default_rng(i).integers(0, 2, (16, 16), np.uint8)
            for kind, pixels in (("images", np.stack([60 * values] * 3, 2)), ("labels", values)):
                path = root / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    (root / "classes.txt").write_text("black\nwhite\n")
    return root


def of_maps(root, output, **changes):
    sizes = {"image_size": (16, 16), "patch_size": 8, "window_size": 16, "window_stride": 16}
    sizes |= {"embed_dim": 64, "depth": 1, "num_heads": 1, "decoder_layers": 1}
    model = SegmenterConfig(
        num_labels=changes.pop("num_labels", 2),
        shortest_edge=16,
        backbone_pretrained=False,
        **sizes,
    )
    settings = {"data": FolderConfig(root), "model": model, "steps": 2} | changes
    return config(output, **settings)


def test_a_bad_map_of_any_split_is_found_before_the_first_step(maps, tmp_path):
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(maps / "labels/val/0.png")
    with pytest.raises(ValueError, match=r"labels/val/0.png: values must be those of .* got 9"):
        train(of_maps(maps, tmp_path / "run", evaluate_every=1), progress=False)
    assert not list((tmp_path / "run").iterdir())
    for i in (0, 1):
        Image.fromarray(np.zeros((8, 16), np.uint8)).save(maps / f"labels/train/{i}.png")
    with pytest.raises(ValueError, match=r"0.png: the map must have the size .*2 of 2 maps"):
        train(of_maps(maps, tmp_path / "run"), progress=False)


def test_maps_are_read_once_while_they_stay(maps, monkeypatch):
    data, read = Folder(FolderConfig(maps)), []
    real = folder_format.Folder.labels
    monkeypatch.setattr(Folder, "labels", lambda s, p: read.append(p.name) or real(s, p))
    assert data.check(False) == []
    assert sorted(read) == ["0.png", "1.png"]
    assert data.check(False) == []
    assert len(read) == 2
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(maps / "labels/train/1.png")
    assert data.check(False) == []
    assert read[2:] == ["1.png"]
    (maps / "classes.txt").write_text("black\nwhite\ngrey\n")  # more labels: all are read again
    assert Folder(FolderConfig(maps)).check(False) == ["grey"]
    assert len(read) == 5


def test_absent_classes_are_said_in_training_and_evaluation(maps, tmp_path):
    for path in (maps / "labels").rglob("*.png"):
        Image.fromarray(255 * np.asarray(Image.open(path))).save(path)  # black and white
    with pytest.warns(
        UserWarning, match="1 of 2 classes occur in no map of the training .* white"
    ) as told:
        run = train(of_maps(maps, tmp_path / "run"), progress=False)
    assert {warning.filename for warning in told if "occur in no map" in str(warning.message)} == {
        __file__  # who called train
    }
    with pytest.warns(UserWarning, match="1 of 2 classes occur nowhere in the data: white"):
        evaluate(run.model, Folder(FolderConfig(maps), "val"), progress=False)


def test_a_run_of_one_class_is_measured_and_evaluate_knows_its_data(maps, tmp_path, capsys):
    (maps / "classes.txt").write_text("black\n")
    for path in (maps / "labels").rglob("*.png"):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(path)
    output = tmp_path / "run"
    train(of_maps(maps, output, num_labels=1, evaluate_every=1))
    shown = capsys.readouterr().out
    assert "step 1: miou 1.000, pixel_accuracy 1.000, the best miou so far" in shown
    assert "step 2: miou 1.000, pixel_accuracy 1.000\n" in shown
    figures = json.loads((output / "best/metrics.json").read_text())
    assert (figures["step"], figures["metric"], figures["miou"]) == (1, "miou", 1.0)
    assert sorted(p.name for p in output.iterdir()) == [
        "best",
        "checkpoints",
        "log.jsonl",
        "model",
    ]
    same(open_model(output).state_dict(), Segmenter.from_pretrained(output / "best").state_dict())
    assert main(["evaluate", str(output)]) == 0
    assert "black" in capsys.readouterr().out
    report = {"metrics.json", "metrics.html"}
    report |= {f"metrics.pixel_confusion.{kind}" for kind in ("png", "csv")}
    assert {p.name for p in (output / "evaluation").iterdir()} == report
    assert 'id="curves"' in (output / "evaluation/metrics.html").read_text(encoding="utf-8")
    assert main(["evaluate", str(output), "--level", "hard"]) == 2
    assert "--level is for scenes of digits" in capsys.readouterr().err
    train(of_maps(maps, output, num_labels=1, overwrite=True), progress=False)
    assert not (output / "evaluation").exists()  # of the run before


def test_the_best_of_earlier_steps_counts_and_no_other(maps, tmp_path):
    setting = of_maps(maps, tmp_path)
    path = tmp_path / "best/metrics.json"
    path.parent.mkdir()
    path.write_text('{"step": 3, "metric": "miou", "miou": 0.5}')
    assert Validation(None, setting, tmp_path, 4, True).best == 0.5
    other = replace(setting, best_metric="pixel_accuracy")
    assert Validation(None, other, tmp_path, 4, True).best is None
    assert Validation(None, setting, tmp_path, 2, True).best is None
    assert Validation(None, setting, tmp_path, 4, False).best is None
    new = Validation(None, replace(setting, evaluate_every=2), tmp_path, 4, False)
    assert (new.waited(4), new.waited(8)) == (0, 2)  # from where it goes on in a new folder
    assert path.is_file()


def test_the_checkpoint_is_there_when_an_evaluation_fails(tmp_path):
    class Bad(Digits):
        def __getitem__(self, index):
            raise OSError("the disk is gone")

    setting = config(tmp_path, evaluate_every=1)
    with pytest.raises(OSError, match="the disk is gone"):
        train(setting, dataset=Custom(), val_dataset=Bad(setting.data), progress=False)
    assert checkpoint.settings(tmp_path)["step"] == 1


@pytest.mark.parametrize(("step", "cause"), [(1, "no rate has touched"), (2, "lower --lr")])
def test_why_a_loss_is_not_finite(step, cause):
    bad = torch.tensor(float("nan"))
    for precision, said in (("fp32", False), ("fp16", True)):
        with pytest.raises(FloatingPointError, match=f"at step {step} .*{cause}") as error:
            _line(step, bad, {"loss_mask": bad[None]}, 0.1, precision)
        assert ("--precision fp32" in str(error.value)) == said


def test_data_of_ones_own(tmp_path, monkeypatch):
    setting = config(tmp_path, evaluate_every=1, steps=1)
    setting.model.stuff = ()
    with pytest.raises(ValueError, match="val_dataset must be given where dataset is"):
        train(setting, dataset=Custom(), progress=False)
    with pytest.raises(ValueError, match="dataset must have `stuff`, the labels without inst"):
        train(setting, dataset=Custom(), val_dataset=Custom(), progress=False)
    run = train(replace(setting, evaluate_every=0), dataset=Custom(), progress=False)
    assert main(["evaluate", str(tmp_path)]) == 2  # and no scenes of digits in its place
    again = replace(setting, output=tmp_path / "more", evaluate_every=0, lr=0.0, weight_decay=0.0)
    more = train(again, dataset=Custom(), model=run.model, progress=False)
    assert more.model is run.model
    monkeypatch.setenv("WORLD_SIZE", "")
    with pytest.raises(TypeError, match=r"model must be a segmentation model.* got a Linear"):
        train(setting, model=torch.nn.Linear(1, 1), progress=False)
    with pytest.raises(ValueError, match="evaluate_every must be at least 1 where val_dataset"):
        train(replace(again, overwrite=True), val_dataset=Custom(), progress=False)
    for count, said in (("2", "WORLD_SIZE says 2 processes, and RANK, "), ("two", "got 'two'")):
        monkeypatch.setenv("WORLD_SIZE", count)
        with pytest.raises(ValueError, match=said):
            train(setting, progress=False)


def test_a_run_is_gone_on_with_and_measured_from_another_folder(maps, tmp_path, monkeypatch):
    monkeypatch.chdir(maps.parent)
    train(of_maps(maps.name, tmp_path / "run", steps=1), progress=False)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert main(["train", "--resume", "../run", "--steps", "2"]) == 0
    assert main(["evaluate", "../run"]) == 0


def test_what_was_handed_over_is_asked_for_again(maps, tmp_path, capsys):
    setting = of_maps(maps, tmp_path / "run", evaluate_every=1, steps=1)
    held_out = DataLoader(Folder(setting.data, "val"), collate_fn=list)
    train(setting, val_dataset=held_out, progress=False)
    longer = replace(setting, steps=2)
    with pytest.raises(ValueError, match="val_dataset must be given to go on with"):
        train(longer, resume=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"init \(--init\) must be left out where a run goes on"):
        train(replace(longer, init="x"), resume=tmp_path / "run", val_dataset=held_out)
    train(replace(longer, evaluate_every=0), resume=tmp_path / "run", progress=False)
    longer = replace(setting, steps=3)
    with pytest.raises(ValueError, match="val_dataset must be given to go on with"):
        train(longer, resume=tmp_path / "run", progress=False)
    train(longer, resume=tmp_path / "run", val_dataset=held_out, progress=False)
    for part in ("model", "best", "model/config.json"):
        assert main(["evaluate", str(tmp_path / "run" / part)]) == 0
    assert "black" in capsys.readouterr().out
    maps.rename(tmp_path / "moved")
    for options, message in {
        (): "own, the data of .* is no folder here: give --data",
        ("--layout", "plain"): "--layout is for the folder of --data",
        ("--data", str(tmp_path / "moved"), "--split", "test"): "--split is for scenes of digits",
        ("--data", str(tmp_path / "moved"), "--max-pixels", "9"): "too large .*--data.max-pixels",
    }.items():
        assert main(["evaluate", str(tmp_path / "run"), *options]) == 2
        assert re.search(message, capsys.readouterr().err), options


@pytest.mark.parametrize("labels", [2, 3], ids=["same labels", "another head"])
def test_init_starts_from_the_weights_of_the_source(labels, maps, tmp_path):
    source = Segmenter(of_maps(maps, tmp_path).model)
    source.save_pretrained(tmp_path / "source")
    names = ("black", "white", "grey")[:labels]
    (maps / "classes.txt").write_text("\n".join(names))
    still = {"lr": 0.0, "steps": 1, "optimizer": "sgd", "num_labels": labels}
    setting = of_maps(maps, tmp_path / "run", init=tmp_path / "source", **still)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = train(setting, progress=False).model
    there, here = source.state_dict(), found.state_dict()
    head = () if labels == 2 else found.class_head
    for name in there.keys() - {*head}:
        assert torch.equal(there[name], here[name]), name
    with pytest.raises(ValueError, match="init must be None where model is given"):
        train(replace(setting, overwrite=True), model=found, progress=False)
