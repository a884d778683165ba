"""Results handed to other tools: supervision, pycocotools, transformers, and our own COCO reader.

Letters: n segment, H W size of the image.
"""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
import supervision
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers.image_transforms import rgb_to_id

from segkern.data.coco import CocoConfig, read_coco
from segkern.ops import pack_bits
from segkern.structures.segmentation import Masks, Segment, Segmentation

H, W = 40, 70
NAMES = {0: "sky", 1: "car", 2: "tree"}
TASKS = ("panoptic", "instance", "semantic")
OVERLAPPING = {"front": (3, 5, 30, 25), "behind": (20, 15, 65, 40), "hidden": (5, 6, 10, 9)}


def result(task):
    """Two cars and the sky; of instances the second is partly, the third wholly covered, and the
    fourth has no pixel."""
    masks = torch.zeros(4, H, W, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, OVERLAPPING.values()):
        mask[y0:y1, x0:x1] = True
    if task == "instance":
        order = torch.tensor([1, 2, 3, 4])[:, None, None]
        seen = torch.where(masks, order, 9).amin(0)
        segments = [
            Segment(i + 1, 1, 0.9 - i / 8, int(m.sum()), True) for i, m in enumerate(masks)
        ]
        return Segmentation(
            task,
            torch.where(seen == 9, 0, seen).int(),
            segments,
            NAMES,
            Masks(pack_bits(masks)[0], range(4), W),
            torch.ones(4, dtype=torch.int64),
            torch.tensor([s.score for s in segments]),
        )
    if task == "semantic":
        labels = masks[:2].any(0).int()
        areas = labels.flatten().bincount().tolist()
        return Segmentation(
            task, labels, [Segment(k, k, None, areas[k], False) for k in (0, 1)], NAMES
        )
    ids = torch.zeros(H, W, dtype=torch.int32)
    ids[: H // 2] = 2
    ids[masks[1]] = 3
    ids[masks[0]] = 1
    areas = ids.flatten().bincount().tolist()
    rows = ((1, 1, True), (2, 0, False), (3, 1, True))
    return Segmentation(
        task, ids, [Segment(i, k, 0.5 + i / 8, areas[i], thing) for i, k, thing in rows], NAMES
    )


def masks_of(found):
    return torch.stack([found.mask(i) for i in range(len(found.segments))]).numpy()


@pytest.mark.parametrize("task", TASKS)
def test_supervision_computes_from_a_result(task):
    found = result(task)
    detections = found.to_supervision()
    masks = masks_of(found)
    assert np.array_equal(detections.mask, masks)
    assert detections.area.tolist() == [s.area for s in found.segments]
    edges = supervision.mask_to_xyxy(masks, coordinate_convention="exclusive")
    assert np.array_equal(detections.xyxy, edges)
    assert detections.class_id.tolist() == [s.label_id for s in found.segments]
    assert detections["class_name"].tolist() == [found.name(s.label_id) for s in found.segments]
    if task == "semantic":
        assert detections.confidence is None
    else:
        scores = np.float32([s.score for s in found.segments])
        assert np.array_equal(detections.confidence, scores)
        kept = detections[detections.confidence > 0.7]
        assert len(kept) == (scores > 0.7).sum()
    cars = detections[detections.class_id == 1]
    assert cars.area.sum() == sum(s.area for s in found.segments if s.label_id == 1)


def test_supervision_draws_a_result():
    found = result("panoptic")
    scene = np.zeros((H, W, 3), np.uint8)
    drawn = supervision.MaskAnnotator(opacity=1.0).annotate(scene.copy(), found.to_supervision())
    covered = masks_of(found).any(0)
    assert np.array_equal(drawn.any(2), covered)
    boxes = supervision.BoxAnnotator(thickness=1).annotate(scene.copy(), found.to_supervision())
    assert boxes.any()
    labelled = supervision.LabelAnnotator().annotate(scene.copy(), found.to_supervision())
    assert labelled.any()


def test_supervision_measures_a_result_as_perfect_against_itself():
    from supervision.metrics import MeanAveragePrecision, MetricTarget

    found = result("panoptic").to_supervision()
    metric = MeanAveragePrecision(metric_target=MetricTarget.MASKS)
    assert metric.update(found, found).compute().map50_95 == pytest.approx(1.0)


def test_a_result_without_segments_is_empty_everywhere():
    found = Segmentation("panoptic", torch.zeros(H, W, dtype=torch.int32), [], NAMES)
    detections = found.to_supervision()
    assert detections.is_empty()
    assert detections.mask.shape == (0, H, W)
    assert found.to_coco() == found.to_coco(kind="results") == []
    picture, segments = found.to_panoptic_png()
    assert segments == []
    assert not np.asarray(picture).any()


def test_supervision_that_is_missing_comes_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"to_supervision: .* pip install supervision"):
        result("panoptic").to_supervision()


IDS = {0: 7, 1: 3, 2: 90}


def coco_file(annotations, folder):
    """A COCO file of one picture, opened by pycocotools."""
    content = {
        "images": [{"id": 12, "file_name": "a.png", "width": W, "height": H}],
        "categories": [{"id": IDS[k], "name": name} for k, name in NAMES.items()],
        "annotations": annotations,
    }
    path = folder / "instances_val.json"
    path.write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


@pytest.mark.parametrize("task", TASKS)
def test_pycocotools_opens_annotations(task, tmp_path):
    found = result(task)
    coco = coco_file(found.to_coco(12, IDS, first_id=50), tmp_path)
    rows = coco.loadAnns(coco.getAnnIds(imgIds=12))
    with_pixels = [i for i, s in enumerate(found.segments) if s.area]
    assert [row["id"] for row in rows] == [50 + i for i in range(len(with_pixels))]
    for row, i in zip(rows, with_pixels):
        mask, s = found.mask(i).numpy(), found.segments[i]
        assert np.array_equal(coco.annToMask(row), mask)
        assert row["category_id"] == IDS[s.label_id]
        assert row["area"] == mask.sum() == s.area
        x0, y0, x1, y1 = supervision.mask_to_xyxy(mask[None], "exclusive")[0]
        assert row["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert row["iscrowd"] == 0


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_pycocotools_scores_results(task, tmp_path):
    found = result(task)
    truth = coco_file(found.to_coco(12, IDS), tmp_path)
    results = json.loads(json.dumps(found.to_coco(12, IDS, kind="results")))
    assert len(results) == len(found.segments)
    with contextlib.redirect_stdout(io.StringIO()):
        read = truth.loadRes(results)
        measured = COCOeval(truth, read, "segm")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    assert measured.stats[0] == pytest.approx(1.0)  # the empty instance scores least
    for row, (i, s) in zip(read.dataset["annotations"], enumerate(found.segments)):
        assert np.array_equal(read.annToMask(row), found.mask(i).numpy())
        assert (row["area"], row["score"]) == (s.area, s.score)


def test_labels_are_their_own_categories_unless_told():
    assert [row["category_id"] for row in result("panoptic").to_coco()] == [1, 0, 1]
    listed = result("panoptic").to_coco(category_ids=[10, 20, 30])
    assert [row["category_id"] for row in listed] == [20, 10, 20]


BAD = {
    "a kind that is none": (
        lambda: result("panoptic").to_coco(kind="boxes"),
        'to_coco: kind must be "annotations" or "results", got \'boxes\'',
    ),
    "results without scores": (
        lambda: result("semantic").to_coco(kind="results"),
        'to_coco: kind must be "annotations" for a semantic result',
    ),
    "a label without category": (
        lambda: result("panoptic").to_coco(category_ids={0: 7}),
        r"to_coco: category_ids must have every label of the result, got none for 1 \(car\)",
    ),
    "a list of categories that is too short": (
        lambda: result("panoptic").to_panoptic_png(category_ids=[7]),
        "to_panoptic_png: category_ids must have every label",
    ),
}
NO_INTEGERS = {
    "a category in words": (
        lambda: result("panoptic").to_coco(category_ids={0: 7, 1: "car"}),
        r"to_coco: category_ids\[1\] must be an integer, got 'car'",
    ),
    "a category between two": (
        lambda: result("panoptic").to_panoptic_png({0: 7, 1: 2.5}),
        r"to_panoptic_png: category_ids\[1\] must be an integer, got 2.5",
    ),
    "one category for all": (
        lambda: result("panoptic").to_panoptic_png(7),
        "to_panoptic_png: category_ids must be a mapping or a sequence, got 7",
    ),
    "a picture's name": (
        lambda: result("panoptic").to_coco("a.png"),
        "to_coco: image_id must be an integer, got 'a.png'",
    ),
    "no first id": (
        lambda: result("panoptic").to_coco(first_id=None),
        "to_coco: first_id must be an integer, got None",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), NO_INTEGERS.values(), ids=NO_INTEGERS)
def test_ids_are_integers(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("kind", ["annotations", "results"])
def test_ids_of_numpy_go_into_json(kind):
    ids = np.array([7, 3, 90])
    found = result("panoptic").to_coco(np.int64(12), ids, kind, first_id=np.int64(5))
    assert {row["image_id"] for row in json.loads(json.dumps(found))} == {12}


@pytest.mark.parametrize("task", TASKS)
def test_panoptic_pngs_are_read_back(task, tmp_path):
    """By our own reader of COCO's panoptic format, and the ids by transformers."""
    found = result(task)
    picture, segments = found.to_panoptic_png(IDS)
    categories = [
        {"id": IDS[k], "name": name, "isthing": int(k == 1)} for k, name in NAMES.items()
    ]
    content = {
        "images": [{"id": 12, "file_name": "a.png", "width": W, "height": H}],
        "categories": categories,
        "annotations": [{"image_id": 12, "file_name": "a.png", "segments_info": segments}],
    }
    (tmp_path / "panoptic_val.json").write_text(json.dumps(content))
    for folder in ("val", "panoptic_val"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (W, H)).save(tmp_path / "val/a.png")
    picture.save(tmp_path / "panoptic_val/a.png")

    ids = rgb_to_id(np.asarray(Image.open(tmp_path / "panoptic_val/a.png")))
    assert np.array_equal(ids, found.segmentation.numpy() + (task == "semantic"))

    read = read_coco(CocoConfig(root=tmp_path, task="panoptic"), "val")[0]
    seen = np.unique(found.segmentation)
    rows = [s for s in found.segments if s.id in seen]
    assert len(read["masks"]) == len(rows) == len(segments)
    names = ["car", "sky", "tree"]  # in the order of the categories' ids, things first
    for mask, label, s, info in zip(read["masks"], read["labels"], rows, segments, strict=True):
        own = found.segmentation.numpy() == s.id
        assert np.array_equal(mask, own)
        assert names[int(label)] == found.name(s.label_id)
        assert info["area"] == own.sum()
        x0, y0, x1, y1 = supervision.mask_to_xyxy(own[None], "exclusive")[0]
        assert info["bbox"] == [x0, y0, x1 - x0, y1 - y0]


def test_ids_above_a_byte_are_spread_over_the_colours():
    ids = torch.tensor([[0, 255, 256], [65535, 65536, 70000]], dtype=torch.int32)
    segments = [Segment(int(i), 0, 0.5, 1, True) for i in ids.flatten()[1:]]
    picture, _ = Segmentation("panoptic", ids, segments).to_panoptic_png()
    assert np.array_equal(rgb_to_id(np.asarray(picture)), ids)
