"""Pictures of every kind to segments, and files of them to overlays, label maps and JSON."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segkern.data import Digits, DigitsConfig
from segkern.evaluation.evaluate import evaluate
from segkern.inference.predict_files import predict_files
from segkern.inference.segment import segment
from segkern.io.images import prepare, read_image, target_size
from segkern.models import Mask2Former, Mask2FormerConfig
from segkern.structures.logits import QueryLogits
from segkern.structures.settings import Options
from support.models import model_config

BIG = 12.0


class Squares(nn.Module):
    """Finds the bright part of the picture (label 1) and the rest (label 0); keeps its input."""

    def __init__(self, **settings):
        super().__init__()
        names = {0: "ground", 1: "square"}
        self.config = model_config(names=names, stuff=(0,), divisor=16, **settings)
        self.weight = nn.Parameter(torch.ones(()))
        self.inner = nn.BatchNorm2d(3)
        self.seen = []

    def inputs(self, task, batch):
        return ()

    def predict(self, pixel_values):
        assert not self.training
        assert not self.inner.training
        assert not torch.is_grad_enabled()
        self.seen.append(pixel_values)
        bright = self.weight * pixel_values.mean(1) * BIG
        masks = torch.stack((-bright, bright), 1)[..., ::2, ::2]
        classes = torch.full((len(masks), 2, 3), -BIG)
        classes[:, 0, 0] = classes[:, 1, 1] = BIG
        return QueryLogits(classes, masks)


def half_bright(h=40, w=60):
    image = np.zeros((h, w, 3), np.uint8)
    image[:, : w // 2] = 255
    return image


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
    model = Squares()
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


# files


def folder_of_pictures(folder):
    folder.mkdir()
    rgb = half_bright()
    Image.fromarray(rgb).save(folder / "a.png")
    Image.fromarray(rgb).save(folder / "a.jpg")
    Image.fromarray(rgb[..., 0]).save(folder / "grey.bmp")
    Image.fromarray(np.dstack((rgb, rgb[..., 0]))).save(folder / "clear.png")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(folder / "deep.tiff")
    (folder / "notes.txt").write_text("not a picture, and not tried")
    return folder


def test_predict_writes_three_files_a_picture(tmp_path):
    written, failed = predict_files(
        Squares(), [folder_of_pictures(tmp_path / "in")], tmp_path / "out"
    )
    names = ["a", "a_2", "clear", "deep", "grey"]
    assert [p.name for p in written] == [f"{n}.json" for n in names]
    assert failed == []
    files = {f"{n}{end}" for n in names for end in (".json", "_labels.png", "_overlay.png")}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files
    for name, source in zip(names, ("a.jpg", "a.png", "clear.png", "deep.tiff", "grey.bmp")):
        told = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert told["image"] == source
        assert told["size"] == [40, 60]
        labels = np.array(Image.open(tmp_path / "out" / f"{name}_labels.png"))
        assert labels.shape == (40, 60)
        for s in told["segments"]:
            assert s["label"] == ("square" if s["isthing"] else "ground")
            assert (labels == s["id"]).sum() == s["area"]
        assert Image.open(tmp_path / "out" / f"{name}_overlay.png").size == (600, 400)


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_predict_does_every_task(task, tmp_path):
    folder_of_pictures(tmp_path / "in")
    (written,), _ = predict_files(Squares(), [tmp_path / "in/a.png"], tmp_path / "out", task)
    told = json.loads(written.read_text())
    found = [s["label"] for s in told["segments"]]
    assert told["task"] == task
    assert found == (["square"] if task == "instance" else ["ground", "square"])


def test_predict_names_the_bad_file_and_does_the_others(tmp_path):
    folder = folder_of_pictures(tmp_path / "in")
    (folder / "b.png").write_text("no picture")
    seen = []
    written, failed = predict_files(
        Squares(),
        [folder, tmp_path / "gone.png"],
        tmp_path / "out",
        report=lambda path, why: seen.append((path.name, why)),
    )
    assert len(written) == 5
    assert [p.name for p, _ in failed] == ["b.png", "gone.png"]
    assert failed[0][1] == f"{folder / 'b.png'}: not an image that PIL can read"
    assert failed[1][1] == f"{tmp_path / 'gone.png'}: no such file"
    assert [name for name, why in seen if why] == ["b.png", "gone.png"]
    assert len(seen) == 7
    assert not list((tmp_path / "out").glob("b*"))


def test_predict_does_not_write_among_the_pictures(tmp_path):
    folder = folder_of_pictures(tmp_path / "in")
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="holds the pictures themselves; choose another --out"):
        predict_files(Squares(), [folder / "a.png"], folder)
    assert sorted(folder.iterdir()) == before


def test_predict_names_a_picture_of_nan(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    _, failed = predict_files(Squares(), [tmp_path / "nan.tiff"], tmp_path / "out")
    assert [why.startswith(f"{tmp_path / 'nan.tiff'}: ") for _, why in failed] == [True]


def test_predict_refuses_an_empty_folder_and_no_path(tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"folder .*bare holds no image"):
        predict_files(Squares(), [tmp_path / "bare"], tmp_path / "out")
    with pytest.raises(ValueError, match="no image given"):
        predict_files(Squares(), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_predict_finds_an_unwritable_folder_before_it_works(tmp_path, monkeypatch):
    folder = folder_of_pictures(tmp_path / "in")
    model = Squares()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into folder .*file"):
        predict_files(model, [folder], tmp_path / "file")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)  # root may write anywhere
    with pytest.raises(OSError, match=r"cannot write into folder .*locked: Permission denied"):
        predict_files(model, [folder], tmp_path / "locked")
    assert model.seen == []


def test_predict_checks_options(tmp_path):
    folder = folder_of_pictures(tmp_path / "in")
    with pytest.raises(ValueError, match=r"overlap_threshold must be in \[0, 1\], got 2"):
        predict_files(Squares(), [folder], tmp_path / "out", options=Options(overlap_threshold=2))
    assert not (tmp_path / "out").exists()


def test_all_void_picture_gives_whole_files(tmp_path):
    model = Squares()
    folder = folder_of_pictures(tmp_path / "in")
    (written,), failed = predict_files(
        model, [folder / "a.png"], tmp_path / "out", options=Options(object_mask_threshold=1.0)
    )
    assert failed == []
    assert json.loads(written.read_text())["segments"] == []
    assert not np.array(Image.open(tmp_path / "out/a_labels.png")).any()
    shown = np.array(Image.open(tmp_path / "out/a_overlay.png"))
    assert (shown[::10, ::10] == half_bright()).all()


# a real model


def test_a_real_model_finds_evaluates_and_predicts(tmp_path):
    """Untrained: every picture gets a whole result of its own size, and every metric a value."""
    model = Mask2Former(Mask2FormerConfig.tiny(11)).train()
    model.config.stuff = (10,)
    pictures = [half_bright(h, w) for h, w in ((64, 64), (90, 200), (33, 40), (64, 64))]
    for task in ("panoptic", "instance", "semantic"):
        together = segment(model, pictures, task, 0.0, 0.0)
        for picture, result in zip(pictures, together):
            assert result.segmentation.shape == picture.shape[:2]
            assert len(result.segments) > 0
    scenes = Digits(DigitsConfig(), "val")
    value = evaluate(model, scenes, limit=5, progress=False, object_mask_threshold=0.0)
    assert value["images"] == 5
    assert value["instances"] >= 5
    assert 0 <= value["pq"] < 0.5
    assert 0 <= value["ap"] < 0.5
    assert 0 <= value["miou"] < 0.5
    folder = folder_of_pictures(tmp_path / "in")
    options = Options(object_mask_threshold=0.0)
    written, failed = predict_files(model, [folder], tmp_path / "out", options=options)
    assert (len(written), failed) == (5, [])
    assert model.training


MEMORY = """
import sys
import torch
from torch import nn
from segkern import segment
from segkern.structures.logits import QueryLogits
sys.path.append({tests!r})
from support.models import model_config

H, W, Q = 2048, 4096, 100

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
    found = segment(Noise(), image, task, 0.0, 0.0)
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
