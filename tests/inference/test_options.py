"""Options that a task or a model does not read are refused, not ignored; thresholds act."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import segkern
from segkern.cli import main
from segkern.evaluation.evaluate import evaluate
from segkern.inference.predict_files import Predicted, _names, predict_files
from segkern.models import Mask2Former, Mask2FormerConfig
from segkern.structures.logits import PixelLogits
from segkern.structures.settings import Options, Views
from support.models import Squares, half_bright, model_config


class Cells(nn.Module):
    """Gives class logits of pixels: label 1 everywhere."""

    def __init__(self):
        super().__init__()
        self.config = model_config(logits=PixelLogits, divisor=8)
        self.weight = nn.Parameter(torch.ones(()))

    def inputs(self, task, batch):
        return ()

    def predict(self, pixel_values):
        B, _, h, w = pixel_values.shape
        maps = torch.zeros(B, 2, h // 8, w // 8)
        maps[:, 1] = 1
        return PixelLogits(maps, 8)


UNUSED = [  # task, option, what the message says
    ("semantic", {"threshold": 0.5}, "threshold must be left out where task is 'semantic'"),
    ("semantic", {"threshold": 0.8}, "it is for panoptic and instance, got 0.8"),
    ("semantic", {"overlap_threshold": 0.5}, "overlap_threshold must be left out .* for panoptic"),
    ("instance", {"overlap_threshold": 0.0}, "overlap_threshold must be left out .* got 0.0"),
    ("panoptic", {"top_k": 5}, "top_k must be left out .* it is for instance, got 5"),
    (None, {"top_k": 100}, "top_k must be left out where task is 'panoptic'"),
    ("panoptic", {"resize": "scores"}, "resize must be left out .* it is for semantic"),
    ("instance", {"return_scores": True}, "return_scores must be left out .* got True"),
]
VIEWS = [{"window": 32}, {"stride": 16}, {"scales": (1.0, 0.5)}, {"flip": True}]


LOGITS = torch.zeros(1, 2, 3, device="cpu"), torch.zeros(1, 2, 4, 4, device="cpu")
CALLS = {
    "segment": lambda task, **given: segkern.segment(Squares(), half_bright(), task, **given),
    "predict_files": lambda task, **given: predict_files(Squares(), ["a"], "no", task, **given),
    "postprocess": lambda task, options: segkern.postprocess(
        *LOGITS, task or "panoptic", (8, 8), [(8, 8)], [(8, 8)], options=options
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("task", "option", "message"), UNUSED)
def test_what_a_task_does_not_read_is_refused(task, option, message, call):
    with pytest.raises(ValueError, match=message):
        CALLS[call](task, options=Options(**option))


@pytest.mark.parametrize("call", ["segment", "predict_files"])
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_views_are_refused_by_a_model_of_masks(view, call):
    with pytest.raises(ValueError, match="for models that give class logits of pixels"):
        CALLS[call](None, views=Views(**view))


def test_loose_settings_are_refused_as_whole_ones():
    with pytest.raises(ValueError, match="threshold must be left out where task is 'semantic'"):
        segkern.segment(Squares(), half_bright(), "semantic", threshold=0.8)
    with pytest.raises(ValueError, match="class logits of pixels"):
        segkern.segment(Squares(), half_bright(), scales=(0.5,))


@pytest.mark.parametrize(
    "option", [{"threshold": 0.5}, {"resize": "scores"}, {"top_k": 9}], ids=str
)
def test_what_a_model_of_pixels_does_not_read_is_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be left out"):
        segkern.segment(Cells(), half_bright(), **option)
    whole = segkern.segment(Cells(), half_bright(), return_scores=True, window=16, scales=(1, 2))
    assert whole.scores.shape == (2, 40, 60)


SCENES = SimpleNamespace(classes=["ground", "square"], stuff=(0,))


@pytest.mark.parametrize(
    ("tasks", "option"),
    [
        (("instance",), {"threshold": 0.5}),
        (("semantic",), {"threshold": 0.5}),
        (("instance", "semantic"), {"overlap_threshold": 0.5}),
        (("panoptic", "semantic"), {"top_k": 5}),
    ],
)
def test_evaluate_refuses_what_none_of_its_tasks_reads(tasks, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be left out"):
        evaluate(Squares(), SCENES, tasks, progress=False, **option)


class Unsure(Squares):
    """Its square has a score of about one half."""

    def predict(self, pixel_values):
        out = super().predict(pixel_values)
        out.classes[:, 1] = torch.tensor([-12.0, 1.0, 1.0])
        return out


@pytest.fixture
def unsure():
    return Unsure()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"threshold": "a"}, "threshold must be a number, got 'a'"),
        ({"overlap_threshold": "a"}, "overlap_threshold must be a number, got 'a'"),
        ({"top_k": 2.5}, "top_k must be an integer, got 2.5"),
    ],
)
def test_options_of_no_kind(option, message):
    with pytest.raises(TypeError, match=message):
        segkern.segment(Squares(), half_bright(), **option)


@pytest.mark.parametrize(
    ("task", "threshold", "found"),
    [
        ("panoptic", None, ["ground"]),
        ("panoptic", 0.4, ["ground", "square"]),
        ("instance", 0.4, ["square"]),
        ("instance", 0.6, []),
    ],
)
def test_a_threshold_acts(unsure, task, threshold, found):
    result = segkern.segment(unsure, half_bright(), task, threshold=threshold)
    assert [result.name(s.label_id) for s in result.segments] == found
    assert set(result.segmentation.unique().tolist()) - {0} == {s.id for s in result.segments}
    if task == "instance":
        everything = segkern.segment(unsure, half_bright(), task)
        assert len(everything.segments) == 2  # a query with each of its labels
        kept = everything.above(threshold)
        assert kept.segments == result.segments
        assert torch.equal(kept.segmentation, result.segmentation)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_predict_takes_one_threshold_by_default(unsure, task, tmp_path):
    Image.fromarray(half_bright()).save(tmp_path / "a.png")
    told: list[Predicted] = []
    predict_files(unsure, [tmp_path / "a.png"], tmp_path / "out", task, report=told.append)
    (picture,) = told
    assert picture.result.summary() == ("1 ground" if task == "panoptic" else "")
    assert picture.json == tmp_path / "out/a.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model of two labels, and a picture."""
    torch.manual_seed(0)
    config = Mask2FormerConfig.tiny(2)
    config.id2label = {0: "cat", 1: "dog"}
    path = tmp_path_factory.mktemp("model")
    Mask2Former(config).save_pretrained(path)
    Image.fromarray(half_bright(32, 32)).save(path / "a.png")
    return path


def predicted(folder, tmp_path, *options):
    out = str(tmp_path / "out")
    return main(["predict", str(folder / "a.png"), "--model", str(folder), "--out", out, *options])


def test_predict_says_what_it_found_in_a_line(folder, tmp_path, capsys):
    written = f"; written: {tmp_path / 'out/a.json'}"
    assert predicted(folder, tmp_path, "--task", "semantic") == 0
    line, end = capsys.readouterr().out.split("\n", 1)
    assert line.startswith(f"{folder / 'a.png'}: ")
    assert " %" in line
    assert "cat" in line or "dog" in line
    assert (line.endswith(written), end) == (True, "")
    assert predicted(folder, tmp_path, "--threshold", "1") == 0
    nothing = "nothing scored above the threshold; a lower --threshold shows more"
    assert capsys.readouterr().out == f"{folder / 'a.png'}: {nothing}{written}\n"
    assert predicted(folder, tmp_path, "--task", "instance", "--threshold", "0") == 0
    assert "0 cat" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "semantic", "--threshold", "0.5"], "threshold must be left out"),
        (["--scales", "0.5", "1"], "scales and flip are for models that give class logits"),
        (["--window", "64"], "window, stride, scales and flip are for models"),
        (["--max-pixels", "1000"], "more than max_pixels = 1000"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_predict_refuses_on_the_command_line(options, message, folder, tmp_path, capsys):
    assert predicted(folder, tmp_path, *options) == 2
    assert message in capsys.readouterr().err


NAMES = {
    "plain": (["x/a.png", "x/b.png"], ["a", "b"]),
    "same": (["x/a.png", "y/a.jpg", "z/a.png"], ["a", "a_2", "a_3"]),
    "as made": (["x/a.png", "y/a.png", "x/a_2.png"], ["a", "a_2", "a_2_2"]),
    "made before": (["x/a_2.png", "x/a.png", "y/a.png"], ["a_2", "a", "a_3"]),
    "case": (["x/A.png", "x/a.png"], ["A", "a_2"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_are_unique(case):
    paths, want = NAMES[case]
    assert list(_names(map(Path, paths))) == want


@pytest.mark.parametrize("kind", ["all different", "all the same"])
def test_names_of_many_pictures_take_no_time(kind):
    paths = [Path(f"{i}/{i if kind == 'all different' else 0}.png") for i in range(20_000)]
    start = time.process_time()
    assert len(set(_names(paths))) == 20_000
    assert time.process_time() - start < 1
