"""Checkpoints that are spoilt, planted or of another run: named, and nothing in them is run."""

import os
import pickle

import pytest
import torch
from test_loop import config, same
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from segkern.training import checkpoint
from segkern.training.loop import train
from segkern.training.state import restore, resumable
from segkern.weights import shards
from support.runs import copied, names, restored, saved, trainee


@pytest.fixture
def setting(tmp_path):
    return config(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json"])
@pytest.mark.parametrize("spoil", [cut, flipped, os.remove], ids=lambda f: f.__name__)
def test_a_spoilt_file_is_named_with_what_can_be_used(setting, name, spoil):
    saved(setting, 2, 3, 4, keep=3)
    for step in (4, 3):
        spoil(setting.output / f"checkpoints/000000{step}" / name)
    message = rf"0000004: not a whole checkpoint \({name}.*earlier one with --resume .*/0000002$"
    with pytest.raises(ValueError, match=message):
        train(setting, resume=setting.output, progress=False)
    assert names(setting) == ["0000002", "0000003", "0000004"]
    spoil(setting.output / "checkpoints/0000002" / name)
    with pytest.raises(ValueError, match=rf"0000004: not a whole checkpoint \({name}[^;]*\)$"):
        checkpoint.load(setting.output)


class Evil:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def planted(setting, change):
    """A checkpoint whose metadata are changed, with the sums that they should have then."""
    saved(setting, 2)
    path = checkpoint.find(setting.output)
    with (path / ".metadata").open("rb") as file:
        found = pickle.load(file)
    change(path, found)
    with (path / ".metadata").open("wb") as file:
        pickle.dump(found, file)
    state = checkpoint.settings(path)
    files = {p.name: [p.stat().st_size, shards.checksum(p)] for p in path.iterdir()}
    del files["state.json"]
    checkpoint.write_plain(path / "state.json", state | {"files": files})
    return path


def code(path, found):
    found.planner_data = Evil(path / "planted")


def code_of_torch(path, found):
    found.storage_meta = torch.nn.Linear(1, 1)


def bytes_(path, found):
    found.state_dict_metadata["more"] = BytesStorageMetadata()


def outside(path, found):
    next(iter(found.storage_data.values())).relative_path = "../../other.distcp"


def compressed(path, found):
    next(iter(found.storage_data.values())).transform_descriptors = ["zip"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (code, r"holds a \w+.mkdir, which is code and not run here"),
        (code_of_torch, r"holds a torch\.\S+, which is code"),
        (bytes_, "'more' is no tensor"),
        (outside, "lies outside of the folder"),
        (compressed, "is compressed"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_planted_metadata_are_refused_and_not_run(setting, change, message):
    path = planted(setting, change)
    with pytest.raises(ValueError, match=message):
        resumable(path, setting)
    with pytest.raises(ValueError, match=message):
        shards.read({}, path, alone=True)
    assert not (path / "planted").exists()


def test_planted_tensors_are_refused_and_not_run(setting):
    def change(path, found):
        file = path / "__0_0.distcp"
        torch.save(Evil(path / "planted"), file)
        for place in found.storage_data.values():
            place.offset, place.length = 0, file.stat().st_size

    path = planted(setting, change)
    state = resumable(path, setting)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        restore(state, trainee(steps=0), path)
    assert not (path / "planted").exists()


def test_an_optimizer_of_another_kind_is_refused(setting):
    saved(setting, 2)
    with pytest.raises(ValueError, match=r"optimizer's state is of another model \(unexpected: "):
        restored(setting, trainee("sgd", seed=1, steps=0))
    run = trainee(seed=1, steps=0)
    groups = run.step.optimizer.param_groups
    groups[0]["params"].append(groups[1]["params"].pop())
    before = copied(run)
    with pytest.raises(ValueError, match="its weights are grouped otherwise"):
        restored(setting, run)
    same(
        {k: v for k, v in before.items() if k[0] == "m"},
        {k: v for k, v in copied(run).items() if k[0] == "m"},
    )
