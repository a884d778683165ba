"""The pipeline beside transformers' own, on folders that it wrote; pictures of any kind; errors.

Letters: K class, H W size of the picture.
"""

import base64
import inspect
import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline
from transformers.pipelines.pt_utils import KeyDataset

import segkern
from segkern.models import EoMTConfig, Mask2FormerConfig, SegFormerConfig
from segkern.structures.labels import ADE20K, CITYSCAPES, DATASETS
from segkern.structures.logits import PixelLogits, QueryLogits
from support.models import BIG, Squares, half_bright, model_config

K = 7
SIDE, SMALL = 384, 64  # transformers' detour over 384 x 384 pixels changes nothing; EoMT's side
NAMES = {k: f"class {k}" for k in range(K)}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def mask2former():
    backbone = transformers.SwinConfig(
        embed_dim=24, depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 6], out_features=STAGES
    )
    widths = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "num_queries": 6}
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        decoder_layers=3,
        encoder_layers=1,
        id2label=NAMES,
        **widths,
    )
    size = {"height": SIDE, "width": SIDE}
    return (
        transformers.Mask2FormerForUniversalSegmentation(config),
        transformers.Mask2FormerImageProcessor(size=size, size_divisor=32),
    )


def eomt():
    config = transformers.EomtConfig(
        image_size=SMALL,
        patch_size=8,
        num_queries=6,
        num_blocks=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label=NAMES,
    )
    size = {"shortest_edge": SMALL, "longest_edge": SMALL}
    processor = transformers.EomtImageProcessor(size=size, do_split_image=False, do_pad=True)
    return transformers.EomtForUniversalSegmentation(config), processor


def segformer():
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        id2label=NAMES,
    )
    size = {"height": SIDE, "width": SIDE}
    return (
        transformers.SegformerForSemanticSegmentation(config),
        transformers.SegformerImageProcessor(size=size),
    )


KINDS = {"mask2former": mask2former, "eomt": eomt, "segformer": segformer}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that transformers wrote, of weights that are sure of what they see."""
    made = {}

    def get(kind):
        if kind not in made:
            torch.manual_seed(2)
            model, processor = KINDS[kind]()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if any(part in name for part in ("mask_head", "upscale", "mask_embedder")):
                        p.mul_(4)
                    elif "classifier" in name:
                        p.mul_(20)
                    elif "class_predictor" in name:
                        p.copy_(2.5 * torch.randn_like(p))
                    elif "queries_" in name:
                        p.mul_(5)
                if kind == "eomt":
                    model.attn_mask_probs.zero_()
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return get


def picture(h, w):
    """Squares of colours."""
    coarse = np.random.default_rng(h * w).integers(0, 256, (-(-h // 48), -(-w // 48), 3), np.uint8)
    return Image.fromarray(coarse.repeat(48, 0).repeat(48, 1)[:h, :w])


def inside(row):
    return np.asarray(row["mask"]) == 255


CASES = [
    ("eomt", None, 0.0),
    ("eomt", "panoptic", 0.3),
    ("mask2former", "instance", 0.05),
    ("mask2former", "semantic", 0.9),
    ("segformer", None, 0.9),
]


@pytest.mark.parametrize(("kind", "task", "threshold"), CASES)
def test_a_call_returns_what_transformers_returns(folders, kind, task, threshold):
    """Instances: transformers gives what later ones leave of a mask, here masks are whole."""
    settings = {"threshold": threshold} | ({} if task is None else {"subtask": task})
    side = SMALL if kind == "eomt" else SIDE  # so that nobody resizes, which each rounds its way
    image = picture(side, side)
    theirs = transformers.pipeline("image-segmentation", model=str(folders(kind)), device="cpu")
    want = theirs(image, **settings)
    found = segkern.pipeline(str(folders(kind)), device="cpu")(image, **settings)
    assert len(found) == len(want) >= 2
    if task == "instance":  # there in no order
        want = sorted(want, key=lambda row: -row["score"])
    for ours, their in zip(found, want):
        assert ours.keys() == their.keys()
        assert ours["label"] == their["label"]
        assert (ours["mask"].mode, ours["mask"].size) == (their["mask"].mode, their["mask"].size)
        if their["score"] is None:
            assert ours["score"] is None
        else:
            assert ours["score"] == pytest.approx(their["score"], abs=2e-5)
        a, b = inside(ours), inside(their)
        if task == "instance":
            assert (b & ~a).mean() < 1e-4
        else:
            assert (a != b).mean() < 1e-3


def test_defaults_are_those_of_transformers():
    theirs = inspect.signature(ImageSegmentationPipeline.postprocess).parameters
    ours = inspect.signature(type(segkern.pipeline(Squares())).__call__).parameters
    for name in ("subtask", "threshold", "mask_threshold", "overlap_mask_area_threshold"):
        assert ours[name].default == theirs[name].default


# --- what a result says ---------------------------------------------------------------------


class Halves(nn.Module):
    """Stuff, by two queries of half a picture each, and things, which are the two halves."""

    def __init__(self, names=None, stuff=(0,)):
        super().__init__()
        self.config = model_config(num_labels=2, names=names, stuff=stuff, divisor=16)
        self.weight = nn.Parameter(torch.ones(()))

    def inputs(self, task, batch):
        return ()

    def predict(self, pixels):
        B, _, H, W = pixels.shape
        masks = torch.full((B, 3, H // 2, W // 2), -BIG)
        masks[:, 0, :, : W // 4] = masks[:, 1, :, W // 4 :] = BIG
        masks[:, 2, : H // 8] = 2 * BIG
        classes = torch.full((B, 3, 3), -BIG)
        classes[:, 0, 0], classes[:, 1, 0], classes[:, 2, 1] = BIG, BIG, BIG
        return QueryLogits(classes, masks)


def test_stuff_of_a_class_is_one_segment():
    found = segkern.pipeline(Halves({0: "grass", 1: "cow"}))(half_bright(32, 64))
    assert [row["label"] for row in found] == ["grass", "cow"]
    assert inside(found[0])[8:].all()
    assert not inside(found[0])[:8].any()
    alike = segkern.pipeline(Halves({0: "grass", 1: "cow"}, stuff=()))(half_bright(32, 64))
    assert [row["label"] for row in alike] == ["grass", "grass", "cow"]


def test_instances_are_things_and_may_overlap():
    found = segkern.pipeline(Halves(stuff=(1,)), "instance")(half_bright(32, 64))
    assert [row["label"] for row in found] == ["0", "0"]  # unnamed
    both = segkern.pipeline(Halves(stuff=()), "instance")(half_bright(32, 64), threshold=0.5)
    assert len(both) == 3
    assert sum(inside(row).sum() for row in both) > 32 * 64


COCO = {k: f"thing {k}" for k in range(80)} | {k: f"stuff {k}" for k in range(80, 133)}
PUBLISHED = {
    "coco": COCO | {79: "toothbrush", 80: "banner"},
    "cityscapes": dict(enumerate(CITYSCAPES)),
    "ade20k": dict(enumerate(ADE20K)),
}


@pytest.mark.parametrize("data", PUBLISHED)
def test_stuff_of_published_lists_is_known(data, tmp_path):
    """Of a checkpoint of transformers, which does not say what is stuff."""
    backbone = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], out_features=STAGES
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        id2label=PUBLISHED[data],
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        num_queries=3,
        decoder_layers=2,
        encoder_layers=1,
    )
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    stuff = segkern.pipeline(tmp_path).model.config.labels.stuff
    assert stuff == DATASETS[data].stuff
    assert len(stuff) == {"coco": 53, "cityscapes": 11, "ade20k": 50}[data]


# --- pictures and models of any kind --------------------------------------------------------


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


SOURCES = {
    "path": lambda image, path: path,
    "path as text": lambda image, path: str(path),
    "bytes": lambda image, path: path.read_bytes(),
    "bytearray": lambda image, path: bytearray(path.read_bytes()),
    "open file": lambda image, path: path.open("rb"),
    "file in memory": lambda image, path: io.BytesIO(path.read_bytes()),
    "data URI": lambda image, path: (
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    ),
    "PIL image": lambda image, path: Image.fromarray(image),
    "array": lambda image, path: image,
    "tensor": lambda image, path: torch.from_numpy(image).movedim(2, 0),
    "floating tensor": lambda image, path: torch.from_numpy(image).movedim(2, 0) / 255,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_any_source_of_a_picture(source, tmp_path):
    image, path = half_bright(), tmp_path / "a.png"
    path.write_bytes(png(image))
    found = segkern.pipeline(Squares())(source(image, path))
    assert [row["label"] for row in found] == ["ground", "square"]
    assert np.array_equal(inside(found[1]), image[..., 0] > 0)
    assert np.array_equal(inside(found[0]), image[..., 0] == 0)


def rows(found):
    return [[(row["score"], row["label"], inside(row).sum()) for row in one] for one in found]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_lists_and_iterators(batch_size):
    images = [half_bright(32 + 8 * (i % 3), 60) for i in range(7)]
    model = Squares()
    run = segkern.pipeline(model, batch_size=batch_size)
    found = run(images)
    assert rows(found) == rows([run(image) for image in images])
    assert rows(run(tuple(images), batch_size=4)) == rows(found)
    assert run([]) == []
    model.seen.clear()
    drawn = run(iter(images))
    assert isinstance(drawn, Iterator)
    first = next(drawn)
    assert sum(len(batch) for batch in model.seen) == min(batch_size, 7)  # no more was read
    assert rows([first, *drawn]) == rows(found)
    assert max(len(batch) for batch in model.seen) <= batch_size
    dataset = KeyDataset([{"image": image} for image in images], "image")  # of transformers
    assert rows(run(dataset)) == rows(found)


class Endless(torch.utils.data.Dataset):
    """Two pictures by its length, and an answer for any place."""

    def __len__(self):
        return 2

    def __getitem__(self, place):
        return half_bright()


def test_a_data_set_ends_where_its_length_says():
    drawn = segkern.pipeline(Squares())(Endless())
    assert len([found for found, _ in zip(drawn, range(3))]) == 2


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_what_a_task_does_not_read_changes_nothing(task):
    run = segkern.pipeline(Squares(), task)
    found = run(half_bright(), mask_threshold=0.2, overlap_mask_area_threshold=0.1)
    assert rows([found]) == rows([run(half_bright())])


def test_the_mode_and_the_model_stay():
    model = Squares().train()
    run = segkern.pipeline(model, task="image-segmentation")
    run(half_bright())
    assert run.model is model
    assert model.training
    assert run.task == "panoptic"
    assert next(segkern.pipeline(model, device=-1).model.parameters()).device.type == "cpu"


SMALL_MODELS = {
    "mask2former": (Mask2FormerConfig.tiny(3), "panoptic"),
    "eomt": (EoMTConfig.tiny(3), "panoptic"),
    "segformer": (SegFormerConfig.tiny(3), "semantic"),
}


@pytest.mark.parametrize(("config", "task"), SMALL_MODELS.values(), ids=SMALL_MODELS)
def test_models_of_every_form_and_folders_of_ours(config, task, tmp_path):
    segkern.models.build_model(config).save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        run = segkern.pipeline(source, device="cpu")
        assert run.task == task
        for row in run(half_bright(64, 64), threshold=0.0):
            assert row["mask"].size == (64, 64)
            assert set(np.unique(row["mask"])) <= {0, 255}


BAD = {
    "transformers' model": (
        lambda: segkern.pipeline(nn.Conv2d(3, 3, 1)),
        TypeError,
        r"pipeline: model must have what .* says; a Conv2d has no predict",
    ),
    "a task of none": (
        lambda: segkern.pipeline(Squares(), "object-detection"),
        ValueError,
        "pipeline: task must be 'panoptic' or 'instance' or 'semantic' for a Squares, got 'obj",
    ),
    "a task that it cannot do": (
        lambda: segkern.pipeline(semantic_alone())(half_bright(), subtask="panoptic"),
        ValueError,
        "pipeline: subtask must be 'semantic' for a Squares, got 'panoptic'",
    ),
    "no batch": (
        lambda: segkern.pipeline(Squares(), batch_size=0),
        ValueError,
        "pipeline: batch_size must be",
    ),
    "a device that is none": (
        lambda: segkern.pipeline(Squares(), device="abacus"),
        ValueError,
        "device 'abacus' cannot be used",
    ),
    "a threshold of 2": (
        lambda: segkern.pipeline(Squares())(half_bright(), threshold=2),
        ValueError,
        r"pipeline: threshold must be in \[0, 1\], got 2",
    ),
    "an overlap that is no number": (
        lambda: segkern.pipeline(Squares())(half_bright(), overlap_mask_area_threshold="0.5"),
        TypeError,
        "pipeline: overlap_mask_area_threshold must be a number, got '0.5'",
    ),
    "another mask threshold, where it is read": (
        lambda: segkern.pipeline(Squares())(half_bright(), mask_threshold=0.3),
        ValueError,
        "pipeline: mask_threshold must be 0.5",
    ),
    "no file": (
        lambda: segkern.pipeline(Squares())("nothing.png"),
        ValueError,
        "nothing.png: no such file",
    ),
    "no picture": (
        lambda: segkern.pipeline(Squares())(7),
        TypeError,
        "image: must be a path, PIL image, array or tensor, got int",
    ),
    "bytes of no picture": (
        lambda: segkern.pipeline(Squares())(b"text"),
        ValueError,
        "image: not an image that PIL can read",
    ),
    "a file open as text": (
        lambda: segkern.pipeline(Squares())(io.StringIO("text")),
        TypeError,
        "image: a file must be open in binary mode, reading it gave str",
    ),
    "a data URI without base64": (
        lambda: segkern.pipeline(Squares())("data:image/svg+xml,<svg/>"),
        ValueError,
        "image: a data URI must be data:image/KIND;base64,DATA, got 'data:image/svg",
    ),
    "broken base64": (
        lambda: segkern.pipeline(Squares())("data:image/png;base64,%%"),
        ValueError,
        "image: a data URI must hold base64",
    ),
    "a picture of a list, by its place": (
        lambda: segkern.pipeline(Squares(), batch_size=2)([half_bright()] * 3 + [b"text"]),
        ValueError,
        "image 3: not an image that PIL can read",
    ),
    "too many pixels": (
        lambda: segkern.pipeline(Squares())(png(half_bright()), max_pixels=100),
        ValueError,
        "image: too large",
    ),
}


def semantic_alone():
    model = Squares()
    model.config.tasks, model.config.logits = ("semantic",), PixelLogits
    return model


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
