"""`segkern demo --all`: runs that are kept, gone on with or fail, and one table of all."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from segkern import recipes
from segkern.cli import main
from segkern.data import Digits, DigitsConfig, StreetsConfig, build_dataset
from segkern.evaluation.matched import matched
from segkern.models import Mask2Former, build_model
from segkern.recipes import compare as comparison
from segkern.recipes.compare import compare
from segkern.structures.logits import QueryLogits
from support.runs import write_checkpoint

QUICK = {"steps": 2, "batch_size": 2, "log_every": 1, "evaluate_every": 2, "evaluate_scenes": 2}
QUICK |= {"tensorboard": False, "warmup": 0}
SMALL = {
    "mask2former": {"num_queries": 5, "train_num_points": 32, "decoder_layers": 1},
    "segmenter": {"image_size": (32, 32), "embed_dim": 192, "depth": 1},
}


def small(name, size=(32, 32), **changes):
    config = recipes.RECIPES[name]()
    model = replace(config.model, **SMALL.get(config.model.kind, {}))
    data = replace(config.data, size=size)
    return replace(config, model=model, data=data, **(QUICK | changes))


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """Recipes, of which one fails."""
    rows = {
        "digits": lambda: small("digits"),
        "digits-segmenter": lambda: small("digits-segmenter"),
        "digits-bad": lambda: small("digits-segmenter", lr=1e30, optimizer="adamw", steps=4),
        "segmenter": recipes.segmenter,
    }
    monkeypatch.setattr(comparison, "RECIPES", rows)
    monkeypatch.setattr(comparison, "DRAWN", 2)
    monkeypatch.setattr(comparison, "_TIMED", 1)
    return rows


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that are trained, in order."""
    names = []

    def train(config, *args, real=comparison.train, **keywords):
        names.append(config.output.name)
        return real(config, *args, **keywords, progress=False)

    monkeypatch.setattr(comparison, "train", train)
    return names


@pytest.fixture
def undrawn(monkeypatch):
    """Without the picture."""
    monkeypatch.setattr(comparison, "_picture", lambda *_: None)


def read(path):
    """A table of Markdown as rows of text by column, and the lines beneath."""
    lines = path.read_text(encoding="utf-8").splitlines()
    cells = [[x.strip() for x in x.strip("|").split("|")] for x in lines if x.startswith("|")]
    return [dict(zip(cells[0], x)) for x in cells[2:]], [x for x in lines if x.startswith("- ")]


def test_two_models_and_one_that_fails(tmp_path, trained, capsys):
    assert main(["demo", "--all", "--output", str(tmp_path), "--scenes", "3"]) == 1  # one failed
    assert trained == ["digits", "digits-segmenter", "digits-bad"]
    printed = capsys.readouterr().out
    assert "digits-bad failed: FloatingPointError" in printed

    rows = json.loads((tmp_path / "digits.json").read_text())
    assert [row["model"] for row in rows] == trained
    found, pixels, failed = rows
    assert failed.keys() == {"model", "error"}
    assert found["steps"] == pixels["steps"] == 2
    model = Mask2Former.from_pretrained(tmp_path / "digits")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    for level in ("easy", "hard"):
        for name in ("class accuracy", "dice loss", "PQ", "mIoU"):
            assert 0 <= found[f"{level} {name}"] <= 1
        assert 0 <= pixels[f"{level} mIoU"] <= 1
        assert not pixels.get(f"{level} PQ")
    for row in (found, pixels):
        assert row["ms a step"] > 0
        assert row["ms an image"] > 0

    with (tmp_path / "digits.csv").open(newline="") as file:
        sheet = list(csv.DictReader(file))
    marked, beneath = read(tmp_path / "digits.md")
    assert len(sheet) == len(marked) == 3
    assert beneath[0].startswith("- digits-bad failed: FloatingPointError: the loss is not")
    assert sheet[2]["error"] == failed["error"]
    for row, cells, text in zip(rows, sheet, marked):
        assert set(text) == set(cells) - {"error"} == set(comparison.columns("digits"))
        for name in set(text) - {"model"}:
            value = row.get(name)
            assert (cells[name] == "") == (text[name] == "-") == (value is None)
            if value is not None:
                assert float(cells[name]) == value
                assert float(text[name].replace(",", "")) == pytest.approx(value, abs=0.06)
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.width > 1.5 * picture.height  # four columns, two rows


def test_finished_runs_are_kept(tmp_path, trained, capsys, undrawn):
    names = ["digits-segmenter"]
    first = compare(tmp_path, models=names, scenes=2)
    again = compare(tmp_path, models=names, scenes=2, steps=3)
    assert trained == names
    assert again == first
    assert "digits-segmenter: kept, 2 steps" in capsys.readouterr().out
    assert compare(tmp_path, models=names, scenes=2, steps=3, overwrite=True)[0]["steps"] == 3
    assert trained == names * 2


def test_a_stopped_run_goes_on(tmp_path, trained, monkeypatch, table, undrawn):
    def stop(*_, **__):
        raise KeyboardInterrupt

    table["digits-other"] = table["digits-segmenter"]
    names = ["digits-segmenter", "digits-other"]
    compare(tmp_path, models=names[:1], scenes=2)
    real = comparison.train
    with monkeypatch.context() as during:  # after a first checkpoint
        during.setattr(comparison, "train", lambda config: (real(config), stop()))
        with pytest.raises(KeyboardInterrupt):
            compare(tmp_path, models=names, scenes=2, steps=1)
    rows = json.loads((tmp_path / "digits.json").read_text())
    assert [row["model"] for row in rows] == names[:1]  # what was done is in the table

    rows = compare(tmp_path, models=names, scenes=2)
    assert trained == [*names, names[1]]
    assert [row["steps"] for row in rows] == [2, 2]
    lines = (tmp_path / "digits-other/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]  # it did not start anew

    (tmp_path / "digits-other" / comparison.ROW).unlink()  # killed while it was measured
    assert compare(tmp_path, models=names, scenes=2)[1]["steps"] == 2
    assert trained == [*names, names[1]]


def test_a_run_of_other_settings_is_left(tmp_path, trained, table, undrawn):
    table["digits"] = lambda: small("digits", steps=9)
    other = small("digits", lr=0.5, output=tmp_path / "digits")
    write_checkpoint(other.output, {"config": other.to_dict(), "step": 1, "seconds": 1.0})
    (row,) = compare(tmp_path, models=["digits"], scenes=2)
    assert "cannot go on from it: lr is 0.5 there" in row["error"]


def test_streets(tmp_path, table, trained, capsys):
    table["streets-segmenter"] = lambda: small("streets-segmenter")
    (row,) = compare(tmp_path, "streets", scenes=2)
    assert trained == ["streets-segmenter"]
    assert {"pixel accuracy", "mIoU", "IoU pole", "IoU sky"} <= row.keys() - {"error"}
    (text,), _ = read(tmp_path / "streets.md")
    assert text["pixel accuracy"] == f"{row['pixel accuracy']:.3f}"
    assert (tmp_path / "streets.png").stat().st_size > 10_000
    assert main(["evaluate", str(tmp_path / "streets-segmenter"), "--scenes", "2"]) == 0
    page = tmp_path / "streets-segmenter/evaluation/metrics.html"
    assert "streets-segmenter on streets" in page.read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "streets-segmenter"), "--level", "hard"]) == 2
    assert "--level is for scenes of digits, and the data is streets" in capsys.readouterr().err


@pytest.mark.parametrize("name", [x for x in recipes.RECIPES if x.startswith("streets-")])
def test_recipes_of_streets_fit_their_data(name):
    config = recipes.RECIPES[name]()
    assert isinstance(config.data, StreetsConfig)
    assert config.model.image_size == config.data.size
    assert list(config.model.id2label.values()) == build_dataset(config.data, "val").classes
    assert type(config).from_dict(config.to_dict()) == config
    parameters = sum(p.numel() for p in build_model(config.model).parameters())
    assert parameters < 10e6


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--all", "--models", "digits,unet"], "models must be of digits, digits-segmenter, "),
        (["--all", "--data", "streets"], "data must be one of digits, streets, got 'streets'"),
        (["--all", "--scenes", "0"], "scenes must be >= 1, got 0"),
        (["--all", "--steps", "0"], "steps must be >= 1, got 0"),
        (["--models", "digits"], "--models, --data and --overwrite are for --all"),
    ],
    ids=["model", "no-recipe", "scenes", "steps", "one"],
)
def test_bad_options(command, message, tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path), *command]) == 2
    assert message in capsys.readouterr().err


class Oracle(torch.nn.Module):
    """Finds what it is told, with the last query first; the others find nothing."""

    def __init__(self, data, wrong=0):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()))
        self.config = build_model(small("digits").model).config
        self.samples, self.wrong = iter(data), wrong

    def inputs(self, task, batch):
        return ()

    def predict(self, pixels):
        Q, K = 6, self.config.num_labels
        classes = torch.zeros(len(pixels), Q, K + 1)
        classes[..., -1] = 30
        masks = torch.full((len(pixels), Q, *pixels.shape[2:]), -30.0)
        for b in range(len(pixels)):
            sample = next(self.samples)
            for i, (mask, label) in enumerate(zip(sample["masks"], sample["labels"].tolist())):
                guess = (label + (i < self.wrong)) % 10
                classes[b, Q - 1 - i] = 30 * torch.nn.functional.one_hot(
                    torch.tensor(guess), K + 1
                )
                masks[b, Q - 1 - i] += 60 * torch.from_numpy(mask)
        return QueryLogits(classes, masks)


def test_figures_as_the_paper_counts_them():
    data = Digits(DigitsConfig(level="hard", task="instance"), "test")
    samples = [data[i] for i in range(5)]
    objects = sum(len(s["labels"]) for s in samples)
    right = matched(Oracle(samples), data, 5, batch_size=2)
    assert right["class_accuracy"] == 1
    assert right["dice_loss"] < 1e-5
    wrong = matched(Oracle(samples, wrong=1), data, 5, batch_size=2)
    assert wrong["class_accuracy"] == pytest.approx(1 - 5 / objects)
    assert wrong["dice_loss"] < 1e-5

    class Lost(Oracle):
        def predict(self, pixels):  # the first two are given to nobody
            found = super().predict(pixels)
            found.masks[:, -2:] = -30
            found.classes[:, -2:] = torch.eye(12)[11]
            return found

    lost = matched(Lost(samples), data, 5, batch_size=5)
    np.testing.assert_allclose(lost["class_accuracy"], 1 - 10 / objects)
    # an empty mask of a true one of n pixels: 1 - 1 / (n + 1)
    areas = np.concatenate([s["masks"][:2].sum((1, 2)) for s in samples])
    np.testing.assert_allclose(lost["dice_loss"], (1 - 1 / (areas + 1)).sum() / objects, rtol=1e-4)

    class Few(Oracle):
        def predict(self, pixels):  # one query for all objects
            return QueryLogits(*(x[:, -1:] for x in super().predict(pixels)[:2]))

    few = matched(Few(samples), data, 5, batch_size=5)
    assert few["class_accuracy"] == pytest.approx(5 / objects)
    assert few["dice_loss"] == pytest.approx(1 - 5 / objects, abs=1e-5)
