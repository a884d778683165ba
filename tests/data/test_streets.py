"""Scenes of streets, and their targets."""

import time

import numpy as np
import pytest
from torch.utils.data import DataLoader

from segkern.data import Streets, StreetsConfig, build_dataset
from segkern.evaluation.report import semantic_truth, truth
from segkern.io.overlay import colour

NAMES = ["sky", "sign", "tree", "car", "road", "pole", "pavement", "person", "building"]
VOID = 255


@pytest.fixture(scope="module")
def scenes():
    data = Streets(StreetsConfig(task="panoptic"), "val")
    return [data[i] for i in range(60)]


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
@pytest.mark.parametrize("size", [(128, 256), (32, 32), (96, 50)], ids=str)
def test_a_scene_has_what_it_promises(task, size):
    data = Streets(StreetsConfig(size=size, task=task), "val")
    for index in range(12):
        scene = data[index]
        image, masks, labels, semantic = (
            scene[name] for name in ("image", "masks", "labels", "semantic")
        )
        assert image.shape == (*size, 3)
        assert semantic.shape == masks.shape[1:] == size
        assert image.dtype == semantic.dtype == masks.dtype == np.uint8
        assert scene["pixel_values"].dtype == np.float32
        assert labels.dtype == np.int64
        assert (masks.sum((1, 2)) > 0).all()  # what is not seen is no target
        assert (masks.sum(0) == (semantic != VOID)).all()  # disjoint; void is in none
        seen = semantic != VOID
        assert (semantic[seen] == labels[masks.argmax(0)][seen]).all()
        if task == "semantic":
            assert labels.tolist() == sorted(set(labels.tolist()))
        again = (image / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        np.testing.assert_allclose(scene["pixel_values"], again.transpose(2, 0, 1), atol=1e-5)


def test_tasks_show_the_same_scenes(scenes):
    data = Streets(StreetsConfig(), "val")
    assert data.classes == NAMES
    assert [NAMES[k] for k in data.things] == ["car", "person"]
    assert sorted(data.things + data.stuff) == list(range(9))
    for index in range(5):
        one, other = data[index], scenes[index]
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["semantic"], other["semantic"])
        assert set(one["labels"].tolist()) == set(other["labels"].tolist())
        stuff = [k for k in other["labels"].tolist() if k in data.stuff]
        assert len(stuff) == len(set(stuff))  # one mask each
    cars = [(scene["labels"] == NAMES.index("car")).sum() for scene in scenes]
    assert max(cars) > 3  # each has a mask of its own


def test_every_class_occurs_and_void_is_the_bonnet(scenes):
    counts = np.sum([np.bincount(s["semantic"].ravel(), minlength=256) for s in scenes], 0)
    shares = counts / counts.sum()
    assert (shares[:9] > 1e-3).all()
    assert counts[9:255].sum() == 0
    assert (shares[[1, 5, 7]] < 0.02).all()  # signs, poles and people are small
    void = np.array([(s["semantic"] == VOID).any() for s in scenes])
    assert 0.3 < void.mean() < 0.7
    for scene in scenes:
        assert not (scene["semantic"][: 128 // 2] == VOID).any()


def test_places_tell_classes_that_colours_do_not(scenes):
    """Sky above, road below; but pavement and buildings are as grey as each other."""
    rows = {k: [] for k in range(9)}
    grey = {k: [] for k in range(9)}
    for scene in scenes:
        for k in np.unique(scene["semantic"][scene["semantic"] != VOID]):
            mask = scene["semantic"] == k
            rows[k].append(np.nonzero(mask)[0].mean())
            grey[k].append(scene["image"][mask].mean())
    rows, grey, spread = (
        {NAMES[k]: f(x) for k, x in values.items()}
        for values, f in ((rows, np.mean), (grey, np.mean), (grey, np.std))
    )
    assert rows["sky"] < rows["building"] < rows["car"] < rows["road"]
    for a, b in (("pavement", "building"), ("road", "car"), ("person", "building")):
        assert abs(grey[a] - grey[b]) < 2 * (spread[a] + spread[b])


def test_a_scene_depends_on_seed_split_and_index_only():
    settings = StreetsConfig(size=(64, 96))
    first, second = (Streets(settings, "train") for _ in range(2))
    for index in (5, 3, 99_999):
        second[index + 1 - 2 * (index > 9)]
        for a, b in zip(first[index].values(), second[index].values()):
            np.testing.assert_array_equal(a, b)
    others = [
        Streets(StreetsConfig(size=(64, 96), seed=1), "train")[5],
        Streets(settings, "val")[5],
        Streets(settings, "test")[5],
        first[6],
    ]
    images = [first[5]["image"], *(s["image"] for s in others)]
    assert len({x.tobytes() for x in images}) == 5
    loader = DataLoader(first, sampler=[5, 3], num_workers=1, collate_fn=lambda x: x[0])
    for index, scene in zip((5, 3), loader):  # in another process
        np.testing.assert_array_equal(scene["image"], first[index]["image"])
        np.testing.assert_array_equal(scene["masks"], first[index]["masks"])


def test_truth_covers_all_but_void(scenes):
    data = Streets(StreetsConfig(task="panoptic"), "val")
    for scene in scenes[:4]:
        seen = int((scene["semantic"] != VOID).sum())
        for result in (
            truth(scene, data.stuff, data.classes),
            semantic_truth(scene, data.classes),
        ):
            assert sum(s.area for s in result.segments) == seen


@pytest.mark.parametrize(
    ("name", "channel"), [("sky", 2), ("tree", 1), ("car", 0)], ids=["sky", "tree", "car"]
)
def test_drawings_have_telling_colours(name, channel):
    """The order of the labels gives the sky blue, trees green and cars red."""
    assert np.argmax(colour(NAMES.index(name))) == channel


@pytest.mark.slow
def test_a_scene_is_drawn_fast():
    data = Streets(StreetsConfig(), "train")
    data[0]
    took = []
    for index in range(60):
        start = time.process_time()
        data[index]
        took.append(time.process_time() - start)
    assert np.median(took) < 20e-3  # 5 to 6 ms where nothing else runs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "instance"}, "task must be one of panoptic, semantic, got 'instance'"),
        ({"size": (64, 16)}, r"size must be a height and width >= 32, got \(64, 16\)"),
        ({"size": (64,)}, r"size must be a height and width >= 32, got \(64,\)"),
        ({"scenes": 0}, "scenes must be >= 1"),
        ({"seed": -1}, "seed >= 0"),
    ],
    ids=["task", "small", "one-side", "scenes", "seed"],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        StreetsConfig(**settings)


def test_bad_split_and_index():
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'all'"):
        Streets(StreetsConfig(), "all")
    with pytest.raises(IndexError, match=r"index must be in \[0, 5\), got 5"):
        Streets(StreetsConfig(scenes=5))[5]


def test_it_is_a_format():
    data = build_dataset(StreetsConfig(size=(32, 64), scenes=3), "train")
    assert isinstance(data, Streets)
    assert len(data) == 3
    assert len(build_dataset(StreetsConfig(), "test")) > 10**6
