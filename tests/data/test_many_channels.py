"""Pictures of more than three channels: from a TIFF to the first convolution, and from disk."""

import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import segkern
from segkern.data import CocoConfig, FolderConfig, ReadConfig, Wrapped, build_dataset, collate
from segkern.evaluation.evaluate import evaluate
from segkern.inference.predict_files import predict_files
from segkern.io import sources
from segkern.io.picture_list import listed, read_place
from segkern.models import (
    Mask2Former,
    Mask2FormerConfig,
    SegFormer,
    SegFormerConfig,
    Segmenter,
    SegmenterConfig,
    open_model,
)
from segkern.recipes.check_data import check_data, show_data
from support.pictures import SIZE, image_rows, rectangle, write, write_coco

C = 5
MEAN, STD = (0.1, 0.2, 0.3, 0.4, 0.5), (0.2, 0.2, 0.3, 0.3, 0.4)
READ = ReadConfig(channels=C, val_share=0)


def bands(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, C), dtype=np.uint8)


def write_tiff(path, pixels):
    """A page a band."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (Image.fromarray(pixels[..., c]) for c in range(pixels.shape[2]))
    first.save(path, save_all=True, append_images=rest)
    return path


def mask2former(**changes):
    tiny = Mask2FormerConfig.tiny(2)
    small = {"image_mean": MEAN, "image_std": STD, "shortest_edge": 32, "longest_edge": 64}
    return replace(tiny, **small | changes)


def segmenter():
    sizes = {"image_size": (32, 32), "patch_size": 8, "window_size": 32, "window_stride": 32}
    layers = {"embed_dim": 64, "num_heads": 1, "depth": 1, "decoder_layers": 1}
    return SegmenterConfig(num_labels=2, image_mean=MEAN, image_std=STD, **sizes, **layers)


@pytest.fixture
def folder(tmp_path):
    """Maps of classes, and the same pictures with objects in COCO's format."""
    labels = np.zeros(SIZE, np.uint8)
    labels[10:20, 5:30] = 1
    for split in ("train", "val"):
        write_tiff(tmp_path / f"maps/images/{split}/a.tif", bands())
        write(tmp_path / f"maps/labels/{split}/a.png", labels)
    (tmp_path / "maps/classes.txt").write_text("ground\nbox")
    rows = image_rows([(7, "a.tif"), (9, "b.tif")])
    write_coco(tmp_path / "coco", images=rows)
    for seed, row in enumerate(rows):
        write_tiff(tmp_path / f"coco/train2017/{row['file_name']}", bands(seed))
    return tmp_path


def datasets(folder):
    return {
        "maps": FolderConfig(folder / "maps", channels=C),
        "coco": CocoConfig(folder / "coco", read=READ),
    }


@pytest.mark.parametrize("kind", ["maps", "coco"])
def test_whole_pictures_have_their_bands(kind, folder):
    sample = build_dataset(datasets(folder)[kind], "train")[0]
    assert np.array_equal(sample["image"], bands())


@pytest.mark.parametrize("kind", ["maps", "coco"])
def test_views_are_normalised_band_by_band(kind, folder):
    config = datasets(folder)[kind]
    if kind == "coco":
        config.views = replace(config.views, size=(32, 40), ratios=(1, 1), flip=0, colours=False)
    model = mask2former() if kind == "coco" else segmenter()
    batch = collate([build_dataset(config, "train", model)[0]], 3)
    assert batch.pixel_values.shape[1] == C
    if kind == "coco":
        pixels = (torch.from_numpy(bands()).movedim(2, 0) / 255 - col(MEAN)) / col(STD)
        assert torch.allclose(batch.pixel_values[0, :, :30, :40], pixels, atol=1e-5)


def col(numbers):
    return torch.tensor(numbers)[:, None, None]


MODELS = {
    "resnet_digits": lambda: Mask2Former(mask2former()),
    "swin": lambda: Mask2Former(
        mask2former(
            backbone="swin_tiny",
            backbone_options={"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 6)},
            size_divisor=32,
        )
    ),
    "timm": lambda: Mask2Former(mask2former(backbone="resnet18", size_divisor=32)),
    "segmenter": lambda: Segmenter(segmenter()),
    "segformer": lambda: SegFormer(
        replace(SegFormerConfig.tiny(2), image_mean=MEAN, image_std=STD, shortest_edge=64)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_way(name, folder, tmp_path):
    """Loss and gradient at the first layer, a checkpoint, `segment`, files and evaluation."""
    model = MODELS[name]()
    assert model.config.input.channels == C
    kind = "maps" if name.startswith("seg") else "coco"
    config = datasets(folder)[kind]
    if kind == "coco":
        config.views = replace(config.views, size=(64, 64))
    batch = collate([build_dataset(config, "train", model.config)[0]], divisor=32)
    targets = batch.targets._replace(labels=batch.targets.labels.clamp(max=1))
    loss, _ = model.loss(batch.pixel_values, targets)
    loss.backward()
    first = next(p for p in model.parameters() if p.ndim == 4)
    assert first.shape[1] == C
    assert (first.grad.abs().sum((0, 2, 3)) > 0).all()
    model.eval().save_pretrained(tmp_path / "saved")
    again = open_model(tmp_path / "saved").eval()
    assert again.config.input.channels == C
    assert again.config.image_mean == MEAN
    task = "semantic"
    path = folder / "maps/images/val/a.tif"
    results = [segkern.segment(m, x, task) for m in (model, again) for x in (path, bands())]
    assert all(torch.equal(r.segmentation, results[0].segmentation) for r in results)
    assert results[0].plot().size[0] % SIZE[1] == 0
    assert results[0].image.shape == (3, *SIZE)
    written, failed = predict_files(again, [path], tmp_path / "out", task)
    assert (len(written), failed) == (1, [])
    val = build_dataset(datasets(folder)["maps"], "val")
    assert 0 <= evaluate(again, val, (task,), progress=False)["miou"] <= 1


def test_bands_come_from_archives_addresses_and_bytes(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.tif", bands())
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(path, "a.tif")
    monkeypatch.setattr(sources, "fetch", lambda *_: path.read_bytes())
    address = tmp_path / "list.txt"
    address.write_text("https://host/a.tif\n")
    wanted = torch.from_numpy(bands()).movedim(2, 0)
    places = list(listed([path, tmp_path / "a.tar"], [address]))
    assert [place.image for place in places] == [str(path), "a.tif", "https://host/a.tif"]
    for place in places:
        assert torch.equal(read_place(place, channels=C), wanted)
    run = segkern.pipeline(Mask2Former(mask2former()).eval())
    assert run(path.read_bytes(), threshold=0.0) == run(bands(), threshold=0.0)


def test_data_is_checked_and_shown(folder, tmp_path, capsys):
    for kind, config in datasets(folder).items():
        assert check_data(config, tmp_path / kind, workers=0)
        assert show_data(config, tmp_path / kind / "views.png", size=(32, 32)) > 0


def test_other_channels_are_refused(folder):
    config = datasets(folder)["coco"]
    with pytest.raises(ValueError, match=r"channels of the data must be 3, as the model .* got 5"):
        build_dataset(config, "train", Mask2FormerConfig.tiny(2))
    config = CocoConfig(folder / "coco", read=ReadConfig(channels=4, val_share=0))
    with (
        pytest.warns(UserWarning, match="must have 4 channels, got 5"),
        pytest.raises(ValueError, match="no picture is left"),
    ):
        build_dataset(config, "train")[0]
    model = Mask2Former(mask2former()).eval()
    with pytest.raises(
        ValueError, match=r"image: must be .* with 5 channels .* got \[30, 40, 3\]"
    ):
        segkern.segment(model, bands()[..., :3])
    val = build_dataset(FolderConfig(folder / "maps", channels=C), "val")
    with pytest.raises(ValueError, match="picture must have 3 channels, as the model takes them"):
        evaluate(Mask2Former(Mask2FormerConfig.tiny(2)), val, ("semantic",), progress=False)
    with pytest.raises(ValueError, match="channels must be >= 1, got 0"):
        ReadConfig(channels=0)


def test_data_sets_of_ones_own():
    items = [(bands(), rectangle(2, 3, 9, 9)[None], np.array([0]))]
    assert np.array_equal(Wrapped(items, ["box"], channels=C)[0]["image"], bands())
