"""From a picture to segments: EoMT against transformers' processor, model and post-processing."""

import numpy as np
import pytest
import torch
from transformers import EomtConfig as ReferenceConfig
from transformers import EomtForUniversalSegmentation as Reference
from transformers import EomtImageProcessor

import segkern
from segkern.inference.query_windows import query_label_maps
from segkern.inference.sliding_window import starts
from segkern.io.images import prepare, read_image
from segkern.models import EoMT, EoMTConfig

SIDE, LABELS, STUFF = 64, 5, (0, 3)


def picture(h, w):
    """Squares of colours, neither smooth nor pure noise."""
    g = np.random.default_rng(h * w)
    coarse = g.integers(0, 256, (-(-h // 16), -(-w // 16), 3))
    fine = g.integers(-20, 20, (h, w, 3))
    tiled = coarse.repeat(16, 0).repeat(16, 1)[:h, :w]
    return (tiled + fine).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(reference, ours of whole pictures, ours of windows), float64, with the same weights."""
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = ReferenceConfig(
        image_size=SIDE, patch_size=8, num_queries=6, num_blocks=1, num_labels=LABELS, **settings
    )
    reference = Reference(config).eval()
    with torch.no_grad():
        reference.attn_mask_probs.zero_()
        for name, p in reference.named_parameters():
            if "mask_head" in name or "upscale" in name or "class" in name:
                p.mul_(4 if "class" not in name else 8)
    models = [reference.double()]
    for windows in (False, True):
        folder = tmp_path_factory.mktemp("model")
        reference.float().save_pretrained(folder)
        processor(windows).save_pretrained(folder)
        model = EoMT.from_pretrained(folder)
        assert model.config.windows is windows
        model.config.stuff = STUFF
        models.append(model.double())
    reference.double()
    return models


def processor(windows):
    size = {"shortest_edge": SIDE, "longest_edge": None if windows else SIDE}
    return EomtImageProcessor(size=size, do_split_image=windows, do_pad=not windows)


SIZES = [(63, 91), (131, 64), (64, 64), (97, 290), (301, 77), (50, 31)]
IDS = ["x".join(map(str, size)) for size in SIZES]


@pytest.mark.parametrize("size", SIZES, ids=IDS)
@pytest.mark.parametrize("windows", [False, True], ids=["whole", "windows"])
def test_the_pixels_are_those_of_the_reference(pair, size, windows):
    model, image = pair[1 + windows], picture(*size)
    want = processor(windows)(image, return_tensors="pt")["pixel_values"]
    (batch,) = seen(model, image, "semantic" if windows else "panoptic")
    assert batch.shape == want.shape
    # its processor resizes in whole numbers, ours rounds once: a level of 255 apart at most
    apart = (batch - want).abs().amax((0, 2, 3)) * 255 * torch.tensor(model.config.image_std)
    assert apart.max() <= 1.01
    assert (batch - want).abs().mean() < 0.01


def seen(model, image, task):
    """The batches that go into a model."""
    batches, run = [], model.predict
    try:
        type(model).predict = lambda self, x: batches.append(x) or run(x)
        segkern.segment(model, image, task, cuda_graphs=False)
    finally:
        type(model).predict = PREDICT
    return batches


PREDICT = EoMT.predict


@pytest.mark.parametrize("size", SIZES, ids=IDS)
@torch.no_grad()
def test_panoptic_segments_are_those_of_the_reference(pair, size):
    reference, model, _ = pair
    image = picture(*size)
    (pixels,) = seen(model, image, "panoptic")
    found = segkern.segment(model, image, threshold=0.25, overlap_threshold=0.3)
    (want,) = processor(False).post_process_panoptic_segmentation(
        reference(pixels),
        target_sizes=[size],
        threshold=0.25,
        overlap_mask_area_threshold=0.3,
        stuff_classes=list(STUFF),
    )
    assert torch.equal(found.segmentation, want["segmentation"].int() + 1)
    assert [s.label_id for s in found.segments] == [s["label_id"] for s in want["segments_info"]]
    assert size == (64, 64) or len(found.segments) > 0


@pytest.mark.parametrize("size", SIZES, ids=IDS)
@torch.no_grad()
def test_semantic_maps_are_those_of_the_reference(pair, size):
    reference, _, model = pair
    image, tools = picture(*size), processor(True)
    inputs = tools(image, return_tensors="pt")
    found = segkern.segment(model, image, return_scores=True)
    out = reference(*seen(model, image, "semantic"), patch_offsets=inputs["patch_offsets"])
    (want,) = tools.post_process_semantic_segmentation(
        out, target_sizes=[size], return_segmentation_scores=True
    )
    assert torch.allclose(found.scores, want.segmentation_scores.to(found.scores), atol=1e-4)
    certain = want.segmentation_scores.topk(2, 0).values.diff(dim=0)[0].abs() > 1e-3
    assert torch.equal(found.segmentation[certain], want.segmentation.int()[certain])
    assert certain.double().mean() > 0.9
    assert len(found.segments) > 1
    assert torch.equal(segkern.segment(model, image).segmentation, found.segmentation)


def test_windows_overlap_evenly_and_cover_a_side():
    for size in range(64, 400):
        found = starts(size, 64, None)
        assert len(found) == -(-size // 64)
        assert (found[0], found[-1]) == (0, size - 64)
        gaps = np.diff(found)
        assert len(gaps) == 0 or (gaps.max() <= 64 and gaps.max() - gaps.min() <= 1)
    assert starts(150, 64, 40) == [0, 40, 80, 86]


def test_bands_are_as_the_whole(pair, monkeypatch):
    model, image = pair[2], torch.randn(1, 3, 64, 150, dtype=torch.float64)
    (want,) = query_label_maps(model, image, [(91, 33)], True)
    monkeypatch.setattr(segkern.inference.query_windows, "rows_at_once", lambda *_: 7)
    (have,) = query_label_maps(model, image, [(91, 33)], True)
    assert torch.equal(have[0], want[0])
    assert torch.allclose(have[1], want[1], atol=1e-12)


def test_a_side_may_be_a_pixel_off_the_reference():
    """transformers cuts a side to whole pixels; the paper's code rounds it, and so does this."""
    image = picture(100, 151)  # 64 high, 96.64 wide
    settings = EoMTConfig.tiny(3)
    settings.windows = True
    assert prepare(read_image(image), settings.input).shape == (3, 64, 97)
    offsets = processor(True)(image, return_tensors="pt")["patch_offsets"]
    assert offsets[-1][-1] == 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "panoptic"}, "task must be 'semantic' for a EoMT, got 'panoptic'"),
        ({"resize": "scores"}, "resize must be left out for models that look through windows"),
        ({"window": 32}, "are for models that give class logits of pixels"),
    ],
    ids=["task", "resize", "window"],
)
def test_what_windows_do_not_take_is_refused(pair, options, message):
    with pytest.raises(ValueError, match=message):
        segkern.segment(pair[2], picture(64, 64), **options)
