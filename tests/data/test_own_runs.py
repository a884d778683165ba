"""Training and evaluation on sets of one's own, from end to end."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch

import segkern
from segkern.cli import main
from segkern.data import CocoConfig, ReadConfig, ViewConfig, build_dataset
from segkern.evaluation.instance import Instances
from segkern.evaluation.panoptic import Panoptic
from segkern.models import Mask2Former, Mask2FormerConfig, open_model
from segkern.ops import pack_bits
from segkern.recipes import DIGITS_THRESHOLD, mask2former
from segkern.structures.segmentation import Masks, Segment, Segmentation
from segkern.training.config import TrainConfig
from support.pictures import write_coco, write_panoptic

VIEWS = ViewConfig((32, 32), (0.5, 1.5), colours=True)


def model():
    config = Mask2FormerConfig.tiny(3)
    config.shortest_edge, config.longest_edge = 32, 64
    return config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_a_run_is_trained_resumed_and_measured(task, tmp_path, capsys):
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
    again = tmp_path / "again.json"
    assert main(["evaluate", str(run), "--data", str(root), "--out", str(again)]) == 0
    assert f"found data of kind coco ({task})" in capsys.readouterr().out
    assert json.loads(again.read_text())["classes"] == value["classes"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_the_recipe_finds_format_and_classes(task, tmp_path, capsys):
    """From the command line, started from a checkpoint of other classes."""
    root, run, start = tmp_path / "set", tmp_path / "run", tmp_path / "start"
    for split in ("train", "val"):
        (write_coco if task == "instance" else write_panoptic)(root, name=split)
    other = Mask2FormerConfig.tiny(7)
    other.num_queries = 5
    Mask2Former(other).save_pretrained(start)
    command = ["train", "--recipe", "mask2former", "--data.root", str(root), "--init", str(start)]
    command += ["--output", str(run), "--data.views.size", "32", "32", "--batch-size", "2"]
    assert main([*command, "--steps", "2", "--evaluate-every", "1"]) == 0
    model = open_model(run)
    assert (model.config.num_queries, model.config.num_labels) == (5, 3)
    assert model.config.id2label == {0: "box", 1: "ring", 2: "ground"}
    assert model.config.stuff == (2,)
    assert f"kind coco ({task}), 3 classes: box, ring, ground" in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0


@pytest.mark.filterwarnings("ignore")
def test_least_scores_are_the_papers_but_for_digits(tmp_path, monkeypatch):
    """The demo's lower one is for its scenes alone."""
    evaluate = import_module("segkern.cli.evaluate")  # the name in the package is the function
    used, real = [], evaluate.run_evaluate

    def run(*args, options, **more):
        used.append(options.threshold)
        return real(*args, options=options, **more)

    monkeypatch.setattr(evaluate, "run_evaluate", run)
    write_panoptic(tmp_path / "set", name="val")
    for labels, data in ((3, ["--data", str(tmp_path / "set")]), (11, ["--scenes", "2"])):
        config = Mask2FormerConfig.tiny(labels)
        config.shortest_edge, config.longest_edge, config.stuff = 32, 64, (labels - 1,)
        Mask2Former(config).save_pretrained(tmp_path / "model")
        assert main(["evaluate", str(tmp_path / "model"), *data]) == 0
    assert used == [None, DIGITS_THRESHOLD]


def test_the_recipe_is_the_papers(tmp_path):
    write_coco(tmp_path, name="train")
    with pytest.warns(UserWarning, match="val split"):
        config = mask2former(tmp_path)
    assert (config.optimizer, config.lr, config.weight_decay) == ("adamw", 1e-4, 0.05)
    assert (config.schedule, config.clip, config.backbone_lr_factor) == ("steps", 0.01, 0.1)
    assert (config.steps, config.batch_size, config.init) == (1000, 16, None)
    assert (config.data.views.size, config.data.views.ratios) == ((1024, 1024), (0.1, 2.0))
    assert (config.model.backbone, config.model.num_labels) == ("swin_tiny", 3)
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_what_the_recipe_cannot_learn_from(tmp_path, capsys):
    write_coco(tmp_path / "objects", name="train")
    for folder in ("images/train", "labels/train"):
        (tmp_path / "maps" / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"images/train: holds no image"):
        mask2former(tmp_path / "maps")
    with pytest.raises(ValueError, match="task must be instance or panoptic"):
        mask2former(tmp_path / "objects", "semantic")
    assert main(["train", "--recipe", "mask2former"]) == 2
    assert "needs --data.root" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_crowds_are_neither_missed_nor_wrong(tmp_path):
    """What is found as the truth has it is perfect; objects inside a crowd cost nothing."""
    write_panoptic(tmp_path)
    data = build_dataset(CocoConfig(tmp_path, "panoptic", read=ReadConfig(val_share=0)), "train")
    sample = data[0]
    dense = torch.from_numpy(np.asarray(sample["masks"])).bool()
    inside = torch.zeros_like(dense[:1])
    inside[0, 26:, 3:9] = True  # in the crowd
    found = torch.cat([dense[:3], inside])
    labels = torch.tensor([2, 0, 0, 1])
    ids = (found * torch.arange(1, 5)[:, None, None]).amax(0).int()
    segments = [
        Segment(i + 1, k, 0.9, int(found[i].sum()), k < 2) for i, k in enumerate(labels.tolist())
    ]
    panoptic = Panoptic(3, data.stuff)
    panoptic.update(Segmentation("panoptic", ids, segments), sample)
    value = panoptic.compute([{} for _ in range(3)])
    assert (value["pq"], panoptic.fp.tolist(), panoptic.fn.tolist()) == (1.0, [0] * 3, [0] * 3)
    things = torch.tensor([1, 2, 3])
    bits = pack_bits(found[things])[0]
    scores, masks = torch.tensor([0.9, 0.8, 0.7]), Masks(bits, range(3), 40)
    result = Segmentation("instance", ids, [], None, masks, labels[things], scores)
    instances = Instances(3, data.stuff)
    instances.update(result, sample)
    assert instances.compute([{"name": n} for n in data.classes])["ap"] == 1.0
