"""The plots of cost against size: tiny sizes are measured, written and drawn."""

import csv
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import _measure
import _segmenter
import plots


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(_measure, "DEVICE", "cpu")
    asked = []
    monkeypatch.setattr(_segmenter, "peak_memory", lambda *a: asked.append(a) or 7.0)
    return asked


def test_rows_and_figure(quick, tmp_path):
    plots.main(["--small", "--out", str(tmp_path / "out")])
    with (tmp_path / "out/plots.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == plots.COLUMNS
    assert len(rows) == 8  # two image sizes, two patch sizes, each in both plots
    assert len(quick) == 4  # and measured once
    assert {r["plot"] for r in rows} == {"tiny against image size", "tiny against patch size"}
    assert all(float(r["p50_ms"]) > 0 and r["peak_mb"] == "7.0" for r in rows)
    assert {int(r["tokens"]) for r in rows} == {4, 16, 64}
    with Image.open(tmp_path / "out/plots.png") as picture:
        assert min(picture.size) > 400


def test_attention_grows_with_the_square_of_the_tokens_and_the_rest_does_not():
    few, many = (_segmenter.flops(_segmenter.config("Seg-S/32", size)) for size in (512, 1024))
    tokens = [(size // 32) ** 2 + 1 for size in (512, 1024)]
    assert many[0] / few[0] == pytest.approx((tokens[1] / tokens[0]) ** 2)
    assert many[1] / few[1] == pytest.approx(tokens[1] / tokens[0], rel=1e-2)


def test_patches_that_do_not_divide_the_image_are_left_out(quick):
    cases = plots.segmenter_cases("tiny", [32], [8, 12], "float32")
    assert {c.x for c in cases if c.axis.startswith("patch")} == {8}
