"""Training: resume, stops, the recipe's parts, what it refuses."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from segkern.data import Digits, DigitsConfig
from segkern.models import Mask2Former, Mask2FormerConfig
from segkern.training import checkpoint
from segkern.training.config import TrainConfig
from segkern.training.feed import batches
from segkern.training.loop import train
from segkern.training.step import Step
from support.runs import part, write_checkpoint

ROOT = Path(__file__).parents[2]


def config(output, **changes):
    """Six quick steps of a small model."""
    model = Mask2FormerConfig.tiny(11)
    model.num_queries, model.train_num_points, model.decoder_layers = 5, 32, 2
    model.hidden_dim = model.feature_size = model.mask_feature_size = 32
    model.dropout = 0.1  # so that the generator's state matters
    settings = {
        "steps": 6,
        "batch_size": 2,
        "lr": 1e-3,
        "log_every": 1,
        "tensorboard": False,
        "data": DigitsConfig(size=(32, 32), level="mixed", scenes=7),
        "model": model,
    }
    return TrainConfig(output=output, **(settings | changes))


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


class Custom:
    """A data set of given samples."""

    def __init__(self, count=8, **changes):
        self.count, self.changes = count, changes
        self.classes = [str(i) for i in range(11)]

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        base = {
            "pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index)),
            "masks": torch.ones(1, 32, 32, dtype=torch.uint8),
            "labels": torch.tensor([2]),
            "id": index,
        }
        return base | (self.changes if index == self.count - 1 else {})


class Interrupting(Custom):
    """Asks the training to stop in the second step; the first batch is read before it."""

    def __getitem__(self, index):
        handler = signal.getsignal(signal.SIGINT)
        if not getattr(getattr(handler, "__self__", None), "asked", True):
            signal.raise_signal(signal.SIGINT)
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps without a stop, evaluated half-way."""
    folder = tmp_path_factory.mktemp("whole")
    run = train(config(folder, evaluate_every=3, evaluate_scenes=2), progress=False)
    return folder, run


def test_resume_gives_the_same_weights(whole, tmp_path):
    whole_folder, run = whole
    changed = {"evaluate_every": 3, "evaluate_scenes": 2}
    first = config(tmp_path, checkpoint_every=4, **changed)
    data, held_out = Digits(first.data), Digits(first.data, "val")
    plug = PulledPlug(data, 4 * 2)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(first, dataset=plug, val_dataset=held_out, progress=False)
    assert checkpoint.settings(tmp_path)["step"] == 4
    with pytest.raises(ValueError, match="dataset must be given to go on with"):
        train(first, resume=tmp_path, progress=False)
    given = {"dataset": data, "val_dataset": held_out}
    second = train(first, resume=tmp_path, **given, progress=False)
    same(run.model.state_dict(), second.model.state_dict())
    a, b = checkpoint.load(whole_folder), checkpoint.load(tmp_path)
    assert a["step"] == b["step"] == 6
    same(a["tensors"], b["tensors"])  # weights, moments, generators
    assert a["groups"] == b["groups"]
    assert part(a, "optimizer").keys() > {f"{k}.exp_avg" for k, _ in run.model.named_parameters()}
    logs = [(f / "log.jsonl").read_text().splitlines() for f in (whole_folder, tmp_path)]
    logs = [[json.loads(x) | {"seconds": 0} for x in log] for log in logs]
    assert logs[0] == logs[1]  # no step twice, none missing
    assert [x["step"] for x in logs[0]] == [1, 2, 3, 4, 5, 6]
    assert [x["step"] for x in logs[0] if "metrics" in x] == [3, 6]


class PulledPlug:
    """A data set that fails after so many samples."""

    def __init__(self, data, samples):
        self.data, self.left, self.classes = data, samples, data.classes

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if self.left == 0:
            raise RuntimeError("pulled the plug")
        self.left -= 1
        return self.data[index]


def test_a_run_leaves_weights_that_open(whole):
    folder, run = whole
    assert not run.model.training
    assert run.steps == 6
    assert run.seconds > 0
    assert math.isclose(run.images_per_second, 12 / run.seconds)
    opened = Mask2Former.from_pretrained(folder / "model")
    same(dict(run.model.named_parameters()), dict(opened.named_parameters()))


def test_workers_and_seed(whole, tmp_path):
    _, run = whole
    again = train(config(tmp_path / "a", workers=1), progress=False)
    same(run.model.state_dict(), again.model.state_dict())
    other = train(config(tmp_path / "b", steps=1, seed=1), progress=False)
    assert not torch.equal(
        run.model.state_dict()["pixel_decoder.mask_features.weight"],
        other.model.state_dict()["pixel_decoder.mask_features.weight"],
    )


def test_bf16_and_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    run = train(config(tmp_path, steps=2, precision="bf16", tensorboard=True), progress=False)
    assert all(v.isfinite().all() for v in run.model.state_dict().values())
    assert list((tmp_path / "tensorboard").iterdir())


def test_training_lowers_the_loss(tmp_path):
    train(
        config(tmp_path, steps=40, batch_size=4, warmup=5, clip=1.0, backbone_lr_factor=1.0),
        progress=False,
    )
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in lines]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(
    ("changes"),
    [
        {"masks": torch.zeros(0, 32, 32, dtype=torch.uint8), "labels": torch.zeros(0).long()},
        {"masks": torch.zeros(1, 32, 32, dtype=torch.uint8)},
    ],
    ids=["no-object", "empty-mask"],
)
@pytest.mark.parametrize("count", [1, 4], ids=["alone", "among-others"])
def test_images_without_objects_train(tmp_path, changes, count):
    run = train(config(tmp_path, steps=3), dataset=Custom(count, **changes), progress=False)
    assert all(v.isfinite().all() for v in run.model.state_dict().values())
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(x["loss"]) for x in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": torch.full((3, 32, 32), float("nan"))}, "pixels of sample 0 must be"),
        ({"labels": torch.tensor([11])}, r"labels of image 0 must be in \[0, 11\), got 11"),
        ({"masks": torch.ones(1, 16, 32, dtype=torch.uint8)}, "masks of sample 0 must be"),
    ],
    ids=["nan-pixels", "label", "mask-size"],
)
def test_bad_samples_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path), dataset=Custom(1, **changes), progress=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    train(config(tmp_path, steps=2, schedule="steps", warmup=0, clip=0), progress=False)
    state = checkpoint.load(tmp_path)
    state["config"]["lr"] = 1e30
    write_checkpoint(tmp_path / "wild", state)
    wild = config(tmp_path / "wild", steps=9, lr=1e30, schedule="steps", warmup=0, clip=0)
    with pytest.raises(FloatingPointError, match=r"not finite (at|after) step .*: lower --lr"):
        train(wild, resume=tmp_path / "wild", progress=False)
    same(checkpoint.load(tmp_path / "wild")["tensors"], state["tensors"])


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1"):
        train(config(tmp_path, steps=1, lr=float("inf"), warmup=0), progress=False)
    assert not checkpoint.held(tmp_path)


REFUSED = [
    (
        "model",
        lambda c: replace(c, model=replace(c.model, num_queries=9)),
        "model.num_queries is 5",
    ),
    ("data", lambda c: replace(c, data=replace(c.data, seed=4)), "data.seed is 0 there, 4 here"),
    ("recipe", lambda c: replace(c, lr=0.5), "lr is 0.001 there, 0.5 here"),
    ("finished", lambda c: c, "has its 6 steps"),
]


@pytest.mark.parametrize(
    ("change", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_resume_from_another_run_is_refused(whole, tmp_path, change, message):
    folder, _ = whole
    with pytest.raises(ValueError, match=re.escape(message)):
        train(change(config(tmp_path)), resume=folder, progress=False)
    assert not list(tmp_path.iterdir())


def test_resume_from_other_weights_names_the_keys_and_loads_nothing(whole, tmp_path, monkeypatch):
    folder, _ = whole
    state = checkpoint.load(folder)
    tensors = state["tensors"]
    tensors["model.query_decoder.query_feat.weight"] = torch.zeros(9, 32)
    tensors["model.foreign"] = tensors.pop("model.criterion.seed")
    write_checkpoint(tmp_path, state)

    def never(*_, **__):
        raise AssertionError("half-loaded")

    monkeypatch.setattr(Mask2Former, "load_state_dict", never)
    message = (
        r"another model; missing: criterion.seed; unexpected: foreign; of another shape: "
        r"query_decoder.query_feat.weight \[9, 32\] instead of \[5, 32\]"
    )
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path / "new", steps=9), resume=tmp_path, progress=False)


def cut(path, data):
    path.write_bytes(data[: len(data) // 2])


def foreign(path, data):
    torch.save({"weights": torch.zeros(3)}, path)


def bare(path, data):
    torch.save({"format": 2}, path)


def text(path, data):
    path.write_text("no checkpoint")


@pytest.mark.parametrize("spoil", [cut, foreign, bare, text], ids=lambda f: f.__name__)
def test_a_spoilt_file_of_an_earlier_version_is_refused(tmp_path, spoil):
    parts = {"model": {"weight": torch.zeros(99)}, "optimizer": {}, "random": {}}
    torch.save({"format": 2, "config": {}, "step": 1, "seconds": 1.0} | parts, tmp_path / "a")
    assert checkpoint.settings(tmp_path / "a")["step"] == 1
    spoil(tmp_path / "last.pt", (tmp_path / "a").read_bytes())
    with pytest.raises(ValueError, match=r"last.pt: not a (whole )?checkpoint"):
        train(config(tmp_path / "new"), resume=tmp_path, progress=False)


def test_another_run_is_not_gone_over(whole, tmp_path):
    folder, _ = whole
    train(config(tmp_path, steps=1, seed=3), progress=False)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "tensorboard").mkdir()
    longer = config(tmp_path, steps=7)
    with pytest.raises(ValueError, match=r"holds a run \(checkpoints, model\): .*--overwrite"):
        train(longer, resume=folder, progress=False)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    train(replace(longer, overwrite=True), resume=folder, progress=False)
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [7]
    assert not (tmp_path / "tensorboard").exists()


def test_model_is_that_of_the_last_checkpoint(tmp_path):
    setting = config(tmp_path, checkpoint_every=2)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(setting, dataset=PulledPlug(Digits(setting.data), 3 * 2), progress=False)
    opened = Mask2Former.from_pretrained(tmp_path / "model")
    stored = part(checkpoint.load(tmp_path), "model")
    same(dict(opened.named_parameters()), {k: stored[k] for k, _ in opened.named_parameters()})
    fresh = replace(setting, overwrite=True)
    for number, left in ((0, ["checkpoints", "log.jsonl", "model"]), (1, ["log.jsonl"])):
        broken = PulledPlug(Digits(setting.data), 2 * number + 1)  # of the first: nothing is lost
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(fresh, dataset=broken, progress=False)
        assert sorted(p.name for p in tmp_path.iterdir()) == left


def test_a_device_without_kernels_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("segkern.runtime.device._library.MISSING", {"cpu": "library not built"})
    monkeypatch.setattr("segkern.runtime.device._library.PURE", False)
    with pytest.raises(ValueError, match="'cpu' has no kernels: library not built"):
        train(config(tmp_path, device="cpu"), progress=False)


def test_spoilt_weights_are_found_before_the_evaluation(tmp_path):
    wild = config(tmp_path, steps=2, lr=float("inf"), warmup=0, evaluate_every=1)
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1"):
        train(wild, progress=False)


def test_ctrl_c_in_the_last_step_is_not_lost(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="stopped after 2 steps"):
        train(config(tmp_path, steps=2), dataset=Interrupting(), progress=False)
    assert checkpoint.settings(tmp_path)["step"] == 2
    Mask2Former.from_pretrained(tmp_path / "model")


def test_refuses_before_work_starts(whole, tmp_path):
    folder, _ = whole
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into folder .*file/run"):
        train(config(tmp_path / "file" / "run"), progress=False)
    with pytest.raises(ValueError, match=r"holds a run .*: go on with --resume .*--overwrite"):
        train(config(folder), progress=False)
    (tmp_path / "kept/best").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"kept holds a run \(best\): choose another --output"):
        train(config(tmp_path / "kept"), progress=False)
    with pytest.raises(ValueError, match="no such checkpoint"):
        train(config(tmp_path), resume=tmp_path / "nothing", progress=False)
    wrong = config(tmp_path, model=Mask2FormerConfig.tiny(10))
    with pytest.raises(ValueError, match="num_labels must be 11, the classes of the data, got 10"):
        train(wrong, progress=False)
    with pytest.raises(ValueError, match="device 'abacus' cannot be used"):
        train(config(tmp_path, device="abacus"), progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be >= 0, got nan"),
        (
            {"schedule": "random"},
            "schedule must be one of cosine, poly, steps, thirds, got 'random'",
        ),
        ({"void": "skip"}, "void must be one of background, ignore, got 'skip'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"task_shares": (0, 0, 0)}, r"not all of them 0, got \(0, 0, 0\)"),
        ({"task_shares": (1, -1, 1)}, "three finite numbers >= 0"),
        ({"task_shares": (1, float("nan"), 1)}, "three finite numbers >= 0"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


STOPPED = """
import sys
sys.path.insert(0, {tests!r})
from test_loop import config
from segkern.cli import main
import segkern.recipes
segkern.recipes.digits = lambda: config({folder!r}, steps=100_000, checkpoint_every=5)
sys.exit(main(["train", "--threads", "1"]))
"""


def test_ctrl_c_finishes_the_step_and_resume_goes_on(tmp_path):
    script = STOPPED.format(tests=str(ROOT / "tests/training"), folder=str(tmp_path))
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, end = tmp_path / "log.jsonl", time.monotonic() + 300
    while not (log.is_file() and log.read_text().count("\n") >= 8):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end, "training did not start"
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    state = checkpoint.settings(tmp_path)
    step = state["step"]
    assert f"stopped after step {step} of 100000; go on with: segkern train --resume" in errors
    assert "Traceback" not in errors
    lines = [json.loads(x) for x in log.read_text().splitlines()]
    assert lines[-1]["step"] == step >= 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "log.jsonl", "model"]
    settings = TrainConfig.from_dict(state["config"])
    more = train(replace(settings, steps=step + 1), resume=tmp_path, progress=False)
    assert more.steps == step + 1


@pytest.mark.parametrize("void", ["background", "ignore"])
def test_void_reaches_the_batches(void, tmp_path):
    settings = config(tmp_path, void=void)
    batch = next(batches(Digits(settings.data), settings, 0))
    assert (batch.targets.void is None) == (void == "background")


def test_numbers_too_small_to_be_normal_are_nothing_in_training_alone(tmp_path, monkeypatch):
    seen, make = [], Step.__call__
    tiny = torch.tensor(1e-39)

    def step(self, *arguments):
        seen.append(float(tiny.mul(1)))
        return make(self, *arguments)

    monkeypatch.setattr(Step, "__call__", step)
    train(config(tmp_path, steps=1), progress=False)
    assert seen == [0]
    assert float(tiny.mul(1)) > 0
