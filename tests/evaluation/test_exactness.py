"""The meters against pycocotools, panopticapi, torchmetrics, scikit-learn and slow code."""

import contextlib
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage
from sklearn.metrics import confusion_matrix
from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex

from segkern.evaluation.boundary import boundary
from segkern.evaluation.instance import Instances
from segkern.evaluation.panoptic import Panoptic
from segkern.evaluation.semantic import Semantic
from segkern.ops import pack_bits
from segkern.structures.segmentation import Masks, Segment, Segmentation

K, STUFF = 4, (3,)


def instances(masks, labels, scores):
    """A result; the best first."""
    order = np.argsort(-np.asarray(scores, float), kind="stable")
    masks = torch.as_tensor(np.asarray(masks)[order]).bool()
    return Segmentation(
        "instance",
        torch.zeros(masks.shape[1:], dtype=torch.int32),
        [],
        masks=Masks(pack_bits(masks)[0], range(len(masks)), masks.shape[2]),
        labels=torch.as_tensor(np.asarray(labels, np.int64)[order]),
        scores=torch.as_tensor(np.asarray(scores, np.float64)[order]),
    )


def target(masks, labels, crowd):
    return {
        "masks": np.asarray(masks, np.uint8),
        "labels": np.asarray(labels, np.int64),
        "crowd": np.asarray(crowd, bool),
    }


def boxes(rng, n, size):
    """n masks of rectangles, some of which overlap."""
    masks = np.zeros((n, *size), np.uint8)
    for mask in masks:
        y, x = (int(rng.integers(0, s)) for s in size)
        mask[y : y + rng.integers(1, size[0] + 1), x : x + rng.integers(1, size[1] + 1)] = 1
    return masks


def found_and_true(seed, n=12, crowds=True, p=30, size=(24, 33)):
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        t = int(rng.integers(0, 7))
        masks, labels = boxes(rng, t, size), rng.integers(0, K, t)
        crowd = rng.random(t) < (0.3 if crowds else 0)
        again = [np.roll(m, rng.integers(0, 2, 2), (0, 1)) for m in masks for _ in range(3)]
        m = np.concatenate((np.reshape(again, (-1, *size)), boxes(rng, p, size)))
        k = np.concatenate((labels.repeat(3), rng.integers(0, K, p)))
        keep = rng.permutation(len(m))
        scores = rng.permutation(len(m)) / len(m)
        scores = scores + 0.1 * rng.random()
        out.append((instances(m[keep], k[keep], scores), target(masks, labels, crowd)))
    return out


def empty(size=(8, 8)):
    return np.zeros((0, *size), np.uint8)


ONE = np.zeros((1, 8, 8), np.uint8)
ONE[0, 3, 3] = 1
FULL = np.ones((1, 8, 8), np.uint8)
NO, SOME = instances(empty(), [], []), instances(FULL, [0], [0.9])
PAIR = instances(np.concatenate((FULL, FULL)), [0, 0], [0.9, 0.8])
SCENES = {
    "random": found_and_true(0, crowds=False),
    "crowds": found_and_true(1),
    "a hundred and fifty": found_and_true(2, n=3, p=400),
    "no truth": [(SOME, target(empty(), [], [])), (SOME, target(FULL, [0], [False]))],
    "no result": [(NO, target(FULL, [0], [False])), (SOME, target(FULL, [0], [False]))],
    "nothing at all": [(NO, target(empty(), [], []))],
    "nothing found": [(NO, target(FULL, [0], [False]))],
    "all crowds": [(PAIR, target(FULL, [0], [True]))],
    "crowd and object": [(PAIR, target(np.concatenate((FULL, FULL)), [0, 0], [True, False]))],
    "found twice": [(PAIR, target(FULL, [0], [False]))],
    "one pixel": [(instances(ONE, [1], [0.3]), target(ONE, [1], [False]))],
    "empty masks": [(instances(0 * FULL, [0], [0.3]), target(0 * FULL, [0], [False]))],
    "stuff is none": [(instances(FULL, [3], [0.3]), target(FULL, [3], [False]))],
}


def slow_boundary(mask):
    """As the paper's code, by erosions of a square of three."""
    times = max(1, int(round(0.02 * np.hypot(*mask.shape))))
    padded = np.pad(mask, times + 1)
    inner = ndimage.binary_erosion(padded, np.ones((3, 3)), times)
    return mask & ~inner[times + 1 : -times - 1, times + 1 : -times - 1]


class BoundaryEval(COCOeval):
    def computeIoU(self, image, k):
        whole = super().computeIoU(image, k)
        d = sorted(self._dts[image, k], key=lambda x: -x["score"])[: self.params.maxDets[-1]]
        g = self._gts[image, k]
        if not (len(d) and len(g)):
            return whole
        codes = [
            [encoded(slow_boundary(coco.decode(x["segmentation"]).astype(bool))) for x in part]
            for part in (d, g)
        ]
        return np.minimum(whole, coco.iou(*codes, [x["iscrowd"] for x in g]))


def encoded(mask):
    return coco.encode(np.asfortranarray(mask, np.uint8))


def cocos(scenes, most, kind):
    """[T] means over classes, and each class's, by pycocotools from annotations and results."""
    things = [k for k in range(K) if k not in STUFF]
    annotations, results, images = [], [], []
    for i, (result, sample) in enumerate(scenes, 1):
        h, w = sample["masks"].shape[1:]
        images.append({"id": i, "height": h, "width": w})
        for m, k, c in zip(sample["masks"], sample["labels"].tolist(), sample["crowd"].tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": k,
                    "segmentation": encoded(m),
                    "area": float(m.sum()),
                    "iscrowd": int(c),
                }
            )
        for m, k, s in zip(result.masks, result.labels.tolist(), result.scores.tolist()):
            code = encoded(m.numpy())
            results.append({"image_id": i, "category_id": k, "segmentation": code, "score": s})
    categories = [{"id": k} for k in things]
    gt = COCO()
    gt.dataset = {
        "info": {},
        "images": images,
        "annotations": [a for a in annotations if a["category_id"] in things],
        "categories": categories,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex()
        dt = gt.loadRes(results) if results else COCO()
        if not results:
            dt.dataset = gt.dataset | {"annotations": []}
            dt.createIndex()
        run = kind(gt, dt, "segm")
        run.params.maxDets = [most]
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 0]
    precision = np.where(precision < 0, np.nan, precision)
    with np.errstate(all="ignore"), contextlib.suppress(RuntimeWarning):
        whole = [np.nanmean(x) if (x == x).any() else None for x in precision]
        mean = np.nanmean(precision) if (precision == precision).any() else None
        per = [np.nanmean(x) if (x == x).any() else None for x in np.moveaxis(precision, 2, 0)]
    return mean, whole, per


def measured(meter, scenes):
    scores = [meter.update(result, sample) for result, sample in scenes]
    rows = [{"name": str(k)} for k in range(K)]
    return meter.compute(rows), rows, scores


@pytest.mark.parametrize("most", [1, 100, 1000])
@pytest.mark.parametrize("scenes", SCENES.values(), ids=SCENES)
def test_ap_is_pycocotools(scenes, most):
    value, rows, _ = measured(Instances(K, STUFF, most), scenes)
    for kind, name in ((COCOeval, "ap"), (BoundaryEval, "boundary_ap")):
        mean, whole, per = cocos(scenes, most, kind)
        assert value[name] == (None if mean is None else pytest.approx(mean, abs=1e-12))
        assert value[f"{name}50"] == (
            None if whole[0] is None else pytest.approx(whole[0], abs=1e-12)
        )
        for row, x in zip(rows, per):
            assert row[name] == (None if x is None else pytest.approx(x, abs=1e-12))


def test_more_than_a_hundred_results_count():
    assert cocos(SCENES["a hundred and fifty"], 100, COCOeval)[0] is not None
    few, many = (
        measured(Instances(K, STUFF, most), [(grid(150), grid_truth(150))])[0]["ap"]
        for most in (100, 150)
    )
    assert few == pytest.approx(67 / 101)  # of 101 recalls, those up to two thirds
    assert many == 1.0


def grid(n):
    masks = np.zeros((n, 15, 20), np.uint8)
    masks.reshape(n, -1)[np.arange(n), np.arange(n)] = 1
    return instances(masks, [0] * n, np.linspace(1, 0.5, n))


def grid_truth(n):
    return target(np.stack([m.numpy() for m in grid(n).masks]), [0] * n, [False] * n)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (40, 40), (75, 100), (240, 320)], ids=str)
def test_boundaries_are_those_of_erosion(size):
    rng = np.random.default_rng(0)
    masks = [*boxes(rng, 4, size).astype(bool), np.ones(size, bool), np.zeros(size, bool)]
    masks += [rng.random(size) < share for share in (0.02, 0.5, 0.98)]
    for mask in masks:
        before = mask.copy()
        np.testing.assert_array_equal(boundary(mask), slow_boundary(mask))
        np.testing.assert_array_equal(mask, before)


def test_best_threshold_by_hand():
    """Of two right results and two wrong ones between and below, the first three are best."""
    masks = np.zeros((4, 8, 8), np.uint8)
    for i, mask in enumerate(masks):
        mask[2 * i] = 1
    result = instances(masks, [0] * 4, [0.9, 0.7, 0.6, 0.2])
    value, rows, scores = measured(
        Instances(K, STUFF), [(result, target(masks[[0, 2]], [0, 0], [0, 0]))]
    )
    assert value["best_threshold"] == rows[0]["best_threshold"]
    assert value["thresholds"]["score"][60] == 0.6
    assert value["thresholds"]["precision"][60] == pytest.approx(2 / 3)
    assert value["mask_f1"] == rows[0]["mask_f1"] == pytest.approx(0.8)
    assert value["best_threshold"] == pytest.approx(0.41)  # the middle of 0.21 to 0.6
    assert scores == [pytest.approx(0.8)]
    assert rows[1]["mask_f1"] is None


def test_confusion_of_instances_by_hand():
    """Right, taken for another, doubted and so missed; not there, in a crowd, found twice."""
    masks = np.zeros((6, 12, 12), np.uint8)
    for i, mask in enumerate(masks):
        mask[2 * i : 2 * i + 2] = 1
    true = target(masks[[0, 1, 2, 4]], [0, 1, 2, 1], [False, False, False, True])
    found = masks[[0, 1, 2, 3, 4, 0, 4]]
    result = instances(found, [0, 2, 2, 1, 1, 0, 0], [0.9, 0.8, 0.4, 0.7, 0.7, 0.6, 0.6])
    value, *_ = measured(Instances(K, STUFF), [(result, true)])
    want = np.zeros((K + 1, K + 1), int)
    want[0, 0] = want[1, 2] = want[2, K] = want[K, 1] = 1
    want[K, 0] = 2  # the second on the first object, and one in a crowd of another class
    assert value["instance_confusion"] == want.tolist()


def panoptic(rng, size=(20, 24), n=6):
    """A result, and a truth with void and crowds: maps of ids with their labels."""
    at = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    cells = ((at[:, :, None] - rng.random((n + 2, 2)) * size) ** 2).sum(-1).argmin(-1)
    labels, crowd = rng.integers(0, K, n), rng.random(n) < 0.3
    moved = np.roll(cells, rng.integers(0, 3, 2), (0, 1)).clip(max=n)
    masks = np.arange(1, n + 1)[:, None, None] == cells  # n + 1 and 0 are void
    guess = np.where(rng.random(n) < 0.8, labels, rng.integers(0, K, n))
    first = {}
    ids = [first.setdefault(k, i) if k in STUFF else i for i, k in enumerate(guess.tolist(), 1)]
    moved = np.append(0, ids)[moved]
    used = np.unique(moved[moved > 0])
    rank = np.zeros(n + 1, np.int64)
    rank[used] = np.arange(1, len(used) + 1)
    segments = [
        Segment(j, int(guess[i - 1]), 0.9, int((moved == i).sum()), True)
        for j, i in enumerate(used.tolist(), 1)
    ]
    result = Segmentation("panoptic", torch.from_numpy(rank[moved]).int(), segments)
    return result, target(masks, labels, crowd)


def panopticapi(scenes):
    """Its loops, on segments as COCO's files have them: one of each stuff, one crowd a class."""
    iou, tp, fp, fn = np.zeros((4, K))
    for result, sample in scenes:
        gt, info = np.zeros(sample["masks"].shape[1:], int), {}
        for i, (m, k, c) in enumerate(
            zip(sample["masks"], sample["labels"].tolist(), sample["crowd"].tolist()), 1
        ):
            same = [j for j, x in info.items() if x == (k, c)] if c or k in STUFF else []
            gt[m > 0] = same[0] if same else i
            info[gt[m > 0][0] if m.any() else i] = (k, c)
        info = {i: x for i, x in info.items() if (gt == i).any()}
        pred = result.segmentation.numpy()
        found = {s.id: s.label_id for s in result.segments}
        both = {(g, p): ((gt == g) & (pred == p)).sum() for g in (0, *info) for p in found}
        area = {p: (pred == p).sum() for p in found}
        matched = set()
        for (g, p), n in both.items():
            if not n or not g or info[g][1] or info[g][0] != found[p]:
                continue
            x = n / (area[p] + (gt == g).sum() - n - both[0, p])
            if x > 0.5:
                matched |= {("gt", g), ("pred", p)}
                iou[found[p]] += x
                tp[found[p]] += 1
        crowds = {k: g for g, (k, c) in info.items() if c}
        for g, (k, c) in info.items():
            fn[k] += not c and ("gt", g) not in matched
        for p, k in found.items():
            if ("pred", p) in matched:
                continue
            ignored = both[0, p] + (both[crowds[k], p] if k in crowds else 0)
            fp[k] += ignored / area[p] <= 0.5
    return iou, tp, fp, fn


def void_pixel():
    """A result of one pixel in void, and one that lies by just half in void."""
    ids = torch.zeros((8, 8), dtype=torch.int32)
    ids[0, 0], ids[3:5] = 1, 2
    masks = np.zeros((1, 8, 8), np.uint8)
    masks[0, 4:] = 1
    segments = [Segment(1, 0, 0.9, 1, True), Segment(2, 1, 0.9, 16, True)]
    return Segmentation("panoptic", ids, segments), target(masks, [0], [False])


rng = np.random.default_rng(3)
PANOPTIC = {
    "random": [panoptic(rng) for _ in range(40)],
    "one pixel and void": [void_pixel()],
    "empty truth": [(void_pixel()[0], target(empty(), [], []))],
    "empty result": [
        (Segmentation("panoptic", torch.zeros((8, 8), dtype=torch.int32), []), void_pixel()[1])
    ],
}


@pytest.mark.parametrize("scenes", PANOPTIC.values(), ids=PANOPTIC)
def test_pq_is_panopticapi(scenes):
    value, rows, scores = measured(Panoptic(K, STUFF), scenes)
    iou, tp, fp, fn = panopticapi(scenes)
    total = tp + fp / 2 + fn / 2
    for k, row in enumerate(rows):
        assert (row["tp"], row["fp"], row["fn"]) == (tp[k], fp[k], fn[k])
        assert row["pq"] == (pytest.approx(iou[k] / total[k]) if total[k] else None)
    seen = total > 0
    assert value["pq"] == (pytest.approx((iou[seen] / total[seen]).mean()) if seen.any() else None)
    alone = [panopticapi([scene]) for scene in scenes]
    for score, (iou, tp, fp, fn) in zip(scores, alone):
        total = (tp + fp / 2 + fn / 2).sum()
        assert score == (pytest.approx(iou.sum() / total) if total else None)


def test_pixels_are_torchmetrics_and_scikit_learn():
    rng = np.random.default_rng(0)
    maps = [
        np.where(rng.random((2, 9, 11)) < 0.4, 1, rng.integers(0, K, (2, 9, 11))) for _ in range(5)
    ]
    for true, _ in maps:
        true[rng.random(true.shape) < 0.2] = 255
    scenes = [
        (Segmentation("semantic", torch.from_numpy(p), []), {"semantic": t}) for t, p in maps
    ]
    value, rows, scores = measured(Semantic(K, ()), scenes)
    true, found = (torch.from_numpy(np.stack(x)) for x in zip(*maps))
    seen = true != 255
    want = confusion_matrix(true[seen], found[seen], labels=range(K))
    assert value["pixel_confusion"] == want.tolist()
    for name, key, metric in (
        ("miou", "iou", MulticlassJaccardIndex),
        ("f1", "f1", MulticlassF1Score),
    ):
        for average in ("macro", None):
            x = metric(K, average=average, ignore_index=255)(found, true).tolist()
            got = value[name] if average else [row[key] for row in rows]
            assert got == pytest.approx(x)
    assert value["mean_accuracy"] == pytest.approx((want.diagonal() / want.sum(1)).mean())
    for (t, p), score in zip(maps, scores):
        x = MulticlassJaccardIndex(K, average="macro", ignore_index=255)
        assert score == pytest.approx(x(torch.from_numpy(p), torch.from_numpy(t)).item())


def held(meter):
    parts = [x for x in vars(meter).values() if not inspect.ismodule(x)]
    return len(pickle.dumps(parts))


def test_what_is_held_does_not_grow_with_images():
    """A few bytes a result, whatever the size of the masks; of the other tasks nothing at all."""
    meters = Instances(K, STUFF), Panoptic(K, STUFF), Semantic(K, ())
    instance = found_and_true(0, n=2, size=(48, 64))
    others = [panoptic(np.random.default_rng(0))] * 2
    maps = Segmentation("semantic", torch.zeros((20, 24), dtype=torch.int32), [])
    semantic = [(maps, {"semantic": np.zeros((20, 24), np.uint8)})] * 2
    sizes, results = [], sum(len(r.masks) for r, _ in instance)
    for _ in range(3):
        for meter, scenes in zip(meters, (instance, others, semantic)):
            for result, sample in scenes:
                meter.update(result, sample)
        sizes.append([held(meter) for meter in meters])
    grown = np.diff(sizes, axis=0)
    assert (grown[:, 0] < 32 * results + 200 * len(instance)).all()
    assert (grown[:, 1:] <= 8).all()
