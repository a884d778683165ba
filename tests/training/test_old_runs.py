"""Runs and models that were saved before configs had a kind still open and resume.

tests/expected/runs_of_f87603a.json holds the layout of two checkpoints of that commit, each of two
steps: every name, shape and setting, tensors by shape and dtype; and what stood beside the weights
in model/. Values are drawn anew.
"""

import json
from pathlib import Path

import pytest
import torch

import segkern
from segkern.training import checkpoint
from segkern.training.config import TrainConfig
from segkern.training.loop import train
from segkern.training.state import gathered, restore, stored_config

RUNS = json.loads((Path(__file__).parents[1] / "expected/runs_of_f87603a.json").read_text())


def drawn(layout):
    """The layout with tensors of random values; small and positive, as second moments are."""
    if isinstance(layout, list):
        return [drawn(x) for x in layout]
    if not isinstance(layout, dict):
        return layout
    if "tensor" in layout:
        values = torch.rand(layout["tensor"]) / 16
        return values.to(getattr(torch, layout["dtype"]))
    return {int(k) if k.isdigit() else k: drawn(x) for k, x in layout.items()}


@pytest.fixture(params=RUNS)
def run(request, tmp_path):
    """A folder as that commit left it, and its checkpoint."""
    found = RUNS[request.param]
    state = drawn(found["state"])
    state["random"]["cpu"] = torch.get_rng_state()
    torch.save(state, tmp_path / "last.pt")
    model = segkern.models.build_model(TrainConfig.from_dict(state["config"]).model)
    model.load_state_dict(state["model"])
    model.save_pretrained(tmp_path / "model")
    for name in ("settings", "preprocessor"):
        if name in found:
            file = {"settings": "config.json"}.get(name, "preprocessor_config.json")
            (tmp_path / "model" / file).write_text(json.dumps(found[name]))
    return tmp_path, state


def test_a_run_resumes_with_all_of_its_state(run, monkeypatch):
    folder, state = run
    config = stored_config(folder)
    config.output, config.steps = folder, state["step"] + 2
    loaded = []

    def restored(*arguments):
        found = restore(*arguments)
        tensors, about = gathered(arguments[1])
        loaded.append(({k: v.clone() for k, v in tensors.items()}, about["groups"]))
        return found

    monkeypatch.setattr("segkern.training.run.restore", restored)
    trained = train(config, resume=folder, progress=False)
    assert trained.steps == 4
    ((tensors, groups),) = loaded
    assert torch.equal(tensors["random.cpu"], state["random"]["cpu"])
    names = [name for group in groups for name in group["params"]]
    wanted = {f"model.{k}": v for k, v in state["model"].items()}
    for number, moments in state["optimizer"]["state"].items():
        wanted |= {f"optimizer.{names[number]}.{k}": v for k, v in moments.items()}
    assert wanted.keys() == tensors.keys() - {"random.cpu"}
    for name, value in wanted.items():
        assert torch.equal(tensors[name], value), name
    for group, there in zip(groups, state["optimizer"]["param_groups"], strict=True):
        kept = {k: v for k, v in there.items() if k in group and k != "params"}
        assert group.items() >= kept.items()
    assert [path.name for path in checkpoint.held(folder)] == ["0000004"]  # last.pt is older
    after = checkpoint.settings(folder)
    assert after["format"] == checkpoint.FORMAT
    assert config.to_dict() == after["config"]


def test_it_stays_while_as_many_are_kept(run):
    folder, _ = run
    config = stored_config(folder)
    config.output, config.steps, config.keep = folder, 4, 2
    train(config, resume=folder, progress=False)
    assert [path.name for path in checkpoint.held(folder)] == ["last.pt", "0000004"]
    assert checkpoint.find(folder).name == "0000004"
    config.steps, config.output = 5, folder / "other"
    assert train(config, resume=folder / "last.pt", progress=False).steps == 5


def test_what_a_setting_did_then_it_does_after_a_resume(run):
    """The rate of the backbone was that of the whole model where the backbone is an encoder."""
    folder, state = run
    factor = stored_config(folder).backbone_lr_factor
    assert [group["factor"] for group in state["optimizer"]["param_groups"]].count(factor)
    assert factor == {"mask2former": 0.1, "segmenter": 1.0}[state["config"]["model"]["type"]]


def test_its_model_opens(run):
    folder, state = run
    model = segkern.open_model(folder / "model")
    assert model.config.num_labels == 11
    for name, value in state["model"].items():
        assert torch.equal(model.state_dict()[name], value), name
