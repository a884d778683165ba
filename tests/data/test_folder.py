"""Images in folders: the layouts, views, what is refused, and a run from end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import segkern
from segkern.cli import main
from segkern.data import Folder, FolderConfig, Order, build_dataset
from segkern.evaluation.evaluate import evaluate
from segkern.models import Mask2Former, Mask2FormerConfig, Segmenter, SegmenterConfig
from segkern.recipes.segmenter import segmenter
from segkern.training import checkpoint
from segkern.training.config import TrainConfig
from segkern.training.loop import train

NAMES = ["left", "right", "void is none of us"]


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def picture(seed, h=24, w=40):
    """Pixels [h, w, 3] whose left half is dark, and their map: 0, 1 and a strip of 255."""
    pixels = np.random.default_rng(seed).integers(0, 60, (h, w, 3), dtype=np.uint8)
    pixels[:, w // 2 :] += 180
    labels = np.zeros((h, w), np.uint8)
    labels[:, w // 2 :] = 1
    labels[:2] = 255
    return pixels, labels


@pytest.fixture
def plain(tmp_path):
    """A folder of three training images of several kinds and two of validation."""
    root = tmp_path / "own"
    for split, ends in (("train", (".png", ".jpg", ".png")), ("val", (".png", ".jpeg"))):
        for i, end in enumerate(ends):
            pixels, labels = picture(i, 24 + 8 * i)
            write(root / "images" / split / "part" / f"scene.{i}{end}", pixels)
            write(root / "labels" / split / "part" / f"scene.{i}.png", labels)
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


def tiny(**changes):
    settings = {"num_labels": 3, "image_size": (16, 24), "patch_size": 8, "embed_dim": 64}
    settings |= {"depth": 1, "num_heads": 1, "decoder_layers": 1, "window_size": 16}
    settings |= {"window_stride": 8, "shortest_edge": 20, "longest_edge": 80}
    return SegmenterConfig(**settings | changes)


def setting(root, output, **changes):
    base = segmenter(dataset="plain", pretrained=False, root=root)
    settings = {"steps": 4, "batch_size": 2, "lr": 0.05, "log_every": 1, "tensorboard": False}
    model = tiny(decoder_dropout=0.1, id2label=base.model.id2label)
    return replace(base, output=output, **settings | {"model": model} | changes)


ULM = "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png"
# names of an image and its map, values of the map, labels that they stand for, classes
LAYOUTS = {
    "ade20k": (
        *("images/training/ADE_1.jpg", "annotations/training/ADE_1.png"),
        *([0, 1, 2, 150, 255], [255, 0, 1, 149, 255], 150),
    ),
    "cityscapes": (
        *(ULM, "gtFine/train/ulm/ulm_0_gtFine_labelIds.png"),
        *([0, 7, 8, 9, 33, 255], [255, 0, 1, 255, 18, 255], 19),
    ),
    "train ids": (
        *(ULM, "gtFine/train/ulm/ulm_0_gtFine_labelTrainIds.png"),
        *([0, 18, 255], [0, 18, 255], 19),
    ),
    "pascal_context": (
        *("JPEGImages/2008_000002.jpg", "SegmentationClassContext/2008_000002.png"),
        *([0, 1, 59, 255], [0, 1, 59, 255], 60),
    ),
    "plain": ("images/train/a.b.bmp", "labels/train/a.b.png", [2, 0, 255], [2, 0, 255], 3),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    of_image, of_map, values, labels, classes = LAYOUTS[layout]
    if layout == "train ids":  # taken before the ids
        write(tmp_path / of_map.replace("labelTrainIds", "labelIds"), np.uint8([[7] * 3] * 4))
    pixels = np.random.default_rng(0).integers(0, 256, (4, len(values), 3), dtype=np.uint8)
    write(tmp_path / of_image, pixels)
    write(tmp_path / of_map, np.uint8([values] * 4))
    (tmp_path / "classes.txt").write_text("a\nb\nc")
    if layout == "pascal_context":
        listed(tmp_path, train="2008_000002\n", val="")
    known = "cityscapes" if layout == "train ids" else layout
    data = Folder(FolderConfig(tmp_path, known), "train")
    assert (len(data), len(data.classes), len(data.stuff)) == (1, classes, classes)
    sample = data[0]
    assert sample["image"].shape == pixels.shape
    assert sample["image"].dtype == sample["semantic"].dtype == np.uint8
    assert sample["semantic"].tolist() == [labels] * 4
    if not of_image.endswith(".jpg"):
        assert (sample["image"] == pixels).all()


def listed(root, **splits):
    """Writes Pascal Context's lists of names."""
    folder = root / "ImageSets/SegmentationContext"
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in splits.items():
        (folder / f"{split}.txt").write_text(names)


def test_pascal_contexts_lists(tmp_path):
    config = FolderConfig(tmp_path, "pascal_context")
    for i, name in enumerate(("b", "a", "c")):  # c, of another task, has no map
        write(tmp_path / f"JPEGImages/{name}.jpg", np.full((2, 2, 3), 80 * i, np.uint8))
        if name != "c":
            write(tmp_path / f"SegmentationClassContext/{name}.png", np.full((2, 2), i, np.uint8))
    with pytest.raises(ValueError, match=r"train.txt: no such file; it has .* of the images"):
        Folder(config)
    listed(tmp_path, train="b\na\n", val="a")
    assert [path.stem for path, _ in Folder(config).pairs] == ["a", "b"]
    val = Folder(config, "val")
    assert [path.stem for path, _ in val.pairs] == ["a"]
    assert (val[0]["semantic"] == 1).all()
    assert (val.classes[0], val.classes[2], val.classes[59]) == ("background", "bag", "wood")
    assert val.classes[1:] == sorted(val.classes[1:])
    listed(tmp_path, train="a\nd", val="c")
    with pytest.raises(
        ValueError, match="JPEGImages: has no image d, which the train split lists"
    ):
        Folder(config)
    with pytest.raises(ValueError, match=r"c.jpg: has no map .*SegmentationClassContext/c.png"):
        Folder(config, "val")
    listed(tmp_path, val="")
    with pytest.raises(ValueError, match=r"val.txt: names no image"):
        Folder(config, "val")


def test_names_of_classes(tmp_path):
    ade = FolderConfig(tmp_path, "ade20k")
    write(tmp_path / "images/validation/x.png", np.zeros((2, 2, 3), np.uint8))
    write(tmp_path / "annotations/validation/x.png", np.zeros((2, 2), np.uint8))
    assert Folder(ade, "val").classes[::149] == ["wall", "flag"]
    rows = [f"{k} \t0.1\t5\t1\tthing {k} , other name" for k in range(1, 151)]
    table = tmp_path / "objectInfo150.txt"
    table.write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows, ""]))
    assert Folder(ade, "val").classes == [f"thing {k}" for k in range(1, 151)]
    table.write_text("\n".join(rows[:7]))
    with pytest.raises(ValueError, match=r"objectInfo150.txt: must have a headline"):
        Folder(ade, "val")


@pytest.mark.parametrize("kind", ["palette", "1 bit", "16 bit"])
def test_other_kinds_of_maps(kind, plain):
    labels = picture(0)[1] % 255  # no void: it does not go into a bit
    path = plain / "labels/train/part/scene.0.png"
    made = Image.fromarray(labels)
    if kind == "palette":
        made.putpalette([7, 8, 9] * 256)
    elif kind == "1 bit":
        made = Image.fromarray(labels.astype(bool))
    else:
        made = Image.fromarray(labels.astype(np.uint16))
    made.save(path)
    found = Folder(FolderConfig(plain), "train")[0]["semantic"]
    assert (found == labels).all()


def test_a_view_depends_on_seed_index_and_pass_alone(plain):
    state = torch.get_rng_state()
    data, again, other = (
        build_dataset(FolderConfig(plain, seed=s), "train", tiny()) for s in (0, 0, 1)
    )
    assert data.passes
    view = data[1, 2]
    assert view["pixel_values"].shape == (3, 16, 24)
    assert view["semantic"].shape == (16, 24)
    assert (view["masks"].shape, view["labels"].shape) == ((0, 16, 24), (0,))
    assert set(view["semantic"].unique().tolist()) <= {0, 1, 255}
    again[0], again[1, 0]  # what was drawn before does not matter
    assert torch.equal(again[1, 2]["pixel_values"], view["pixel_values"])
    for another in (data[1, 3], data[2, 2], other[1, 2], data[1]):
        assert not torch.equal(another["pixel_values"], view["pixel_values"])
    assert torch.equal(data[1]["pixel_values"], data[1, 0]["pixel_values"])
    assert torch.equal(torch.get_rng_state(), state)


def test_order_tells_the_pass():
    pairs = [p for batch in Order(3, 2, seed=1, start=0, stop=6, passes=True) for p in batch]
    plain = [i for batch in Order(3, 2, seed=1, start=0, stop=6) for i in batch]
    assert [i for i, _ in pairs] == plain
    assert [epoch for _, epoch in pairs] == [k // 3 for k in range(12)]


class PulledPlug(Folder):
    """Fails from its fifth sample on, where a run of two steps is cut."""

    def __getitem__(self, place):
        self.given = getattr(self, "given", 0) + 1
        if self.given > 4:
            raise OSError("the plug was pulled")
        return super().__getitem__(place)


def test_resume_gives_the_same_weights_and_the_folder_may_move(plain, tmp_path):
    whole_run = setting(plain, tmp_path / "whole", evaluate_every=2)
    whole = train(whole_run, progress=False).model.state_dict()
    lines = (tmp_path / "whole/log.jsonl").read_text().splitlines()
    metrics = [json.loads(line).get("metrics") for line in lines]
    assert [m is not None for m in metrics] == [False, True, False, True]
    assert 0 <= metrics[-1]["miou"] <= 1

    cut = replace(whole_run, output=tmp_path / "cut", checkpoint_every=2, evaluate_every=0)
    views = build_dataset(cut.data, "train", cut.model).views
    with pytest.raises(OSError, match="the plug was pulled"):
        train(cut, dataset=PulledPlug(cut.data, "train", views), progress=False)
    state = checkpoint.settings(tmp_path / "cut")
    assert state["step"] == 2
    assert TrainConfig.from_dict(state["config"]) == cut
    moved = plain.rename(tmp_path / "elsewhere")
    again = replace(cut, workers=1, data=FolderConfig(moved))
    data = build_dataset(again.data, "train", again.model)
    found = train(again, resume=cut.output, dataset=data, progress=False).model.state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match=r"data.seed is 0 there, 1 here"):
        train(replace(again, steps=6, data=FolderConfig(moved, seed=1)), resume=cut.output)


ERRORS = {
    "root": (lambda r: r.rename(r.with_name("x")), "own: no such folder; layout plain has"),
    "split": (lambda r: (r / "images/train").rename(r / "t"), r"images/train: no such folder"),
    "maps": (lambda r: (r / "labels").rename(r / "maps"), r"labels/train: no such folder"),
    "no image": (
        lambda r: [p.unlink() for p in (r / "images/train/part").iterdir()],
        "images/train: holds no image",
    ),
    "no map": (
        lambda r: (r / "labels/train/part/scene.1.png").unlink(),
        r"scene.1.jpg: has no map .*labels/train/part/scene.1.png \(1 of 3 images have none\)",
    ),
    "no names": (
        lambda r: (r / "classes.txt").unlink(),
        "classes.txt: no such file; it has the names of the classes",
    ),
    "empty name": (
        lambda r: (r / "classes.txt").write_text("a\n\nb"),
        "classes.txt: must have 1 to 65535 names, one a line and no empty line, got 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_faults_are_found_when_the_data_set_is_made(case, plain):
    spoil, message = ERRORS[case]
    spoil(plain)
    with pytest.raises(ValueError, match=message):
        Folder(FolderConfig(plain), "train")


MAP = "scene.0.png: "
BAD_MAPS = {
    "label K": (np.full((24, 40), 3, np.uint8), MAP + "values .* 3 classes, or 255, got 3"),
    "16 bit": (np.full((24, 40), 700, np.uint16), MAP + "values must be .* got 700"),
    "colours": (np.zeros((24, 40, 3), np.uint8), MAP + ".* one channel, got 3"),
    "size": (np.zeros((24, 41), np.uint8), MAP + r"the map .* \[24, 40\], got \[24, 41\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MAPS)
def test_a_bad_map_is_named(case, plain):
    values, message = BAD_MAPS[case]
    write(plain / "labels/train/part/scene.0.png", values)
    data = Folder(FolderConfig(plain), "train")
    assert data[1]["id"] == 1
    with pytest.raises(ValueError, match=message):
        data.examined(0)
    with pytest.warns(UserWarning, match=message):
        assert data[0]["id"] == 1


def test_cityscapes_ids_beyond_the_table(tmp_path):
    write(tmp_path / LAYOUTS["cityscapes"][0], np.zeros((2, 2, 3), np.uint8))
    write(tmp_path / LAYOUTS["cityscapes"][1], np.full((2, 2), 34, np.uint8))
    with pytest.raises(ValueError, match=r"labelIds.png: values .* layout cityscapes .* got 34"):
        Folder(FolderConfig(tmp_path, "cityscapes")).examined(0)


def test_bad_settings(plain):
    with pytest.raises(ValueError, match=r"layout must be one of ade20k, .*, got 'coco'"):
        FolderConfig(plain, "coco")
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        FolderConfig(plain, seed=-1)
    with pytest.raises(ValueError, match="split must be train or val, got 'test'"):
        Folder(FolderConfig(plain), "test")
    with pytest.raises(IndexError, match=r"index must be in \[0, 3\), got 3"):
        Folder(FolderConfig(plain))[3]
    with pytest.raises(
        ValueError, match=r"a mask2former trains on masks, which data of kind folder does not have"
    ):
        TrainConfig(data=FolderConfig(plain))
    with pytest.raises(ValueError, match="num_labels must be 3, the classes of the data, got 4"):
        train(setting(plain, plain / "run", model=tiny(num_labels=4)))
    (plain / "images/val").rename(plain / "images/later")
    with pytest.raises(ValueError, match="images/val: no such folder"):  # before the first step
        train(setting(plain, plain / "run", evaluate_every=4), progress=False)
    assert not checkpoint.held(plain / "run")


VIEWS = {"window": 24, "stride": 12, "scales": (0.75, 1.5), "flip": True}


@pytest.mark.parametrize("kind", ["segmenter", "segmenter, views", "mask2former"])
def test_evaluation_is_that_of_segment(kind, plain):
    torch.manual_seed(0)
    views = VIEWS if kind.endswith("views") else {}
    if kind.startswith("segmenter"):
        model = Segmenter(tiny()).eval()
    else:
        config = replace(Mask2FormerConfig.tiny(3), num_queries=5, decoder_layers=1)
        model = Mask2Former(replace(config, shortest_edge=32, longest_edge=64)).eval()
    data = Folder(FolderConfig(plain), "val")
    value = evaluate(model, data, ("semantic",), progress=False, **views)
    both, seen = np.zeros(3), np.zeros(3)
    for sample in (data[0], data[1]):
        found = segkern.segment(model, sample["image"], "semantic", **views).segmentation.numpy()
        counts = sample["semantic"] != 255
        for k in range(3):
            a, b = found[counts] == k, sample["semantic"][counts] == k
            both[k], seen[k] = both[k] + (a & b).sum(), seen[k] + (a | b).sum()
    assert value["images"] == 2
    assert value["miou"] == pytest.approx(np.mean(both[seen > 0] / seen[seen > 0]))
    assert [row["name"] for row in value["classes"]] == NAMES
    if views:
        plainly = evaluate(model, data, ("semantic",), progress=False)
        assert plainly["pixel_accuracy"] != value["pixel_accuracy"]
    if kind == "mask2former":
        with pytest.raises(ValueError, match=r"tasks must be .* for samples without masks"):
            evaluate(model, data, progress=False)


SMALL = "--model.depth 1 --model.embed-dim 64 --model.num-heads 1 --model.patch-size 8 "
SMALL += "--model.image-size 16 16 --model.window-size 16 --model.window-stride 16 "
SMALL += "--model.shortest-edge 16 --model.longest-edge 64 --model.no-backbone-pretrained "
SMALL += "--steps 2 --batch-size 2 --no-tensorboard --evaluate-every 2"


def test_train_evaluate_and_predict_from_the_command_line(plain, tmp_path, capsys):
    run, out, figures = tmp_path / "run", tmp_path / "out", tmp_path / "figures.json"
    folder = ["--data.root", str(plain)]
    command = ["train", "--recipe", "segmenter", "--preset", "Seg-T-Mask/16", *folder]
    assert main([*command, "--output", str(run), *SMALL.split()]) == 0
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 0
    measure = ["evaluate", str(run), "--data", str(plain), "--out", str(figures)]
    assert main(measure) == 0
    value = json.loads(figures.read_text())
    assert value["images"] == 2
    assert [row["name"] for row in value["classes"]] == NAMES
    options = ["--window", "16", "--stride", "8", "--scales", "1", "1.5", "--flip"]
    assert main([*measure, *options]) == 0
    more = json.loads(figures.read_text())
    assert main([*measure, "--layout", "ade20k"]) == 2
    assert "images/validation: no such folder" in capsys.readouterr().err
    images = [str(plain / "images/val/part"), "--model", str(run), "--out", str(out)]
    assert main(["predict", *images, *options]) == 0
    found = json.loads((out / "scene.0.json").read_text())
    assert found["size"] == [24, 40]
    assert {s["label"] for s in found["segments"]} <= set(NAMES)
    model = segkern.Segmenter.from_pretrained(run)
    picture = plain / "images/val/part/scene.0.png"
    views = {"window": 16, "stride": 8, "scales": (1, 1.5), "flip": True}
    want = segkern.segment(model, picture, "semantic", **views)
    own = evaluate(model, Folder(FolderConfig(plain), "val"), ("semantic",), **views)
    assert more["pixel_accuracy"] == own["pixel_accuracy"]
    assert sum(s["area"] for s in found["segments"] if s["label_id"] == 0) == sum(
        s.area for s in want.segments if s.label_id == 0
    )


BAD_COMMANDS = {
    "stride": ("predict {image} --model {run} --stride 0", "stride must be >= 1, got 0"),
    "scales": ("predict {image} --model {run} --scales 0", r"scales must be positive, got (0.0,)"),
    "stride of evaluate": (
        "evaluate {run} --window 8 --stride 9",
        "stride must be <= window (8), got 9",
    ),
    "evaluate another model": (
        "evaluate {other} --scales 0.5 1",
        "window, stride, scales and flip are for models that give class logits of pixels",
    ),
    "another model": (
        "predict {image} --model {other} --window 64",
        "window, stride, scales and flip are for models that give class logits of pixels",
    ),
    "preset": ("train --preset Seg-T/16", "--preset is for a new run with --recipe mask2former"),
    "no such preset": ("train --recipe segmenter --preset T", "name must be Seg-{T,S,B,L}"),
    "no classes": ("train --recipe segmenter --data.root {run}", "classes.txt: no such file"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_commands(case, plain, tmp_path, capsys):
    command, message = BAD_COMMANDS[case]
    names = {"image": plain / "images/val/part/scene.0.png", "run": tmp_path / "run"}
    names["other"] = tmp_path / "other"
    Segmenter(tiny()).save_pretrained(names["run"])
    if "{other}" in command:
        Mask2Former(Mask2FormerConfig.tiny(3)).save_pretrained(names["other"])
    command = command.split()
    out = tmp_path / "out"
    output = ["--out", str(out)] if command[0] == "predict" else []
    assert main([part.format(**names) for part in command] + output) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
