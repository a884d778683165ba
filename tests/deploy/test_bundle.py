"""A bundle segments pictures without PyTorch, and finds what `segment` finds."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

import segkern
from segkern.cli import main
from segkern.deploy import predict_alone
from segkern.deploy.bundle import _settings, bundle
from segkern.inference.segment import segment
from segkern.io.images import read_image
from segkern.structures.settings import InputConfig, Options
from support.models import Squares, model_config
from support.small_models import convolutions, pixels, tokens

BLOCKED = "import sys\nsys.modules['torch'] = sys.modules['segkern'] = None\n"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Large tiles of few colours."""
    path = tmp_path_factory.mktemp("picture") / "tiles.png"
    colours = np.random.default_rng(1).integers(0, 256, (3, 4, 3), np.uint8)
    Image.fromarray(colours.repeat(13, 0).repeat(17, 1)).save(path)
    return path


def mask_of(segment):
    size, counts = segment["segmentation"]["size"], segment["segmentation"]["counts"]
    return coco.decode(coco.frPyObjects({"size": size, "counts": counts}, *size)).astype(bool)


def predicted(folder, picture, out):
    """The JSON that predict.py writes where neither torch nor segkern can be imported."""
    (out / "sitecustomize.py").write_text(BLOCKED)
    command = [sys.executable, folder / "predict.py", picture, "--out", out]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(out)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=out, timeout=300)
    assert done.returncode == 0, done.stderr
    with Image.open(out / f"{picture.stem}.overlay.png") as drawn, Image.open(picture) as given:
        assert drawn.size == given.size
    return json.loads((out / f"{picture.stem}.json").read_text())


def assert_same(found, want):
    """Segment by segment; of masks 99 % of the pixels of either."""
    assert found["task"] == want.task
    assert found["size"] == list(want.segmentation.shape)
    assert len(found["segments"]) == len(want.segments) > 0
    for i, (a, b) in enumerate(zip(found["segments"], want.to_json()["segments"], strict=True)):
        assert (a["id"], a["label_id"], a["label"]) == (b["id"], b["label_id"], b["label"])
        assert a["isthing"] == b["isthing"]
        assert a["score"] == (None if b["score"] is None else pytest.approx(b["score"], abs=0.01))
        mask, other = mask_of(a), want.mask(i).numpy()
        assert (mask & other).sum() >= 0.98 * (mask | other).sum()
        assert a["area"] == mask.sum()
        x, y, w, h = a["bbox"]
        assert mask[y : y + h, x : x + w].sum() == a["area"]
        assert mask[[y, y + h - 1]].any(1).all()
        assert mask[:, [x, x + w - 1]].any(0).all()


def test_a_bundle_predicts_without_torch(picture, tmp_path, capsys):
    torch.manual_seed(0)
    model = tokens(id2label={0: "sky", 1: "sea", 2: "sand"})
    model.save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), str(tmp_path / "bundle")]
    assert main([*command, "--task", "panoptic", "--threshold", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "gives class_queries_logits, masks_queries_logits; any number of pictures" in said
    names = {"model.onnx", "labels.json", "preprocessing.json", "predict.py"}
    assert {p.name for p in (tmp_path / "bundle").iterdir()} == names
    (tmp_path / "out").mkdir()
    found = predicted(tmp_path / "bundle", picture, tmp_path / "out")
    model = segkern.open_model(tmp_path / "model")
    assert_same(found, segment(model, picture, "panoptic", threshold=0.1))
    assert main(command) == 2
    assert "folder must not be there yet" in capsys.readouterr().err


class Runner:
    """A model in the place of onnxruntime's session."""

    def __init__(self, model, task):
        self.model, self.task = model.eval(), task

    @torch.no_grad()
    def __call__(self, x):
        x = torch.from_numpy(np.ascontiguousarray(x))
        found = self.model.predict(x, *self.model.inputs(self.task, len(x)))
        if not hasattr(found, "classes"):
            return [found.maps.numpy()]
        masks = found.masks
        if found.features is not None:
            masks = torch.einsum("bqc,bchw->bqhw", masks, found.features)
        return [found.classes.numpy(), masks.numpy()]


CASES = {
    "windows of a model of pixels": (lambda: pixels(shortest_edge=48), "semantic", {}),
    "a picture smaller than a window": (
        lambda: pixels(shortest_edge=20, longest_edge=24),
        "semantic",
        {},
    ),
    "pixels without windows": (lambda: convolutions(shortest_edge=30), "semantic", {}),
    "windows of queries": (lambda: tokens(windows=True), "semantic", {}),
    "semantic of queries": (lambda: convolutions(head="instance"), "semantic", {}),
    "panoptic": (lambda: convolutions(head="instance"), "panoptic", {"threshold": 0.0}),
    "panoptic with stuff": (
        lambda: convolutions(head="instance", stuff=(0, 1, 2)),
        "panoptic",
        {"threshold": 0.0, "overlap_threshold": 0.0},
    ),
    "instance": (
        lambda: convolutions(head="instance"),
        "instance",
        {"top_k": 5, "threshold": 0.0},
    ),
    "instance with stuff": (
        lambda: convolutions(head="instance", stuff=(1,)),
        "instance",
        {"threshold": 0.1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_its_way_from_logits_to_segments_is_that_of_segment(case, picture):
    """The template's functions, with the model in place of the file."""
    make, task, given = CASES[case]
    torch.manual_seed(3)
    model = make().eval()
    takes = json.loads(json.dumps(_settings(model, task, Options(**given))))
    image = predict_alone.read(picture)
    found = predict_alone.segments_of(Runner(model, task), image, takes)
    names = {str(k): v for k, v in (model.config.labels.names or {}).items()}
    result = predict_alone.as_json(found, image, takes, names)
    assert_same(result, segment(model, picture, task, **given))


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_thresholds_are_those_of_segkern_predict(task):
    takes = _settings(convolutions(head="instance"), task, Options())
    assert (takes["threshold"], takes["overlap_threshold"]) == (0.8, 0.8)


def test_nothing_found_is_an_empty_list(picture):
    model = convolutions(head="instance").eval()
    takes = _settings(model, "panoptic", Options(threshold=1.0))
    image = predict_alone.read(picture)
    assert predict_alone.segments_of(Runner(model, "panoptic"), image, takes) == []
    assert predict_alone.overlay([], image).size == image.size


SETTINGS = {
    "as it is": {},
    "short side": {"shortest_edge": 40},
    "both sides": {"shortest_edge": 40, "longest_edge": 50},
    "long side": {"longest_edge": 50},
    "one size": {"size": (30, 44)},
    "within": {"within": (40, 40)},
    "as Hugging Face": {"shortest_edge": 40, "longest_edge": 50, "multiple": 8},
    "multiples alone": {"multiple": 8},
    "padded": {"shortest_edge": 24, "pad_size": (64, 80)},
    "black": {"divisor": 16, "black": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("size", [(39, 68), (68, 39), (32, 32)])
def test_pictures_become_the_pixels_that_segment_makes(settings, size):
    model = Squares()
    fields = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3), "divisor": 8} | settings
    model.config = replace_input(model_config(2), InputConfig(**fields))
    colours = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    image = Image.fromarray(colours.repeat(20, 0).repeat(20, 1)).resize(size[::-1])
    segment(model.eval(), np.array(image), "semantic")
    (want,) = model.seen
    takes = json.loads(json.dumps(_settings(model, "semantic", Options())))
    have = predict_alone.padded(predict_alone.pixels_of(image, takes), takes)
    assert have.dtype == np.float32
    assert have.shape == tuple(want.shape[1:])
    # a resize rounds to 8 bits, by another path
    np.testing.assert_allclose(have, want[0].numpy(), atol=2.1 / 255 / 0.2)


def replace_input(config, given):
    config.input = given
    return config


def test_pictures_are_read_upright_and_on_white(tmp_path):
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = np.asarray(predict_alone.read(tmp_path / "a.png"))
    assert (image[:2] == 0).all()
    assert (image[2:] == 255).all()
    turned = Image.fromarray(pixels[..., :3])
    exif = Image.Exif()
    exif[274] = 6
    turned.save(tmp_path / "b.jpg", exif=exif)
    assert predict_alone.read(tmp_path / "b.jpg").size == (4, 6)
    deep = np.array([[0, 300, 30000, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    have = np.asarray(predict_alone.read(tmp_path / "deep.png"))
    want = read_image(tmp_path / "deep.png").float().permute(1, 2, 0).numpy()
    assert np.abs(have - 255 * want).max() <= 0.5


def test_pictures_of_one_name_have_results_of_their_own():
    paths = [Path(name) for name in ("a/1.jpg", "b/1.jpg", "1_2.jpg", "c/1.PNG")]
    assert predict_alone.names_of(paths) == ["1", "1_2", "1_2_2", "1_3"]


def test_what_cannot_be_bundled_is_named(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(ValueError, match=r"folder must not be there yet, got .*full"):
        bundle(tokens(), tmp_path / "full")
    with pytest.raises(ValueError, match="task must be 'semantic' for a Segmenter"):
        bundle(pixels(), tmp_path / "new", "instance")
    model = tokens()
    model.config = replace(model.config, image_mean=(0.5,), image_std=(0.5,))
    with pytest.raises(ValueError, match="pictures of 3 channels, the model takes 1"):
        bundle(model, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
