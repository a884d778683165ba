"""Shards: the samples of the set that they are made of, in an order that seed and pass decide."""

import json
from dataclasses import asdict, replace
from itertools import chain, pairwise

import datasets
import numpy as np
import pytest
import webdataset
from PIL import Image
from pycocotools import mask as coco
from torch.utils.data import DataLoader

from segkern.cli.train import _recipe_for
from segkern.data import (
    ClassMapsConfig,
    CocoConfig,
    FolderConfig,
    InstanceViews,
    JointTasks,
    Order,
    Shards,
    ShardsConfig,
    ViewConfig,
    build_dataset,
    data_config,
    find_format,
)
from segkern.data.coco import read_coco
from segkern.recipes import mask2former, segformer, segmenter, unet
from support.shards import FORMATS, members, shards_of, write_ade20k, write_cityscapes
from support.shards import write_numbered as numbered

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
N = 24  # pictures, of which a shard has a few


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Shards of N numbered pictures."""
    root = tmp_path_factory.mktemp("numbered")
    config = shards_of(numbered(root / "set", N), root / "shards")
    data = build_dataset(config, "train")
    assert len({shard.samples for shard in data.shards}) > 1  # also the last is one
    assert len(data.shards) > 4
    return config


def same(ours, theirs):
    """Two samples hold the same."""
    for name in ("image", "labels", "crowd", "semantic"):
        assert (name in ours) == (name in theirs), name
        if name in ours:
            assert np.array_equal(ours[name], theirs[name]), name
            assert ours[name].dtype == theirs[name].dtype, name
    assert np.array_equal(np.asarray(ours["masks"]), np.asarray(theirs["masks"]))


@pytest.mark.parametrize("case", FORMATS)
def test_samples_are_those_of_the_set(case, tmp_path):
    source = FORMATS[case](tmp_path / "set")
    config = shards_of(source, tmp_path / "shards", size=1)
    if isinstance(source, FolderConfig):
        source = ClassMapsConfig(source.root)
    assert (config.kind, config.task) == ("shards", source.task)
    assert (config.targets, config.views) == (source.targets, source.views)
    assert data_config({"kind": "shards", **asdict(config)}) == config  # as a run stores it
    for split in ("train", "val"):
        data, wanted = build_dataset(config, split), build_dataset(source, split)
        assert (data.classes, data.stuff) == (wanted.classes, wanted.stuff)
        assert (data.things, data.semantic) == (wanted.things, wanted.semantic)
        assert len(data) == len(wanted) == len(data.shards)  # of a byte at most: one sample each
        assert any(len(data[i]["labels"]) for i in range(len(data)))
        for i in range(len(wanted)):
            same(data[i], wanted[i])
            path = wanted.paths[i]
            if path.suffix != ".json":
                held = members(tmp_path / "shards" / data.shards[i].file)[0]
                assert held[0].name.endswith(path.suffix)
                assert held[1] == path.read_bytes()


@pytest.mark.parametrize("task", ["instance", "semantic"])
@pytest.mark.parametrize("make", [write_ade20k, write_cityscapes])
def test_panoptic_shards_hold_the_other_tasks(make, task, tmp_path):
    """Samples are those of the set's own task, for which the challenges have other files."""
    source = replace(make(tmp_path / "set"), task="panoptic")
    config = replace(shards_of(source, tmp_path / "shards"), task=task)
    data = build_dataset(config, "train")
    wanted = build_dataset(replace(source, task=task), "train")
    assert (data.classes, data.stuff, data.things) == (wanted.classes, wanted.stuff, wanted.things)
    same(data[0], wanted[0])


def test_views_are_those_of_the_files(few):
    """A view depends on seed, picture and pass, wherever the picture comes from."""
    views = InstanceViews(ViewConfig((16, 16)), (0.5,) * 3, (0.5,) * 3)
    source = CocoConfig(few.root.removesuffix("shards") + "set", "panoptic")
    ours, theirs = Shards(few, "train", views), read_coco(source, "train", views)
    places = [(3, 0), (3, 1), (7, 0)]
    for a, b in zip(ours.__getitems__(places), theirs.__getitems__(places)):
        assert np.array_equal(a["pixel_values"], b["pixel_values"])
        assert np.array_equal(a["semantic"], b["semantic"])
        assert np.array_equal(np.asarray(a["masks"]), np.asarray(b["masks"]))


def ids(samples):
    return [sample["id"] for sample in samples]


def steps(data, start, stop, rank, ranks, workers):
    """Ids of the samples of each step, as a loader of a rank gives them."""
    order = Order(len(data), 6, 3, start, stop, False, rank, ranks, data.shuffled)
    loader = DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=ids)
    return list(loader)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_sample_once_a_pass(few, ranks, workers):
    """On each rank a run that stops after step 3 and goes on in the middle of the pass."""
    data = replace_buffer(few, 7)
    parts = [
        steps(data, 0, 3, rank, ranks, workers) + steps(data, 3, 8, rank, ranks, workers)
        for rank in range(ranks)
    ]
    whole = [[*chain(*part)] for part in zip(*parts)]
    assert [len(step) for step in whole] == [6] * 8
    for a, b in ((0, 4), (4, 8)):
        assert sorted(chain(*whole[a:b])) == list(range(N))
    assert whole == steps(data, 0, 8, 0, 1, 0)  # of whatever ranks, loaders and stops


def replace_buffer(config, buffer):
    return build_dataset(replace(config, buffer=buffer), "train")


@pytest.mark.parametrize("buffer", [1, 5, 7, N, 10_000])
def test_the_order(few, buffer):
    """One permutation a pass, of blocks that lie in few shards."""
    data, again = replace_buffer(few, buffer), replace_buffer(few, buffer)
    passes = {
        (seed, epoch): [data.shuffled(seed, epoch, i) for i in range(N)]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(order) for order in passes.values()}) == 4
    for (seed, epoch), order in passes.items():
        assert sorted(order) == list(range(N))
        # asked for in any order, as by ranks and after a stop
        assert [again.shuffled(seed, epoch, i) for i in range(N)[::-1]] == order[::-1]
    where = {i: k for k, (a, b) in enumerate(pairwise(data.first)) for i in range(a, b)}
    least = min(shard.samples for shard in data.shards[:-1])
    for first in range(0, N, buffer):
        shards = {where[i] for i in passes[0, 0][first : first + buffer]}
        assert len(shards) <= min(buffer // least + 3, len(data.shards))
    if buffer == 10_000:
        assert [where[i] for i in passes[0, 0]] != sorted(where[i] for i in passes[0, 0])


def test_blocks_have_orders_of_their_own(few, tmp_path):
    source = CocoConfig(few.root.removesuffix("shards") + "set", "panoptic")
    one = replace(shards_of(source, tmp_path, size=10**6), buffer=8)  # all in one shard
    data = build_dataset(one, "train")
    order = np.array([data.shuffled(0, 0, i) for i in range(N)]).reshape(3, 8)
    assert {row.min() for row in order} == {0, 8, 16}
    assert len({tuple(row - row.min()) for row in order}) == 3


def test_the_order_of_joint_tasks_is_that_of_the_shards(few):
    data = replace_buffer(few, 7)
    joint = JointTasks(data, data.stuff, 0)
    assert joint.shuffled(0, 1, 2) == data.shuffled(0, 1, 2)
    assert joint.most_unread == data.most_unread == 0.5


def test_recipes_find_them(few, tmp_path):
    run = mask2former(few.root, preset="tiny")
    assert (run.data.kind, run.data.task, run.model.num_labels) == ("shards", "panoptic", 2)
    assert run.model.id2label == {0: "box", 1: "ground"}
    assert run.model.stuff == (1,)
    assert type(run).from_dict(run.to_dict()).data == run.data
    assert mask2former(few.root, task="instance", preset="tiny").model.num_labels == 1
    assert unet(few.root, preset="tiny").data.kind == "shards"


@pytest.mark.parametrize("recipe", [segmenter, segformer])
def test_models_of_pixels_take_shards_of_maps(recipe, few, tmp_path):
    root = shards_of(FORMATS["class maps"](tmp_path / "set"), tmp_path / "shards").root
    assert _recipe_for(root, False, None) == "segmenter"  # as for the folder of maps
    assert _recipe_for(few.root, False, None) == "mask2former"
    run = recipe(dataset="plain", pretrained=False, root=root)
    assert (run.data.kind, run.data.task, run.model.num_labels) == ("shards", "semantic", 3)
    assert run.model.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}
    sample = build_dataset(run.data, "train", run.model)[0, 1]
    assert sample["semantic"].shape == run.model.input.crop == sample["pixel_values"].shape[1:]
    assert recipe(dataset="plain", pretrained=False, root=few.root).model.num_labels == 2
    alone = shards_of(FORMATS["coco"](tmp_path / "other"), tmp_path / "instances").root
    with pytest.raises(ValueError, match="must hold maps of classes, got shards of the instance"):
        recipe(dataset="plain", pretrained=False, root=alone)


def test_settings_that_do_not_fit(few, tmp_path):
    for changes, message in (
        ({"buffer": 0}, "buffer must be at least 1, got 0"),
        ({"task": "depth"}, "task must be panoptic, instance or semantic, got 'depth'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(few, **changes)
    with pytest.raises(ValueError, match="split must be train or val, got 'test'"):
        build_dataset(few, "test")
    channels = replace(few, read=replace(few.read, channels=5))
    with pytest.raises(ValueError, match=r"read.channels must be 3, .* got 5"):
        Shards(channels)
    alone = shards_of(FORMATS["coco"](tmp_path / "set"), tmp_path / "shards")
    with pytest.raises(ValueError, match="task must be instance, as shards of the instance task"):
        build_dataset(replace(alone, task="panoptic"), "train")


def test_webdataset_reads_them(few):
    """With its own decoders of PNG and JSON."""
    data = build_dataset(few, "train")
    paths = [f"{few.root}/{shard.file}" for shard in data.shards]
    found = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8"))
    assert [row["__key__"] for row in found] == [f"{i:09}" for i in range(N)]
    for i in (0, 5, N - 1):
        row, sample = found[i], data[i]
        assert np.array_equal(row["png"], sample["image"])
        assert np.array_equal(row["seg.png"][..., 0], sample["semantic"])
        check_json(row["json"], sample)


def check_json(content, sample):
    rows = content["annotations"]
    codes = [dict(row["segmentation"]) for row in rows]
    assert np.array_equal(np.stack([coco.decode(code) for code in codes]), sample["masks"])
    assert [row["category_id"] for row in rows] == sample["labels"].tolist()
    assert [row["area"] for row in rows] == sample["masks"].areas().tolist()
    assert [row["bbox"] for row in rows] == [coco.toBbox(code).tolist() for code in codes]
    assert (content["height"], content["width"]) == sample["image"].shape[:2]


@pytest.mark.slow
def test_datasets_reads_them(few, tmp_path):
    """Hugging Face's library, as a stream."""
    data = build_dataset(few, "train")
    stream = datasets.load_dataset(
        "webdataset",
        data_files={"train": f"{few.root}/train-*.tar"},
        split="train",
        streaming=True,
        cache_dir=tmp_path,
    )
    found = list(stream)
    assert len(found) == N
    for i in (0, 5, N - 1):
        assert np.array_equal(np.asarray(found[i]["png"]), data[i]["image"])
        assert isinstance(found[i]["seg.png"], Image.Image)
        content = found[i]["json"]
        content = json.loads(content) if isinstance(content, str) else content
        check_json(content, data[i])


def test_format_is_found_by_the_index(few, tmp_path):
    config, line = find_format(few.root)
    assert line.endswith("found data of kind shards (panoptic): it has index.json")
    assert isinstance(config, ShardsConfig)
    (tmp_path / "index.json").write_text('{"a": 1}')  # of somebody else
    with pytest.raises(ValueError, match="holds no data set of a known format"):
        find_format(tmp_path)
