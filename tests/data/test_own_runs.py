"""Training and evaluation on sets of one's own, from end to end."""

import json

import pytest

import segkern
from segkern.cli import main
from segkern.data import CocoConfig, ViewConfig
from segkern.models import Mask2FormerConfig
from segkern.training.config import TrainConfig
from support.pictures import write_coco, write_panoptic

VIEWS = ViewConfig((32, 32), (0.5, 1.5), colours=True)


def model():
    config = Mask2FormerConfig.tiny(3)
    config.shortest_edge, config.longest_edge = 32, 64
    return config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_a_run_is_trained_resumed_and_measured(task, tmp_path):
    root, run, out = tmp_path / "set", tmp_path / "run", tmp_path / "figures.json"
    for split in ("train", "val"):
        (write_coco if task == "instance" else write_panoptic)(root, name=split)
    data = CocoConfig(root, task, views=VIEWS)
    settings = {"steps": 2, "batch_size": 2, "tensorboard": False, "evaluate_every": 1}
    config = TrainConfig(output=run, data=data, model=model(), **settings)
    assert config.task == task
    segkern.train(config, progress=False)
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 0
    assert main(["evaluate", str(run), "--out", str(out)]) == 0
    value = json.loads(out.read_text())
    assert value["images"] == (3 if task == "instance" else 1)
    assert [row["name"] for row in value["classes"]] == ["box", "ring", "ground"]
    assert ("ap" in value) == (task == "instance" or "pq" in value)
    assert main(["evaluate", str(run), "--level", "hard"]) == 2
