"""The plots of cost against size: tiny sizes are measured, written and drawn."""

import csv
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import _measure
import _models
import _segmenter
import plots


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(_measure, "DEVICE", "cpu")
    asked = []
    monkeypatch.setattr(_segmenter, "peak_memory", lambda *a: asked.append(a) or 7.0)
    monkeypatch.setattr(_models, "peak_memory", lambda *a, script: asked.append(a) or 7.0)
    return asked


@pytest.mark.slow
def test_rows_and_figure(quick, tmp_path):
    plots.main(["--small", "--out", str(tmp_path / "out")])
    with (tmp_path / "out/plots.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == plots.COLUMNS
    assert all(float(r["p50_ms"]) > 0 and r["peak_mb"] == "7.0" for r in rows)
    segmenter = [r for r in rows if r["plot"].startswith("tiny against")]
    assert len(segmenter) == 8  # two image sizes, two patch sizes, each in both plots
    assert {int(r["tokens"]) for r in segmenter} == {4, 16, 64}
    assert {r["impl"] for r in segmenter} == {"segkern"}
    pairs = {(r["plot"].removeprefix("Mask2Former against "), r["impl"]) for r in rows[:-8]}
    panels = ("image size", "images", "queries", "targets", "backbone")
    assert pairs == {(p, impl) for p in panels for impl in ("segkern", "transformers")}
    alone = [r["impl"] for r in rows if r["plot"].endswith("images") and r["x"] == "2"]
    assert alone == ["segkern"]
    assert len(quick) == len(set(quick))  # what is in several plots is measured once
    for name in ("segmenter", "mask2former"):
        with Image.open(tmp_path / f"out/plots_{name}.png") as picture:
            assert min(picture.size) > 400


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own():
    case = str(_models.weights("tiny", 8)), "inference"
    ours, theirs = (
        _models.peak_memory(impl, *case, side, 1, 1, script=plots.__file__)
        for impl, side in (("segkern", 64), ("transformers", 512))
    )
    assert 0 < ours < theirs


def test_attention_grows_with_the_square_of_the_tokens_and_the_rest_does_not():
    few, many = (_segmenter.flops(_segmenter.config("Seg-S/32", size)) for size in (512, 1024))
    tokens = [(size // 32) ** 2 + 1 for size in (512, 1024)]
    assert many[0] / few[0] == pytest.approx((tokens[1] / tokens[0]) ** 2)
    assert many[1] / few[1] == pytest.approx(tokens[1] / tokens[0], rel=1e-2)


def test_patches_that_do_not_divide_the_image_are_left_out(quick):
    cases = plots.segmenter_cases("tiny", [32], [8, 12], "float32")
    assert {c.x for c in cases if c.axis.startswith("patch")} == {8}
