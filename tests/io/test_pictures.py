"""What is drawn is where it belongs; how it looks is for eyes."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from segkern.io import overlay, plots
from segkern.structures.segmentation import Segment, Segmentation


def result(ids, *segments):
    return Segmentation("panoptic", torch.as_tensor(ids, dtype=torch.int32), list(segments))


def halves(h=64, w=64, things=True):
    ids = np.ones((h, w), int)
    ids[:, w // 2 :] = 2
    return result(
        ids,
        Segment(1, 0, 0.9, h * w // 2, things),
        Segment(2, 1, None, h * w // 2, things),
    )


def test_colours_are_distinct_and_stay():
    shades = {overlay.colour(label, nth) for label in range(36) for nth in range(3)}
    assert len(shades) == 36 * 3
    assert all(0 <= c <= 255 for shade in shades for c in shade)
    segments = [Segment(i, label, None, 1, True) for i, label in enumerate((4, 7, 4))]
    a, b, c = overlay.colours(segments)
    assert a == overlay.colour(4)
    assert b == overlay.colour(7)
    assert c == overlay.colour(4, 1)


@pytest.mark.parametrize(("size", "times"), [((64, 64), 6), ((64, 200), 6), ((500, 400), 1)])
def test_overlay_keeps_or_multiplies_the_size(size, times):
    image = np.full((*size, 3), 100, np.uint8)
    picture = overlay.overlay(image, halves(*size))
    assert picture.size == (size[1] * times, size[0] * times)


def test_overlay_colours_each_segment():
    image = np.full((400, 400, 3), 100, np.uint8)
    pixels = np.array(overlay.overlay(image, halves(400, 400))).astype(int)
    left, right = pixels[380, 20], pixels[380, 380]
    for got, label in ((left, 0), (right, 1)):
        assert np.abs(got - (0.45 * 100 + 0.55 * np.array(overlay.colour(label)))).max() <= 1
    assert np.abs(pixels[380, 199] - overlay.colour(0)).max() < 40  # the contour is stronger


def test_overlay_leaves_void_alone_and_writes_names():
    image = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    void = overlay.overlay(image, result(np.zeros((400, 400))))
    assert np.array_equal(np.array(void), image)
    ids = np.zeros((400, 400), int)
    ids[200:260, 200:260] = 1
    named = result(ids, Segment(1, 3, 0.5, 3600, True))
    changed = (np.array(overlay.overlay(image, named)) != image).any(-1)
    assert changed[200:260, 200:260].mean() > 0.99
    outside = changed.copy()
    outside[200:260, 200:260] = False
    ys, xs = outside.nonzero()
    assert 50 < len(ys) < 4000  # the name stands beside the segment
    assert ys.min() > 150
    assert xs.max() < 320


def test_letters_beyond_ascii_are_not_all_one_box():
    drawn = set()
    for name in ("ü", "é", "ж", "λ"):
        found = halves(64, 64)
        found.names = {0: name, 1: ""}
        drawn.add(overlay.overlay(np.zeros((64, 64, 3), np.uint8), found).tobytes())
    assert len(drawn) == 4


def test_figures_are_silent_on_letters_that_no_font_has(tmp_path, recwarn):
    plots.save_confusion(tmp_path / "c.png", np.eye(2), ["猫", "犬"])
    assert not recwarn


@pytest.mark.parametrize("best", [0.5, None])
def test_thresholds(best):
    curve = {
        "score": [0, 0.5, 1],
        "precision": [0.2, 1, None],
        "recall": [1, 1, 0],
        "f1": [0, 1, 0],
    }
    file = io.BytesIO()
    plots.save_thresholds(file, curve, best)
    assert Image.open(file).format == "PNG"


def test_overlay_refuses_another_size():
    with pytest.raises(
        ValueError, match=r"image must be \[64, 64, 3\] as its result, got \[8, 8, 3\]"
    ):
        overlay.overlay(np.zeros((8, 8, 3), np.uint8), halves())


@pytest.mark.parametrize("top", [2, 255, 256, 65535])
def test_label_map_holds_the_ids(top, tmp_path):
    ids = np.random.default_rng(0).integers(0, top + 1, (30, 20))
    ids[0, :2] = 0, top
    overlay.save_label_map(tmp_path / "map.png", result(ids, Segment(2, 5, 0.5, 1, True)))
    read = Image.open(tmp_path / "map.png")
    assert read.mode == ("P" if top < 256 else "I;16")
    assert np.array_equal(np.array(read), ids)
    if top < 256:
        assert tuple(read.getpalette()[6:9]) == overlay.colour(5)


def test_label_map_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="ids must fit 16 bits, got 65536"):
        overlay.save_label_map(tmp_path / "map.png", result(np.full((2, 2), 65536)))
    assert list(tmp_path.iterdir()) == []


def log(path, steps=100):
    lines = [
        {"step": s, "loss": 9 / s, "losses": {"class": 1 / s, "mask": 2 / s}, "lr": 1e-3 / s}
        | ({"metrics": {"pq": s / 200, "ap": None}} if s % 50 == 0 else {})
        for s in range(1, steps + 1)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10')
    return path


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_curves(suffix, tmp_path):
    plots.save_curves(tmp_path / f"curves.{suffix}", log(tmp_path / "log.jsonl"))
    assert (tmp_path / f"curves.{suffix}").stat().st_size > 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"curves.{suffix}", "log.jsonl"]


def test_curves_of_an_empty_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"note": 1}\n')
    with pytest.raises(ValueError, match=r"log.jsonl: no line with a step"):
        plots.save_curves(tmp_path / "curves.png", tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    with pytest.raises(ValueError, match=r"log.jsonl: no losses, rates or metrics"):
        plots.save_curves(tmp_path / "curves.png", tmp_path / "log.jsonl")


def test_scenes_and_confusion(tmp_path):
    image = np.full((64, 64, 3), 90, np.uint8)
    rows = [(image, halves(), halves(things=False)), (image, halves(), result(np.zeros((64, 64))))]
    plots.save_scenes(tmp_path / "scenes.png", rows, "title", notes=["one", "two"])
    width, height = Image.open(tmp_path / "scenes.png").size
    assert width > 800
    assert height > 600
    plots.save_confusion(tmp_path / "confusion.png", np.eye(4) * 7, ["a", "$x_$", "c"])
    many = [f"class {k}" for k in range(plots.LABELLED + 1)]
    plots.save_confusion(tmp_path / "many.png", np.eye(len(many)), many)
    assert min(Image.open(tmp_path / "confusion.png").size) > 300


def test_scenes_need_a_row(tmp_path):
    with pytest.raises(ValueError, match="save_scenes: rows must not be empty"):
        plots.save_scenes(tmp_path / "scenes.png", [])
