"""Scenes of digits, their targets, and batches made of them."""

import time

import numpy as np
import pytest
import torch

from segkern.data import Digits, DigitsConfig, Order, build_dataset, collate
from segkern.data.digits import digit_images
from segkern.evaluation.report import truth
from segkern.models import Mask2FormerConfig


def sample(**changes):
    """A sample of two targets on 32 x 48 pixels."""
    base = {
        "pixel_values": torch.zeros(3, 32, 48),
        "masks": torch.ones(2, 32, 48, dtype=torch.uint8),
        "labels": torch.tensor([1, 3]),
        "id": 7,
    }
    return base | changes


@pytest.mark.parametrize("level", ["easy", "hard", "mixed"])
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (96, 160)], ids=str)
def test_a_scene_has_what_it_promises(level, size):
    data = Digits(DigitsConfig(size=size, level=level), "val")
    for index in range(40):
        scene = data[index]
        masks, labels = scene["masks"], scene["labels"]
        assert scene["image"].shape == (*size, 3)
        assert scene["image"].dtype == scene["semantic"].dtype == masks.dtype == np.uint8
        assert scene["pixel_values"].dtype == np.float32
        assert labels.dtype == np.int64
        assert 1 <= len(labels) - 1 <= 4
        assert labels[-1] == 10
        assert (masks.sum(0) == 1).all()  # visible parts are disjoint and leave no void
        assert (masks.sum((1, 2)) > 0).all()
        assert (scene["semantic"] == labels[masks.argmax(0)]).all()
        again = (scene["image"] / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        np.testing.assert_allclose(scene["pixel_values"], again.transpose(2, 0, 1), atol=1e-5)


def boxes_touch(masks):
    boxes = [(*np.argwhere(m).min(0), *np.argwhere(m).max(0) + 1) for m in masks]
    return any(
        a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )


def test_easy_digits_are_apart_and_hard_ones_overlap():
    easy, hard = (Digits(DigitsConfig(level=x), "test") for x in ("easy", "hard"))
    assert not any(boxes_touch(easy[i]["masks"][:-1]) for i in range(200))
    touching = [boxes_touch(hard[i]["masks"][:-1]) for i in range(200)]
    assert np.mean(touching) > 0.95  # of what is visible
    counts = np.bincount([len(easy[i]["labels"]) - 1 for i in range(200)], minlength=5)
    assert (counts[1:] > 20).all()


def test_mixed_is_half_of_each():
    mixed = Digits(DigitsConfig(level="mixed"), "train")
    touching = np.mean([boxes_touch(mixed[i]["masks"][:-1]) for i in range(400)])
    assert 0.4 < touching < 0.6


def test_a_scene_depends_on_seed_split_and_index_only():
    first, second = (Digits(DigitsConfig(), "train") for _ in range(2))
    for index in (5, 3, 99_999):
        second[index + 1 - 2 * (index > 9)]
        for a, b in zip(first[index].values(), second[index].values()):
            np.testing.assert_array_equal(a, b)
    others = [
        Digits(DigitsConfig(seed=1), "train")[5],
        Digits(DigitsConfig(), "val")[5],
        Digits(DigitsConfig(), "test")[5],
        first[6],
    ]
    images = [first[5]["image"], *(s["image"] for s in others)]
    assert len({x.tobytes() for x in images}) == 5


def test_splits_share_no_digit_image():
    splits = [{p.tobytes() for p in digit_images(s)[0]} for s in ("train", "val", "test")]
    assert sum(map(len, splits)) == 1797  # all of them, each once
    assert len(set.union(*splits)) == 1797
    for split in ("train", "val", "test"):
        assert set(digit_images(split)[1]) == set(range(10))


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_targets_of_the_other_tasks(task):
    scene = Digits(DigitsConfig(level="hard", task=task), "train")
    panoptic = Digits(DigitsConfig(level="hard"), "train")
    for index in range(20):
        got, full = scene[index], panoptic[index]
        if task == "instance":
            np.testing.assert_array_equal(got["masks"], full["masks"][:-1])
            np.testing.assert_array_equal(got["labels"], full["labels"][:-1])
        else:
            assert got["labels"].tolist() == sorted(set(full["labels"].tolist()))
            for label, mask in zip(got["labels"], got["masks"]):
                np.testing.assert_array_equal(mask, full["semantic"] == label)
    assert len(scene.classes) == (10 if task == "instance" else 11)
    assert scene.stuff == (() if task == "instance" else (10,))


def test_truth_of_a_scene_covers_every_pixel():
    data = Digits(DigitsConfig(level="hard"), "test")
    result = truth(data[0], data.stuff, data.classes)
    assert sum(s.area for s in result.segments) == 64 * 64
    assert result.segments[-1].label_id == 10
    assert not result.segments[-1].isthing


@pytest.mark.slow
def test_a_scene_is_drawn_fast():
    data = Digits(DigitsConfig(level="mixed"), "train")
    data[0]
    took = []
    for index in range(100):
        start = time.process_time()
        data[index]
        took.append(time.process_time() - start)
    assert np.median(took) < 4e-3  # 0.4 ms where nothing else runs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": "mild"}, "level must be one of easy, hard, mixed, got 'mild'"),
        ({"task": "depth"}, "task must be one of"),
        ({"size": (64, 16)}, r"size must be a height and width >= 32, got \(64, 16\)"),
        ({"scenes": 0}, "scenes must be >= 1"),
        ({"seed": -1}, "seed >= 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DigitsConfig(**settings)


def test_bad_split_index_and_config():
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'all'"):
        Digits(DigitsConfig(), "all")
    with pytest.raises(IndexError, match=r"index must be in \[0, 5\), got 5"):
        Digits(DigitsConfig(scenes=5))[5]
    with pytest.raises(TypeError, match=r"one of digits, folder, .*, got Mask2FormerConfig"):
        build_dataset(Mask2FormerConfig(), "train")


def test_collate_pads_to_the_largest_and_to_the_divisor():
    wide = sample()
    tall = sample(
        pixel_values=torch.ones(3, 40, 20),
        masks=torch.ones(3, 40, 20, dtype=torch.uint8),
        labels=torch.tensor([0, 0, 9]),
        id=9,
    )
    batch = collate([wide, tall], num_labels=10, divisor=32)
    assert batch.pixel_values.shape == (2, 3, 64, 64)
    assert batch.pixel_values[1, :, :40, :20].eq(1).all()
    assert batch.pixel_values[1].sum() == 3 * 40 * 20
    assert batch.targets.count.tolist() == [2, 3]
    assert batch.targets.ids.tolist() == [7, 9]
    assert batch.targets.labels[1, :3].tolist() == [0, 0, 9]
    assert batch.targets.masks[1, :3].sum() == 3 * 40 * 20
    assert batch.targets.masks[0, 2:].sum() == 0


def test_collate_takes_images_without_objects():
    empty = sample(masks=torch.zeros(0, 32, 48, dtype=torch.uint8), labels=torch.zeros(0).long())
    batch = collate([empty, sample()], num_labels=4)
    assert batch.targets.count.tolist() == [0, 2]
    assert collate([empty], num_labels=4).targets.count.tolist() == [0]


def spoilt():
    x = torch.zeros(3, 32, 48)
    x[1, 2, 3] = float("nan")
    return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": spoilt()}, "pixels of sample 7 must be finite, got NaN"),
        ({"labels": torch.tensor([1, 4])}, r"in \[0, 4\), got 4 .*are samples \[5, 7\]"),
        ({"labels": torch.tensor([-1, 3])}, r"in \[0, 4\), got -1"),
        ({"labels": torch.tensor([1])}, "one label for each of its 2 masks"),
        ({"labels": torch.tensor([1.0, 2.0])}, "labels of image 1 must be integers"),
        (
            {"masks": torch.ones(2, 48, 32, dtype=torch.uint8)},
            r"masks of sample 7 must be \[n, 32, 48\], the size of its image, got \[2, 48, 32\]",
        ),
    ],
    ids=["nan", "label-high", "label-low", "number", "dtype", "mask-size"],
)
def test_collate_names_a_bad_sample(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        collate([sample(id=5), sample(**changes)], num_labels=4)


def test_order_is_a_function_of_seed_and_step():
    whole = list(Order(10, 4, seed=3, start=0, stop=10))
    assert list(Order(10, 4, seed=3, start=6, stop=10)) == whole[6:]
    assert list(Order(10, 4, seed=4, start=0, stop=10)) != whole
    flat = [i for batch in whole for i in batch]
    for epoch in range(4):
        assert sorted(flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]
    with pytest.raises(ValueError, match="data set is empty"):
        Order(0, 4, seed=3, start=0, stop=1)
