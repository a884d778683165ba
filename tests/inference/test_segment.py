"""Pictures of every kind to segments."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segkern.inference.segment import segment
from segkern.io.images import prepare, read_image, target_size
from support.models import Squares, half_bright


def kinds_of_picture():
    rgb = half_bright()
    grey = rgb[..., 0]
    alpha = np.full_like(grey, 255)
    clear = np.dstack((np.zeros_like(rgb), 255 - grey))  # black, the left half transparent
    palette = Image.fromarray(grey).convert("P")
    palette.info["transparency"] = 255  # white is transparent: shows white
    return {
        "numpy": rgb,
        "numpy grey": grey,
        "numpy grey channel": grey[..., None],
        "numpy bool": grey > 0,
        "numpy float64": rgb / 255,
        "numpy uint16": grey.astype(np.uint16) * 257,
        "numpy rgba": np.dstack((rgb, alpha)),
        "numpy flipped view": rgb[:, ::-1][:, ::-1],
        "numpy read-only": np.broadcast_to(grey[..., None], (*grey.shape, 3)),
        "transparent": clear,
        "tensor uint8": torch.from_numpy(rgb).movedim(2, 0),
        "tensor float": torch.from_numpy(rgb).movedim(2, 0) / 255,
        "tensor half": torch.from_numpy(rgb).movedim(2, 0).half() / 255,
        "tensor grey": torch.from_numpy(grey),
        "tensor grey, alpha": torch.from_numpy(np.stack((grey, alpha))),
        "pil": Image.fromarray(rgb),
        "pil L": Image.fromarray(grey),
        "pil LA": Image.fromarray(grey).convert("LA"),
        "pil RGBA": Image.fromarray(clear),
        "pil 1": Image.fromarray(grey).convert("1"),
        "pil P": palette,
        "pil CMYK": Image.fromarray(rgb).convert("CMYK"),
        "pil I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "pil I": Image.fromarray(grey.astype(np.int32) * 257),
        "pil I, deeper": Image.fromarray(grey.astype(np.int32) * 8_000_000),
        "pil F": Image.fromarray(grey).convert("F"),
        "pil F to 1": Image.fromarray(grey.astype(np.float32) / 255),
        "pil F, deeper": Image.fromarray(grey.astype(np.float32) * 1e6),
    }


@pytest.mark.parametrize("kind", kinds_of_picture())
def test_segment_takes_any_picture(kind):
    model = Squares().train()
    out = segment(model, kinds_of_picture()[kind])
    assert out.segmentation.shape == (40, 60)
    assert [(s.label_id, s.area, s.isthing) for s in out.segments] == [
        (0, 1200, False),
        (1, 1200, True),
    ]
    assert out.name(1) == "square"
    assert model.training
    assert model.inner.training
    (x,) = model.seen
    assert x.shape == (1, 3, 48, 64)  # padded below and to the right with zeros
    assert (x[:, :, 40:] == 0).all()
    assert (x[..., 60:] == 0).all()
    assert x[0, :, 0, 0].tolist() == [2.0, 2.0, 2.0]
    assert x[0, :, 0, 59].tolist() == [-2.0, -2.0, -2.0]


def test_segment_keeps_mixed_modes():
    model = Squares().train()
    model.inner.eval()
    segment(model, half_bright())
    assert model.training
    assert not model.inner.training


def test_segment_list_is_independent_of_company():
    model = Squares()
    images = [half_bright(h, w) for h, w in ((40, 60), (90, 31), (33, 64), (40, 60), (1, 1))]
    together = segment(model, images, batch_size=2)
    assert sorted(len(x) for x in model.seen) == [1, 1, 1, 2]
    for image, result in zip(images, together):
        alone = segment(model, image)
        assert result.segmentation.shape == image.shape[:2]
        assert torch.equal(result.segmentation, alone.segmentation)
    assert segment(model, []) == []
    assert isinstance(segment(model, images[:1]), list)


def test_inputs_are_made_a_batch_at_a_time(monkeypatch):
    made, seen = [], []
    monkeypatch.setattr(
        "segkern.inference.segment.prepare", lambda *x: made.append(0) or prepare(*x)
    )
    model = Squares().eval()
    predict = model.predict
    monkeypatch.setattr(model, "predict", lambda x: seen.append(len(made)) or predict(x))
    segment(model, 5 * [half_bright()], batch_size=2)
    assert seen == [2, 4, 5]


def test_segment_resizes_as_configured_and_answers_at_the_original_size():
    model = Squares(shortest_edge=20, longest_edge=64)
    out = segment(model, half_bright(400, 600), task="semantic")
    assert model.seen[0].shape == (1, 3, 32, 32)  # 20 x 30, padded
    assert out.segmentation.shape == (400, 600)
    assert out.segmentation[0, [0, 599]].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("size", "shortest", "longest", "want"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((300, 900), 800, 1333, (444, 1333)),
        ((300, 900), None, 450, (150, 450)),
        ((300, 900), None, 1000, (300, 900)),
        ((300, 900), 150, None, (150, 450)),
        ((300, 900), None, None, (300, 900)),
        ((1, 5000), 64, 128, (1, 128)),
    ],
)
def test_target_size(size, shortest, longest, want):
    assert target_size(size, shortest, longest) == want


def test_prepare_resizes_like_pil():
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 50, 70), generator=g, dtype=torch.uint8)
    config = Squares(shortest_edge=25, mean=(0,) * 3, std=(1,) * 3).config.input
    small = prepare(image, config) * 255
    pil = Image.fromarray(image.movedim(0, 2).numpy()).resize((35, 25), Image.Resampling.BILINEAR)
    assert (small - torch.from_numpy(np.array(pil)).movedim(2, 0)).abs().max() <= 1.001
    torch.testing.assert_close(small, small.round())  # 8 bits, as PIL has it


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), ValueError, r"image: must be \[H, W\] or \[H, W, C\]"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"\[H, W, C\] .* got \[3, 8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "not empty"),
        (torch.zeros(5, 8, 8), ValueError, r"\[C, H, W\] with 1 to 4 channels .* got \[5, 8, 8\]"),
        (torch.full((3, 8, 8), math.nan), ValueError, "image: pixels must be finite, got NaN"),
        (torch.full((3, 8, 8), 200.0), ValueError, r"must be in \[0, 1\], got 200 to 200"),
        (
            torch.zeros(3, 8, 8, dtype=torch.int64),
            TypeError,
            "bool, uint8, uint16 or floating, got int64",
        ),
        (Image.new("I", (8, 8), -500), ValueError, "pixels must not be negative, got -500"),
        (Image.new("F", (8, 8), math.nan), ValueError, "pixels must be finite, got NaN"),
        (Image.new("F", (0, 8)), ValueError, "not empty"),
        ({"image": 1}, TypeError, "must be a path, PIL image, array or tensor, got dict"),
    ],
    ids=[
        *("4d", "chw array", "empty", "channels", "nan", "range", "int64"),
        *("pil negative", "pil nan", "pil empty", "dict"),
    ],
)
def test_bad_pictures_are_named(image, error, message):
    with pytest.raises(error, match=message):
        segment(Squares(), image)
    with pytest.raises(error, match="image 1: "):
        segment(Squares(), [half_bright(), image])


def test_segment_options_are_checked_first():
    with pytest.raises(ValueError, match="task must be one of"):
        segment(Squares(), [], task="x")


def test_a_model_without_the_protocol_is_told_what_it_lacks():
    with pytest.raises(TypeError, match=r"a Linear has no predict, inputs, config.tasks"):
        segment(nn.Linear(2, 2), half_bright())


def test_file_that_is_no_image(tmp_path):
    text, cut, gone = tmp_path / "text.png", tmp_path / "cut.png", tmp_path / "gone.png"
    text.write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[:-3000])
    for path, why in (
        (text, "not an image"),
        (cut, "not a readable image"),
        (gone, "no such file"),
        (tmp_path, "not a readable image"),
    ):
        with pytest.raises(ValueError, match=f"{path.name}: {why}"):
            segment(Squares(), path)


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.fromarray(half_bright()).save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").shape == (3, 60, 40)


MEMORY = """
import sys
import torch
from torch import nn
from segkern import segment
from segkern.structures.logits import QueryLogits
sys.path.append({tests!r})
from support.models import BIG, Squares, half_bright, model_config

H, W, Q = 2048, 4096, 100
WIDE = {"threshold": 0.0, "overlap_threshold": 0.0}

class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.config = model_config(133, stuff=(0,), divisor=32)

    def inputs(self, task, batch):
        return ()

    def predict(self, x):
        masks = torch.empty(1, Q, H // 4, W // 4)
        for q in range(Q):
            masks[0, q] = nn.functional.interpolate(
                6 * torch.randn(1, 1, 16, 32), (H // 4, W // 4), mode="bilinear"
            )[0, 0]
        classes = 2 * torch.randn(1, Q, 134)
        return QueryLogits(classes, masks)

def memory(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

image = torch.zeros(3, H, W, dtype=torch.uint8)
segment(Noise(), image[:, :64, :64])
for task in ("semantic", "panoptic", "instance"):
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest mark starts anew
    found = segment(Noise(), image, task, **(WIDE if task == "panoptic" else {}))
    assert len(found.segments) > 5, found.segments
    print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts it there")
def test_memory_does_not_grow_with_queries_times_pixels():
    """2048 x 4096, 100 queries: within 1.5 times the input, the label map and the logits."""
    script = MEMORY.replace("{tests!r}", repr(str(Path(__file__).parents[1])))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    pixels = 2048 * 4096
    most = 1.5 * 4 * (3 * pixels + pixels + 100 * pixels / 16)
    assert max(map(int, run.stdout.split())) <= most < 4 * 100 * pixels / 5
