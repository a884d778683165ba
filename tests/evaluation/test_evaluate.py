"""Metrics against torchmetrics, and against figures found by hand."""

import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from segkern.evaluation.evaluate import WORST, evaluate
from segkern.evaluation.instance import Instances
from segkern.evaluation.report import table, truth
from segkern.evaluation.semantic import Semantic
from segkern.inference.postprocess import postprocess
from support.painted import STUFF, K, Painted, Scenes, blocks, random_scenes, run, sample


def as_panoptic(scenes):
    """Pairs (category, instance) [1, H, W, 2] of the predictions and the truths."""
    for s in scenes.samples:
        ids, label = (torch.from_numpy(x).long() for x in s["pixel_values"][:2])
        label = torch.where(ids == 0, K, label)  # void is a class of its own in the prediction
        true = truth(s, STUFF, Scenes.classes).segmentation.long()
        t_label = torch.from_numpy(np.append(255, s["labels"])).long()[true]
        yield torch.stack((label, ids), -1)[None], torch.stack((t_label, true), -1)[None]


@pytest.mark.parametrize("void", [True, False], ids=["void", "full"])
def test_panoptic_quality_is_torchmetrics(void):
    from torchmetrics.detection import PanopticQuality

    scenes = random_scenes(40, void=void)
    value = run(scenes, tasks=("panoptic",))
    metric = PanopticQuality({0, 1, 2}, {3, 4, K}, return_sq_and_rq=True, return_per_class=True)
    for predicted, true in as_panoptic(scenes):
        metric.update(predicted, true)
    want = metric.compute()[:K].double()
    got = torch.tensor([[row[x] for x in ("pq", "sq", "rq")] for row in value["classes"]])
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert 0.2 < value["pq"] < 0.95
    for part, rows in (("things", want[:3]), ("stuff", want[3:])):
        for x, mean in zip(("pq", "sq", "rq"), rows.mean(0).tolist()):
            assert value[part][x] == pytest.approx(mean, abs=1e-6)
    assert value["pq"] == pytest.approx(want[:, 0].mean().item(), abs=1e-6)


def test_fault_torchmetrics_forgives_what_is_missed_as_void():
    """An instance predicted as void is a false negative."""
    true = np.repeat([[1] * 8 + [2] * 8], 16, 0)
    value = run(Scenes([sample(true, [0, 0], np.where(true == 2, 0, 1), [0])]))
    assert value["classes"][0]["fn"] == 1
    assert value["pq"] == pytest.approx(1 / 1.5)


def test_mask_ap_is_torchmetrics():
    from torchmetrics.detection import MeanAveragePrecision

    scenes = random_scenes(30, seed=1)
    scenes.samples = [s for s in scenes.samples if not np.isin(s["labels"], STUFF).all()]
    value = run(scenes, tasks=("instance",), top_k=8)
    metric = MeanAveragePrecision(iou_type="segm", class_metrics=True)
    for s in scenes.samples:
        x = torch.from_numpy(s["pixel_values"])[None]
        model = Painted().eval()
        size = tuple(x.shape[2:])
        out = model.predict(x)
        (result,) = postprocess(
            out.classes,
            out.masks,
            "instance",
            size,
            [size],
            [size],
            STUFF,
            top_k=8,
        )
        thing = np.isin(s["labels"], STUFF, invert=True)
        metric.update(
            [{"masks": result.masks.dense(), "scores": result.scores, "labels": result.labels}],
            [
                {
                    "masks": torch.from_numpy(s["masks"][thing]).bool(),
                    "labels": torch.from_numpy(s["labels"][thing]),
                }
            ],
        )
    want = metric.compute()
    for name, theirs in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75")):
        assert value[name] == pytest.approx(want[theirs].item(), abs=1e-6)
    assert [r["ap"] for r in value["classes"]][:3] == pytest.approx(
        want["map_per_class"].tolist(), abs=1e-6
    )
    assert 0.1 < value["ap"] < value["ap50"] < 1
    assert value["classes"][3]["ap"] is None


def test_fault_torchmetrics_leaves_out_images_without_truth():
    """What is found where nothing is counts against AP."""
    ones = np.ones((16, 16), int)
    scenes = [sample(ones, [1], ones, [1]), sample(0 * ones, [], ones, [1])]
    scenes[0]["pixel_values"][2] = 1  # the right one is the less sure
    assert run(Scenes(scenes[:1]), top_k=1)["ap"] == pytest.approx(1.0)
    assert run(Scenes(scenes), top_k=1)["ap"] == pytest.approx(0.5)


def test_miou_by_hand():
    scenes = random_scenes(20, seed=2)
    value = run(scenes, tasks=("semantic",))
    model = Painted().eval()
    inside, union, right, pixels = np.zeros(K), np.zeros(K), 0, 0
    for s in scenes.samples:
        x = torch.from_numpy(s["pixel_values"])[None]
        out = model.predict(x)
        scores = out.classes.softmax(-1)[0, :, :-1].T
        found = (scores @ out.masks[0].sigmoid().flatten(1)).argmax(0)
        true, found = s["semantic"].ravel(), found.numpy()
        seen = true != 255
        right, pixels = right + (true == found)[seen].sum(), pixels + seen.sum()
        for k in range(K):
            inside[k] += ((true == k) & (found == k)).sum()
            union[k] += (((true == k) | (found == k)) & seen).sum()
    assert value["miou"] == pytest.approx((inside / union).mean())
    assert [r["iou"] for r in value["classes"]] == pytest.approx(inside / union)
    assert value["pixel_accuracy"] == pytest.approx(right / pixels)


def test_labels_that_the_model_does_not_have_are_void():
    ones = np.ones((16, 16), int)
    scene = sample(ones, [1], ones, [1])
    scene["semantic"][:4] = K
    value = run(Scenes([scene]), tasks=("semantic",))
    assert value["pixel_accuracy"] == value["miou"] == 1.0


def test_the_data_set_stays_as_it_was():
    ones = np.ones((16, 16), int)
    scene = sample(ones, [1], ones, [1])
    scene["semantic"] = torch.full((16, 16), 1)
    scene["semantic"][:4], scene["semantic"][4:8] = K, -1
    before = scene["semantic"].clone()
    assert run(Scenes([scene]), tasks=("semantic",))["pixel_accuracy"] == 1.0
    assert torch.equal(scene["semantic"], before)


def test_class_255_of_many_is_no_void():
    meter = Semantic(300, ())
    semantic = torch.tensor([[255, 255, 299, 300]])
    found = SimpleNamespace(segmentation=torch.tensor([[255, 7, 299, 7]]))
    meter.update(found, {"semantic": semantic})
    rows = [{} for _ in range(300)]
    assert meter.compute(rows)["pixel_accuracy"] == pytest.approx(2 / 3)
    assert (rows[255]["iou"], rows[299]["iou"]) == (0.5, 1.0)


def test_perfect_predictions_score_one():
    rng = np.random.default_rng(0)
    scenes = []
    for _ in range(6):
        ids, labels = blocks(rng, 5, (20, 17)), rng.permutation(K)
        scenes.append(sample(ids, labels, ids, labels))
    value = run(Scenes(scenes))
    for name in ("pq", "sq", "rq", "class_accuracy", "dice", "ap", "ap50", "miou"):
        assert value[name] == pytest.approx(1.0, abs=1e-5), name
    confusion = np.array(value["confusion"])
    assert confusion.sum() == confusion[:3, :3].trace() == value["matched"] == value["instances"]


def test_matches_by_hand():
    """Three true things: found, found under another name, missed; one thing that is not there."""
    true, found = np.zeros((2, 20, 20), int)
    true[:10, :10], true[:10, 10:], true[10:, :10] = 1, 2, 3
    found[:9, :10], found[:10, 10:], found[15:, 10:] = 1, 2, 3
    true[15:, 10:] = 4
    value = run(Scenes([sample(true, [0, 1, 2, 3], found, [0, 2, 1])]), tasks=("panoptic",))
    want = np.zeros((K + 1, K + 1), int)
    want[0, 0] = want[1, 2] = want[2, K] = want[K, 1] = 1
    assert value["confusion"] == want.tolist()
    assert (value["matched"], value["instances"]) == (2, 3)
    assert value["class_accuracy"] == 0.5
    assert value["dice"] == pytest.approx((2 * 90 / 190 + 1) / 2)
    assert value["classes"][0]["pq"] == pytest.approx(0.9)
    assert [(r["tp"], r["fp"], r["fn"]) for r in value["classes"]] == [
        (1, 0, 0),
        (0, 1, 1),
        (0, 1, 1),
        (0, 0, 1),
        (0, 0, 0),
    ]
    assert value["things"]["pq"] == pytest.approx(0.3)
    assert value["stuff"]["pq"] == 0.0
    assert value["classes"][4]["pq"] is None


def test_all_void_truth():
    void = np.zeros((16, 16), int)
    value = run(Scenes([sample(void, [], void + 1, [0]), sample(void, [], void, [])]))
    assert value["images"] == 2
    for name in (
        "pq",
        "sq",
        "rq",
        "ap",
        "ap50",
        "miou",
        "pixel_accuracy",
        "class_accuracy",
        "dice",
    ):
        assert value[name] is None, name
    assert np.sum(value["confusion"]) == 0
    json.dumps(value, allow_nan=False)


def test_nothing_found():
    ones = np.ones((16, 16), int)
    value = run(Scenes([sample(ones, [1], 0 * ones, [])]))
    assert value["pq"] == 0.0
    assert value["ap"] == 0.0
    assert value["confusion"][1][K] == 1
    assert value["class_accuracy"] is None


def test_stuff_in_pieces_is_one_segment():
    true = np.repeat([[1] * 6 + [2] * 4 + [3] * 6], 16, 0)
    value = run(Scenes([sample(true, [3, 0, 3], true, [3, 0, 3])]))
    assert [(r["tp"], r["fn"]) for r in value["classes"]][3] == (1, 0)
    assert value["pq"] == 1.0


def test_results_at_the_size_of_the_masks_and_without_padding():
    """Masks of twice the input's size; images of two sizes in one batch."""
    scenes = random_scenes(6, seed=3)
    small = run(scenes)
    for s in scenes.samples:
        for name in ("masks", "semantic"):
            s[name] = s[name].repeat(2, -1).repeat(2, -2)
    large = run(scenes)
    assert small["pq"] > 0.2
    assert large["pq"] == pytest.approx(small["pq"], abs=0.1)


def test_result_is_independent_of_batch_limit_and_loader():
    scenes = random_scenes(7, seed=4)
    drop = {"seconds", "images_per_second"}
    values = [
        run(scenes, batch_size=1),
        run(scenes, batch_size=16),
        run(Scenes(scenes.samples * 2), limit=7),
        run(DataLoader(scenes, 3, collate_fn=list)),
        run(DataLoader(Scenes(scenes.samples * 2), 4, collate_fn=list), limit=7),
    ]
    assert values[0]["images"] == 7
    for value in values[1:]:
        assert {k: v for k, v in value.items() if k not in drop} == {
            k: v for k, v in values[0].items() if k not in drop
        }


def test_writes_json_whole_or_not_at_all(tmp_path, monkeypatch):
    scenes, out = random_scenes(2), tmp_path / "new" / "metrics.json"
    value = run(scenes, out=out)
    assert json.loads(out.read_text()) == value
    old = out.read_text()

    def broken(*args):
        raise RuntimeError("cable pulled")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(RuntimeError, match="cable pulled"):
        run(random_scenes(3), out=out)
    assert out.read_text() == old
    assert list(out.parent.iterdir()) == [out]


def test_table_lists_every_class():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(run(random_scenes(3))))
    text = console.export_text()
    for word in (*Scenes.classes, "all", "accuracy", "3 images"):
        assert word in text


def test_truth_is_a_result():
    true = np.repeat([[1] * 6 + [2] * 4 + [3] * 6], 16, 0)
    s = sample(true, [3, 0, 3, 1], true, [3, 0, 3])  # the fourth target is hidden
    result = truth(s, STUFF, Scenes.classes)
    assert [(x.id, x.label_id, x.area, x.isthing) for x in result.segments] == [
        (1, 3, 192, False),
        (2, 0, 64, True),
    ]
    assert result.name(0) == "ant"


def test_more_detections_are_asked_of_the_model(monkeypatch):
    counts = []
    monkeypatch.setattr(
        Instances, "update", lambda self, found, _: counts.append(len(found.masks))
    )
    for options in ({}, {"max_detections": 150}, {"max_detections": 150, "top_k": 7}):
        data = random_scenes(1)
        options |= {"tasks": ("instance",), "progress": False}
        evaluate(Painted(queries=50), data, **options)
    assert counts[0] < counts[1]
    assert counts[2] <= 7


def test_worst_images_are_kept_whatever_their_order():
    scenes = random_scenes(20, seed=5)
    everything = run(scenes)["worst"]
    scores = [run(Scenes([s]))["worst"][0]["score"] for s in scenes.samples]
    order = sorted(range(20), key=lambda i: (scores[i], i))
    assert [row["image"] for row in everything] == order[:WORST]
    assert [row["score"] for row in everything] == pytest.approx(sorted(scores)[:WORST])
    for i, one in enumerate(scenes.samples):
        one["id"] = f"photo {i}"
    assert run(scenes)["worst"] == everything
    for i, one in enumerate(scenes.samples):
        one["id"] = i
    loader = DataLoader(scenes, 3, sampler=range(19, -1, -1), collate_fn=list)
    assert {row["image"] for row in run(loader)["worst"]} == {*order[:WORST]}


def test_mode_stays():
    model = Painted().train()
    evaluate(model, random_scenes(1), progress=False)
    assert model.training


BAD = {
    "task": ({"tasks": ("panoptic", "cubist")}, "task must be one of .* got 'cubist'"),
    "no task": ({"tasks": ()}, "task must be one of"),
    "threshold": (
        {"threshold": math.nan},
        r"threshold must be in \[0, 1\]",
    ),
    "limit": ({"limit": 0}, "limit must be at least 1, got 0"),
    "detections": ({"max_detections": 0}, "max_detections must be at least 1, got 0"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Painted(), random_scenes(1), progress=False, **options)


def test_wrong_model_and_empty_set(tmp_path):
    with pytest.raises(ValueError, match="as many classes as the model has labels, 7, got 5"):
        evaluate(Painted(labels=7), random_scenes(1), progress=False)
    with pytest.raises(ValueError, match="the data set is empty"):
        evaluate(Painted(), Scenes([]), progress=False)
    (tmp_path / "file").write_text("")
    model = Painted()
    model.forward = None  # not called
    with pytest.raises(OSError, match=r"cannot write into folder .*file"):
        evaluate(model, random_scenes(1), progress=False, out=tmp_path / "file" / "metrics.json")
    with pytest.raises(ValueError, match="out must be a file, got the folder"):
        evaluate(model, random_scenes(1), progress=False, out=tmp_path)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    with pytest.raises(ImportError, match=r"needs pycocotools: pip install pycocotools \("):
        evaluate(Painted(), random_scenes(1), tasks=("instance",), progress=False)
