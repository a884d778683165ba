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
from segkern.training.loop import stored_config, train

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


def outline(x):
    """What `drawn` keeps of a layout, of any state."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape), x.dtype
    if isinstance(x, dict):
        return {k: outline(v) for k, v in x.items()}
    return [outline(v) for v in x] if isinstance(x, (list, tuple)) else x


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


def test_a_run_resumes_with_all_of_its_state(run):
    folder, state = run
    config = stored_config(folder)
    config.output, config.steps = folder, state["step"] + 2
    trained = train(config, resume=folder, progress=False)
    assert trained.steps == 4
    after = checkpoint.load(folder)
    assert after["format"] == checkpoint.FORMAT
    for part in ("model", "optimizer"):
        assert outline(after[part]) == outline(state[part])
    assert config.to_dict() == after["config"]


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
