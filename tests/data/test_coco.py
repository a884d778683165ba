"""COCO sets against pycocotools, every field; layouts of folders; flat arrays."""

import json
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from segkern.data import CocoConfig, Order, ReadConfig, ViewConfig, build_dataset, collate
from segkern.models import Mask2FormerConfig
from support.pictures import (
    CATEGORIES,
    SEGMENTS,
    image_rows,
    instance_rows,
    noise,
    panoptic_values,
    write_coco,
    write_panoptic,
)

ALL = ReadConfig(val_share=0)  # where there is no val split, train has all


@pytest.fixture(autouse=True)
def _quiet():
    """What is sound gives no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_instances_are_those_of_pycocotools(tmp_path):
    path = write_coco(tmp_path)
    data = build_dataset(CocoConfig(tmp_path, read=ALL), "train")
    truth = COCO(str(path))
    assert (len(data), data.faults, data.passes) == (3, [], False)
    assert data.classes == ["box", "ring", "ground"]  # things before stuff, then by id
    assert (data.things, data.stuff) == ((0, 1), (2,))
    labels = {3: 0, 90: 1, 0: 2}
    for i, key in enumerate((7, 9, 11)):
        rows = truth.loadAnns(truth.getAnnIds(imgIds=key))
        sample = data[i]
        assert np.array_equal(sample["image"], noise(i))
        assert sample["labels"].tolist() == [labels[row["category_id"]] for row in rows]
        assert sample["labels"].dtype == np.int64
        assert sample["crowd"].tolist() == [bool(row["iscrowd"]) for row in rows]
        masks = np.array([truth.annToMask(row) for row in rows]).reshape(-1, 30, 40)
        assert np.array_equal(np.asarray(sample["masks"]), masks)
        assert sample["id"] == i
        assert sample["path"] == str(tmp_path / "train2017" / data.paths[i].name)
        assert "semantic" not in sample


def test_panoptic(tmp_path):
    write_panoptic(tmp_path)
    data = build_dataset(CocoConfig(tmp_path, "panoptic", read=ALL), "train")
    sample, values = data[0], panoptic_values()
    assert sample["labels"].tolist() == [2, 0, 0, 1]
    assert sample["crowd"].tolist() == [False, False, False, True]
    assert np.array_equal(np.asarray(sample["masks"]), [values == s["id"] for s in SEGMENTS])
    assert len(sample["masks"].maps) == 1
    semantic = np.full(values.shape, 255)
    for segment, label in zip(SEGMENTS, sample["labels"]):
        semantic[values == segment["id"]] = label
    assert np.array_equal(sample["semantic"], semantic)
    assert sample["semantic"].dtype == np.uint8


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_panoptic_pngs_of_one_channel_hold_the_ids(mode, tmp_path):
    top = 200 if mode == "L" else 60_000
    values = np.where(panoptic_values() > 0, top, 0)
    path = write_panoptic(tmp_path, [SEGMENTS[0] | {"id": top}], values)
    grey = values.astype(np.uint8 if mode == "L" else np.uint16)
    Image.fromarray(grey).save(path.with_suffix("") / "a.png")
    sample = build_dataset(CocoConfig(tmp_path, "panoptic", read=ALL), "train")[0]
    assert np.array_equal(np.asarray(sample["masks"])[0], values > 0)


LAYOUTS = {  # annotation files and pictures of train and val
    "coco": ("annotations/instances_{}2017.json", "{}2017", ("train", "val")),
    "images": ("annotations/instances_{}.json", "images/{}2017", ("train", "val")),
    "beside": ("{}/_annotations.coco.json", "{}", ("train", "valid")),
    "root": ("{}.json", "images", ("train", "val")),
    "folders": ("{}/labels.json", "{}/data", ("train", "validation")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    file, pictures, splits = LAYOUTS[layout]
    for split in splits:
        write_coco(tmp_path, name=split, file=file, folder=pictures)
    for split in ("train", "val"):
        data = build_dataset(CocoConfig(tmp_path), split)
        assert [len(data[i]["labels"]) for i in range(3)] == [4, 1, 0]


def test_one_file_alone_is_split_by_names(tmp_path):
    names = [(i, f"{i}.png") for i in range(30)]
    one = instance_rows()[:1]
    write_coco(tmp_path, one, image_rows(names), file="all.json", folder="images")
    with pytest.warns(UserWarning, match="all.json: has no val split, so 3 of its 30 pictures"):
        train = build_dataset(CocoConfig(tmp_path), "train")
    val = build_dataset(CocoConfig(tmp_path), "val")
    assert (len(train), len(val)) == (27, 3)
    assert not set(train.paths) & set(val.paths)


def test_both_splits_have_the_table_of_training(tmp_path):
    write_coco(tmp_path)
    rows = [row for row in instance_rows() if row["category_id"] == 90]
    write_coco(tmp_path, rows, categories=CATEGORIES[:1], name="val")
    train, val = (build_dataset(CocoConfig(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes
    assert val[0]["labels"].tolist() == [1, 1, 1]


def test_val_alone_is_enough_to_evaluate(tmp_path):
    write_coco(tmp_path, name="val")
    data = build_dataset(CocoConfig(tmp_path), "val")
    assert (len(data), data.classes) == (3, ["box", "ring", "ground"])
    with pytest.raises(ValueError, match="annotation file of the train split, found none"):
        build_dataset(CocoConfig(tmp_path), "train")


def test_annotations_lie_in_flat_arrays(tmp_path):
    """A pickled set, as a worker gets it, is its arrays: no object an annotation or a picture."""
    sizes = []
    for count in (1, 400):
        rows = [annotation for k in range(count) for annotation in instance_rows()]
        rows = [row | {"id": i} for i, row in enumerate(rows)]
        write_coco(tmp_path, rows)
        data = build_dataset(CocoConfig(tmp_path, read=ALL), "train")
        arrays = [x for x in vars(data.truth).values() if isinstance(x, np.ndarray)]
        arrays += [data.paths.names, data.sizes]
        total = sum(x.nbytes for x in arrays)
        assert total / len(rows) < (150 if count > 1 else 200)
        sizes.append(len(pickle.dumps(data)) - total)
    assert abs(sizes[1] - sizes[0]) < 200


def test_views_become_batches(tmp_path):
    write_panoptic(tmp_path)
    model = Mask2FormerConfig.tiny(3)
    config = CocoConfig(tmp_path, "panoptic", read=ALL, views=ViewConfig((32, 64), (1.0, 1.0)))
    data = build_dataset(config, "train", model)
    (first,) = Order(len(data), 2, 0, 0, 1, data.passes)
    batch = collate([data[place] for place in first], 3)
    assert batch.pixel_values.shape == (2, 3, 32, 64)
    assert batch.targets.masks.shape == (2, 4, 32, 64)
    assert batch.targets.count.tolist() == [3, 3]  # without the crowd
    assert batch.targets.semantic.shape == (2, 32, 64)


def test_settings_come_back_from_plain_ones(tmp_path):
    from dataclasses import asdict

    from segkern.data import data_config

    config = CocoConfig(tmp_path, "panoptic", read=ALL, views=ViewConfig(short_sides=(3, 4)))
    assert data_config({"kind": "coco", **asdict(config)}) == config
    assert json.dumps(asdict(config.views))


@pytest.mark.filterwarnings("ignore:.*held out")
@pytest.mark.parametrize("stuff", [11, 10])
def test_the_panoptic_table_of_cityscapes_keeps_its_order(stuff, tmp_path):
    """11 of 19 classes, the first, are stuff there; of any other table things come first."""
    ids = [0, 3, *range(7, 16), *range(83, 91)]
    rows = [{"id": i, "name": f"c{i}", "isthing": int(k >= stuff)} for k, i in enumerate(ids)]
    write_panoptic(tmp_path, categories=rows)
    data = build_dataset(CocoConfig(tmp_path, "panoptic"), "train")
    order = ids if stuff == 11 else [*ids[10:], *ids[:10]]
    assert data.classes == [f"c{i}" for i in order]
    assert data.stuff == (tuple(range(11)) if stuff == 11 else tuple(range(9, 19)))
