"""Two steps and an evaluation on each of the published sets, and on pictures of five channels."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import segkern
from segkern.data import (
    Ade20kConfig,
    CityscapesConfig,
    ClassMapsConfig,
    CocoConfig,
    PascalContextConfig,
    ReadConfig,
    build_dataset,
)
from segkern.models import Mask2FormerConfig
from segkern.training.config import TrainConfig
from support.pictures import SIZE, image_rows, noise, write, write_coco


def cityscapes(root):
    values = np.full(SIZE, 7, np.uint16)
    values[5:20, 4:20], values[5:20, 24:36] = 26000, 26
    for split in ("train", "val"):
        write(root / f"leftImg8bit/{split}/ulm/a_leftImg8bit.png", noise(0))
        write(root / f"gtFine/{split}/ulm/a_gtFine_instanceIds.png", values)
    return CityscapesConfig(root)


def ade20k(root, task="semantic"):
    values = np.ones(SIZE, np.uint8)
    values[5:20, 4:20] = 20
    for split in ("training", "validation"):
        write(root / f"images/{split}/a.jpg", noise(0))
        write(root / f"annotations/{split}/a.png", values)
    return Ade20kConfig(root, task)


def pascal_context(root):
    write(root / "JPEGImages/a.jpg", noise(0))
    write(root / "SegmentationClassContext/a.png", np.full(SIZE, 3, np.uint8))
    for split in ("train", "val"):
        path = root / f"ImageSets/SegmentationContext/{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a")
    return PascalContextConfig(root)


def five_channels(root):
    for split in ("train", "val"):
        write_coco(root, images=image_rows([(7, "a.tif")]), name=split)
        pages = [Image.fromarray(noise(i)[..., 0]) for i in range(5)]
        path = root / f"{split}2017/a.tif"
        pages[0].save(path, save_all=True, append_images=pages[1:])
    return CocoConfig(root, read=ReadConfig(channels=5))


def class_maps(root):
    for split in ("train", "val"):
        write(root / f"images/{split}/a.jpg", noise(0))
        write(root / f"labels/{split}/a.png", np.full(SIZE, 1, np.uint8))
    (root / "classes.txt").write_text("ground\nroad\n")
    return ClassMapsConfig(root)


@pytest.mark.parametrize("make", [class_maps, cityscapes, ade20k, pascal_context, five_channels])
@pytest.mark.filterwarnings("ignore")
def test_a_run(make, tmp_path):
    data = make(tmp_path / "set")
    data.views = replace(data.views, size=(32, 32))
    pictures = build_dataset(data, "train")
    model = replace(
        Mask2FormerConfig.tiny(len(pictures.classes)),
        id2label=dict(enumerate(pictures.classes)),
        stuff=tuple(pictures.stuff),
        image_mean=(0.5,) * data.read.channels,
        image_std=(0.5,) * data.read.channels,
        shortest_edge=32,
        longest_edge=64,
    )
    settings = {"steps": 2, "batch_size": 2, "evaluate_every": 2, "tensorboard": False}
    run = TrainConfig(output=tmp_path / "run", data=data, model=model, **settings)
    segkern.train(run, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    metric = {"panoptic": "pq", "instance": "ap", "semantic": "miou"}[data.task]
    assert metric in lines[-1]["metrics"]
    assert all(np.isfinite(line["loss"]) for line in lines)
