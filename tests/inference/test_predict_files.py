"""Pictures in files to overlays, label maps and JSON, one failure keeping no other from it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segkern.data import Digits, DigitsConfig
from segkern.evaluation.evaluate import evaluate
from segkern.inference.predict_files import predict_files
from segkern.inference.segment import segment
from segkern.io import sources
from segkern.models import Mask2Former, Mask2FormerConfig
from segkern.structures.settings import Options
from support.models import Squares, half_bright


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
        report=lambda picture: seen.append((Path(picture.image).name, picture.error)),
    )
    assert len(written) == 5
    assert [Path(image).name for image, _ in failed] == ["b.png", "gone.png"]
    assert failed[0][1] == f"{folder / 'b.png'}: not an image that PIL can read"
    assert failed[1][1] == f"{tmp_path / 'gone.png'}: no such file"
    assert [name for name, why in seen if why] == ["b.png", "gone.png"]
    assert len(seen) == 7
    assert not list((tmp_path / "out").glob("b*"))


def test_addresses_stay_as_they_are(tmp_path, monkeypatch):
    folder = folder_of_pictures(tmp_path / "in")

    def fetch(url, *_):
        if "gone" in url:
            raise OSError("404")
        return (folder / "a.png").read_bytes()

    monkeypatch.setattr(sources, "fetch", fetch)
    urls = ["https://host//a%20b.png?size=1/2", "https://host/gone.png"]
    seen = []
    written, failed = predict_files(Squares(), urls, tmp_path / "out", report=seen.append)
    assert [picture.image for picture in seen] == urls
    assert [path.name for path in written] == ["a b.json"]
    assert failed == [(urls[1], f"{urls[1]}: 404")]


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
        model, [folder / "a.png"], tmp_path / "out", options=Options(threshold=1.0)
    )
    assert failed == []
    assert json.loads(written.read_text())["segments"] == []
    assert not np.array(Image.open(tmp_path / "out/a_labels.png")).any()
    shown = np.array(Image.open(tmp_path / "out/a_overlay.png"))
    assert (shown[::10, ::10] == half_bright()).all()


def test_a_real_model_finds_evaluates_and_predicts(tmp_path):
    """Untrained: every picture gets a whole result of its own size, and every metric a value."""
    model = Mask2Former(Mask2FormerConfig.tiny(11)).train()
    model.config.stuff = (10,)
    pictures = [half_bright(h, w) for h, w in ((64, 64), (90, 200), (33, 40), (64, 64))]
    for task in ("panoptic", "instance", "semantic"):
        everything = {"threshold": 0.0, "overlap_threshold": 0.0} if task == "panoptic" else {}
        together = segment(model, pictures, task, **everything)
        for picture, result in zip(pictures, together):
            assert result.segmentation.shape == picture.shape[:2]
            assert len(result.segments) > 0
    scenes = Digits(DigitsConfig(), "val")
    value = evaluate(model, scenes, limit=5, progress=False, threshold=0.0)
    assert value["images"] == 5
    assert value["instances"] >= 5
    assert 0 <= value["pq"] < 0.5
    assert 0 <= value["ap"] < 0.5
    assert 0 <= value["miou"] < 0.5
    folder = folder_of_pictures(tmp_path / "in")
    options = Options(threshold=0.0)
    written, failed = predict_files(model, [folder], tmp_path / "out", options=options)
    assert (len(written), failed) == (5, [])
    assert model.training
