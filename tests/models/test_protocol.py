"""What a model must have, and nothing else: a small SegFormer that is named nowhere in segkern.

It trains, evaluates, predicts, is replayed from a CUDA graph and is saved by the public functions.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segkern
from segkern import models
from segkern.data import Digits, DigitsConfig
from segkern.inference.predict_files import predict_files
from segkern.nn.resized_cross_entropy import resized_cross_entropy
from segkern.structures.labels import Labels
from segkern.structures.logits import PixelLogits
from segkern.structures.roles import parameter_roles
from segkern.structures.settings import InputConfig
from support.cuda import alive

ROOT = Path(__file__).parents[2]


@dataclass
class SkeletonConfig:
    kind: ClassVar[str] = "skeleton"
    tasks: ClassVar[tuple[str, ...]] = ("semantic",)
    logits: ClassVar[type] = PixelLogits
    num_labels: int = 11
    backbone_pretrained: bool = False

    labels = property(lambda self: Labels(None, tuple(range(self.num_labels))))
    input = property(lambda self: InputConfig((0.5,) * 3, (0.25,) * 3, divisor=8))


class Skeleton(nn.Module):
    """A pyramid of two strides; all levels to one width, fused at the finest: SegFormer."""

    class_head = ("classify.weight", "classify.bias")

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList([nn.Conv2d(3, 16, 7, 4, 3), nn.Conv2d(16, 32, 3, 2, 1)])
        self.fuse = nn.ModuleList([nn.Conv2d(16, 24, 1), nn.Conv2d(32, 24, 1)])
        self.classify = nn.Conv2d(48, config.num_labels, 1)

    def inputs(self, task, batch):
        return ()

    def predict(self, pixel_values):
        fine = self.stages[0](pixel_values).relu()
        maps = [f(x) for f, x in zip(self.fuse, (fine, self.stages[1](fine).relu()))]
        maps = [F.interpolate(x, size=maps[0].shape[2:], mode="bilinear") for x in maps]
        return PixelLogits(self.classify(torch.cat(maps, 1)), 4)

    def loss(self, pixel_values, targets):
        labels, size = targets.semantic.long(), pixel_values.shape[2:]
        loss = resized_cross_entropy(self.predict(pixel_values).maps, labels, size)
        return loss, {"loss_cross_entropy": loss[None]}

    def parameter_roles(self):
        return parameter_roles(self, self.stages, blocks=())

    def gradient_checkpointing_enable(self, enable=True):
        pass

    def save_pretrained(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"model_type": "skeleton", **asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(settings))
        torch.save(self.state_dict(), folder / "weights.pt")

    @classmethod
    def from_pretrained(cls, folder):
        settings = json.loads((folder / "config.json").read_text())
        settings.pop("model_type")
        model = cls(SkeletonConfig(**settings))
        model.load_state_dict(torch.load(folder / "weights.pt"))
        return model.eval()


@pytest.fixture
def listed(monkeypatch):
    """The one line that a new model adds."""
    row = models.Kind(SkeletonConfig, Skeleton)
    monkeypatch.setitem(models.MODELS, "skeleton", row)


def built():
    torch.manual_seed(0)
    return Skeleton(SkeletonConfig()).eval()


def picture(seed=0, size=(36, 50)):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def settings(folder, **changes):
    data = DigitsConfig((32, 32), task="semantic")
    given = {"steps": 5, "batch_size": 2, "lr": 1e-2, "warmup": 0, "tensorboard": False}
    given |= {"data": data, "model": SkeletonConfig(), "evaluate_every": 5, "evaluate_scenes": 3}
    return segkern.TrainConfig(output=folder, **(given | changes))


def test_it_trains_evaluates_and_resumes(listed, tmp_path):
    run = segkern.train(settings(tmp_path), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "miou" in lines[-1]["metrics"]
    assert not all(map(torch.equal, run.model.parameters(), built().parameters()))
    scenes = Digits(DigitsConfig((32, 32), task="semantic"), "test")
    value = segkern.evaluate(run.model, scenes, limit=4, batch_size=3, progress=False)
    assert value["images"] == 4
    assert 0 <= value["miou"] <= 1
    opened = segkern.open_model(tmp_path / "model")
    assert isinstance(opened, Skeleton)
    assert all(map(torch.equal, opened.parameters(), run.model.parameters()))
    again = segkern.train(settings(tmp_path, steps=7), resume=tmp_path, progress=False)
    assert again.steps == 7


def test_it_predicts_what_its_logits_say(tmp_path):
    model, image = built(), picture()
    result = segkern.segment(model, image)
    pixels = (torch.from_numpy(image).movedim(2, 0) / 255 - 0.5) / 0.25
    padded = F.pad(pixels, (0, 56 - 50, 0, 40 - 36))[None]
    logits = F.interpolate(model.predict(padded).maps, size=(40, 56), mode="bilinear")
    want = logits[0, :, :36, :50].softmax(0)
    assert result.task == "semantic"
    chosen = want.gather(0, result.segmentation[None].long())[0]
    torch.testing.assert_close(chosen, want.amax(0), rtol=0, atol=1e-5)
    scores = segkern.segment(model, image, return_scores=True).scores
    torch.testing.assert_close(scores, want)
    views = segkern.Views(window=24, stride=16, scales=(1.0, 0.5), flip=True)
    averaged = segkern.segment(model, [image], return_scores=True, views=views)[0].scores
    torch.testing.assert_close(averaged.sum(0), torch.ones(36, 50))
    loose = segkern.segment(
        model, image, return_scores=True, window=24, stride=16, scales=(1.0, 0.5), flip=True
    )
    assert torch.equal(loose.scores, averaged)
    from PIL import Image

    Image.fromarray(image).save(tmp_path / "picture.png")
    (written,), failed = predict_files(model, [tmp_path / "picture.png"], tmp_path / "out")
    assert failed == []
    assert json.loads(written.read_text())["task"] == "semantic"


def test_it_is_replayed(everywhere):
    model = built()
    wanted = [segkern.segment(model, picture(i), cuda_graphs=False) for i in range(5)]
    for i, want in enumerate(wanted):
        assert torch.equal(segkern.segment(model, picture(i)).segmentation, want.segmentation)
    assert len(everywhere) == 1
    assert alive(everywhere)() == 1


def test_images_of_one_size_go_through_it_together():
    model, seen = built(), []
    predict = model.predict
    model.predict = lambda x: seen.append(len(x)) or predict(x)
    images = [picture(i) for i in range(5)] + [picture(0, (32, 32))]
    together = segkern.segment(model, images, batch_size=2)
    assert seen == [2, 2, 1, 1]
    for image, result in zip(images, together):
        alone = segkern.segment(model, image)
        assert (alone.segmentation == result.segmentation).float().mean() > 0.999


def test_it_is_named_nowhere_in_the_package():
    for path in (ROOT / "segkern").rglob("*.py"):
        assert "skeleton" not in path.read_text().lower(), path
