"""Samples of three tasks made of panoptic ones, and which of them is drawn."""

from collections import Counter

import numpy as np
import pytest
import torch

from segkern.data import Digits, DigitsConfig, IdMaps, JointTasks, Order, collate
from segkern.data.joint_tasks import of_task
from segkern.structures.targets import TASKS, Targets

# two dogs (0), a cat (1), two parts of the sky (3), a crowd of cats
MAP = np.array([[1, 1, 2, 2, 6], [3, 3, 0, 4, 6], [5, 5, 0, 4, 6]])
LABELS = np.array([0, 0, 1, 3, 3, 1])
CROWD = np.array([False] * 5 + [True])


def dense():
    return (np.arange(1, 7)[:, None, None] == MAP).astype(np.uint8)


FORMS = {
    "maps of ids": lambda: IdMaps.of_map(MAP, range(1, 7)),
    "several maps": lambda: IdMaps(
        np.stack([np.where(np.isin(MAP, ids), MAP, 0) for ids in ([1, 3, 5], [2, 4, 6])]).astype(
            np.uint8
        ),
        np.arange(6) % 2,
    ),
    "arrays": dense,
    "tensors": lambda: torch.from_numpy(dense()),
}


def sample(form):
    masks = FORMS[form]()
    return {"masks": masks, "labels": LABELS, "crowd": CROWD, "id": 7}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("task", "labels", "parts"),
    [
        ("panoptic", [0, 0, 1, 3, 3, 1], [[1], [2], [3], [4], [5], [6]]),
        ("instance", [0, 0, 1, 1], [[1], [2], [3], [6]]),
        ("semantic", [0, 1, 1, 3], [[1, 2], [3], [6], [4, 5]]),
    ],
)
def test_segments_are_those_of_the_task(form, task, labels, parts):
    found = of_task(sample(form), task, (3,))
    assert found["task"] == TASKS.index(task)
    assert np.asarray(found["labels"]).tolist() == labels
    assert found["crowd"].tolist() == [ids == [6] for ids in parts]
    want = np.stack([np.isin(MAP, ids) for ids in parts])
    assert np.array_equal(np.asarray(found["masks"]), want)


def test_labels_that_doubled_do_not_fit_their_dtype_stay_what_they_are():
    labels = np.array([0, 0, 1, 200, 200, 1], np.uint8)
    found = of_task(sample("arrays") | {"labels": labels}, "semantic", ())
    assert found["labels"].tolist() == [0, 1, 1, 200]


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_without_segments_stays_one(task):
    empty = {"masks": IdMaps.of_map(np.zeros((2, 3), int), []), "labels": np.zeros(0, np.int64)}
    found = of_task(empty, task, (3,))
    assert len(found["masks"]) == len(found["labels"]) == 0


def test_tasks_are_drawn_evenly_by_seed_pass_and_sample():
    scenes = Digits(DigitsConfig(size=(32, 32), scenes=40))
    data = JointTasks(scenes, (10,), seed=3)
    places = [(i, epoch) for epoch in range(3) for i in range(40)]
    drawn = [data[place]["task"] for place in places]
    assert min(Counter(drawn).values()) > 25
    assert drawn[:40] != drawn[40:80]
    assert [x["task"] for x in data.__getitems__(places[:9])] == drawn[:9]
    assert [JointTasks(scenes, (10,), 3)[place]["task"] for place in places[:9]] == drawn[:9]
    assert [JointTasks(scenes, (10,), 4)[place]["task"] for place in places[:40]] != drawn[:40]


def test_tasks_are_drawn_by_their_shares():
    scenes = Digits(DigitsConfig(size=(32, 32), scenes=40))
    data = JointTasks(scenes, (10,), 3, shares=(1, 3, 0))
    drawn = Counter(data[i, epoch]["task"] for epoch in range(5) for i in range(40))
    assert set(drawn) == {0, 1}
    assert 125 < drawn[1] < 175


def test_a_batch_names_the_task_of_each_image():
    data = JointTasks(Digits(DigitsConfig(size=(32, 32), scenes=40)), (10,), seed=0)
    assert data.passes
    (places,) = Order(len(data), 12, 0, 0, 1, data.passes)
    batch = collate([data[place] for place in places])
    tasks = batch.targets.task
    assert set(tasks.tolist()) == {0, 1, 2}
    for labels, count, task in zip(batch.targets.labels, batch.targets.count, tasks):
        found = labels[:count].tolist()
        assert (10 in found) == (TASKS[task] != "instance")
        if TASKS[task] == "semantic":
            assert len(set(found)) == len(found)
    alone = collate([Digits(DigitsConfig())[0]]).targets
    assert alone.task is None
    assert isinstance(batch.targets.to("cpu"), Targets)
