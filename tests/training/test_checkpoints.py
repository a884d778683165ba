"""Checkpoints: what they give back, what stays and goes, and what a write that fails leaves."""

import errno
import os
import resource
import shutil
import sys
import threading

import pytest
import torch
from test_loop import config, same

from segkern import recipes
from segkern.training import checkpoint, saver, shard_writer
from segkern.training.config import TrainConfig
from segkern.training.loop import train
from segkern.training.saver import Saver
from segkern.training.shard_writer import Writer
from segkern.training.state import gathered, resumable
from support.runs import Small, advance, copied, light, names, restored, saved, trainee


@pytest.fixture
def setting(tmp_path):
    return config(tmp_path)


@pytest.mark.parametrize("ema", [0.0, 0.9], ids=["", "average"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "plain sgd", "muon"])
def test_a_run_has_again_what_it_had(setting, optimizer, ema):
    first = trainee(optimizer, ema)
    found = saved(setting, 3, run=first)[3]
    second = trainee(optimizer, ema, seed=1, steps=0)
    second.step.optimizer.param_groups[0]["weight_decay"] = 0.5
    assert restored(setting, second) == (3, 1.5)
    same(copied(second), found)
    assert gathered(first)[1] == gathered(second)[1]
    for run in (first, second):
        torch.set_rng_state(found["random.cpu"])
        for group in run.step.optimizer.param_groups:
            group["lr"].fill_(0.25)
        advance(run, 4)
    same(copied(second), copied(first))


def test_weights_without_moments_stay_without(setting):
    run = trainee(steps=0)
    for parameter in [*run.step.parameters][1:]:
        parameter.grad = torch.ones_like(parameter)
    run.step.optimizer.step()
    with Saver(setting.output, setting, {}) as save:
        save(run, run.shown, 1, 1.0)
    again = trainee(seed=1, steps=0)
    restored(setting, again)
    same(copied(again), copied(run))
    assert len(again.step.optimizer.state) == len(run.step.parameters) - 1


def test_a_run_whose_steps_were_all_left_out(setting):
    """As the scale of fp16 does while gradients overflow."""
    run = trainee(steps=0)
    for parameter in run.step.parameters:
        parameter.grad = torch.ones_like(parameter)
    with Saver(setting.output, setting, {}) as save:
        save(run, run.shown, 1, 1.0)
    again = trainee(seed=1, steps=0)
    restored(setting, again)
    assert not again.step.optimizer.state
    same(again.step.model.state_dict(), run.step.model.state_dict())


def test_the_scale_of_the_loss_goes_on(setting):
    run, again = trainee(), trainee(seed=1, steps=0)
    for one in (run, again):
        one.step.scaler = torch.amp.GradScaler("cpu", enabled=True)
    run.step.scaler.load_state_dict(run.step.scaler.state_dict() | {"scale": 8.0})
    saved(setting, 1, run=run)
    restored(setting, again)
    assert again.step.scaler.state_dict() == run.step.scaler.state_dict()


OWN_DATA = [name for name in recipes.RECIPES if name.startswith(("digits", "streets"))]


@pytest.mark.parametrize("name", OWN_DATA)
def test_settings_are_read_as_they_were_written(name, tmp_path):
    wanted = recipes.RECIPES[name]()
    wanted.clip = float("inf")
    about = {"config": wanted.to_dict(), "tuple": {"tuple": 1, 2: (3, [4, (5,)])}}
    checkpoint.write_plain(tmp_path / checkpoint.ABOUT, about)
    found = checkpoint._read_plain(tmp_path / checkpoint.ABOUT)
    assert found.pop("format") == checkpoint.FORMAT
    assert found == about
    assert TrainConfig.from_dict(found["config"]) == wanted


def test_as_many_stay_as_are_kept(setting):
    assert setting.keep == 1
    saved(setting, 1, 2)
    assert names(setting) == ["0000002"]
    saved(setting, 3, 4, 5, keep=3)
    assert names(setting) == ["0000003", "0000004", "0000005"]
    saved(setting, 12345678, keep=2)
    assert names(setting) == ["0000005", "12345678"]
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"keep must be >= 1, got {wrong}"):
            TrainConfig(keep=wrong)


def test_a_run_that_goes_on_from_an_earlier_one_leaves_the_later_ones(setting):
    saved(setting, 2, 4, 6, keep=3)
    assert resumable(setting.output / "checkpoints/0000002", setting)["step"] == 2
    saved(setting, 3)
    assert names(setting) == ["0000002", "0000003"]


def test_what_a_killed_write_left_is_passed_over_and_removed(setting):
    saved(setting, 2)
    whole = checkpoint.find(setting.output)
    for name in (".0000004", ".removed-1"):
        shutil.copytree(whole, whole.with_name(name))
    assert checkpoint.find(setting.output) == checkpoint.find(whole.parent) == whole
    saved(setting, 3)
    assert [p.name for p in whole.parent.iterdir()] == ["0000003"]


def dies_at(number, folder):
    """A process ends, as by kill -9, before its so-manyth change of files below a folder."""
    left = number

    def hook(event, arguments):
        nonlocal left
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return
        if event == "open" and "w" not in str(arguments[1]) and "+" not in str(arguments[1]):
            return
        if any(str(x).startswith(str(folder)) for x in arguments):
            left -= 1
            if left == 0:
                os._exit(9)

    sys.addaudithook(hook)


def test_a_process_may_die_before_any_change_of_a_file(setting):
    """The newest checkpoint is the one before or the new one, whole, and never older after."""
    run, place, steps = trainee(), setting.output, []
    before = saved(setting, 4, run=run)[4]
    kept = shutil.copytree(place, place.with_name("kept"))
    advance(run, 5)
    after = copied(run)
    for number in range(1, 60):
        shutil.rmtree(place)
        shutil.copytree(kept, place)
        torch.set_rng_state(after["random.cpu"])
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                dies_at(number, place)
                with Saver(place, setting, {}) as save:
                    save(run, run.shown, 6, 1.0)
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        state = checkpoint.load(place)
        steps.append(state["step"])
        same(state["tensors"], {4: before, 6: after}[state["step"]])
        if code == 0:
            break
        saved(setting, 7, run=trainee())  # and it goes on
        assert [p.name for p in (place / "checkpoints").iterdir()] == ["0000007"]
    assert steps == sorted(steps)
    assert code == 0
    assert steps.count(4) > 4
    assert steps.count(6) > 2


@pytest.fixture(params=[1 << 60, 0], ids=["", "meanwhile"])
def either(request, monkeypatch):
    monkeypatch.setattr(saver, "LARGE", request.param)


def test_how_often_a_run_is_saved_changes_nothing_in_it(tmp_path, either):
    runs = [
        train(
            light(tmp_path / str(every), steps=3, checkpoint_every=every, ema=0.9), progress=False
        )
        for every in (9, 1)
    ]
    same(*(run.model.state_dict() for run in runs))
    found = [checkpoint.load(tmp_path / str(every))["tensors"] for every in (9, 1)]
    same(*found)


def test_training_goes_on_while_a_copy_is_written(setting, monkeypatch):
    """The file has the weights of its step; one is written at a time; the end waits."""
    monkeypatch.setattr(saver, "LARGE", 0)
    go, active, most, write = threading.Event(), [], [], Writer.write_data

    def slowly(self, plan, planner):
        active.append(self.folder)
        most.append(len(active))
        assert go.wait(60)
        found = write(self, plan, planner)
        active.remove(self.folder)
        return found

    monkeypatch.setattr(Writer, "write_data", slowly)
    run, setting.keep = trainee(), 9
    with Saver(setting.output, setting, {}) as save:
        wanted = copied(run)
        save(run, run.shown, 1, 1.0)
        assert names(setting) == []
        advance(run, 1)
        with torch.no_grad():
            for value in run.step.model.state_dict().values():
                value.zero_()
        go.set()
        for step in (2, 3):
            advance(run, step)
            save(run, run.shown, step, 1.0)
            assert names(setting)[-1] == f"000000{step - 1}"
    assert names(setting) == ["0000001", "0000002", "0000003"]
    assert most == [1, 1, 1]
    same(checkpoint.load(checkpoint.held(setting.output)[0])["tensors"], wanted)


def test_a_small_state_is_written_at_once(setting):
    run = trainee()
    with Saver(setting.output, setting, {}) as save:
        save(run, run.shown, 1, 1.0)
        assert names(setting) == ["0000001"]
        assert save.writing is None


def raises_at(monkeypatch, place, name, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(place, name, fails)


def test_a_path_names_a_run_or_a_checkpoint(setting, tmp_path, monkeypatch):
    """From wherever it is given, and whatever the folder of the run is called."""
    for name in ("20261130", "checkpoints", "run"):
        folder = tmp_path / name
        folder.mkdir()
        saved(setting, 1, 2, output=folder, keep=2)
        first, second = checkpoint.held(folder)
        assert checkpoint.find(folder) == second
        assert checkpoint.folder_of(folder) == checkpoint.folder_of(first) == folder
        for place, given in (
            (folder, "."),
            (folder, "checkpoints"),
            (folder, "checkpoints/0000001"),
            (first.parent, "."),
            (first.parent, "0000001"),
            (first, "."),
        ):
            monkeypatch.chdir(place)
            want = first if "1" in given or place == first else second
            assert checkpoint.find(given).resolve() == want
            assert checkpoint.folder_of(given).resolve() == folder
    (first / "state.json").unlink()
    monkeypatch.chdir(first.parent)
    with pytest.raises(ValueError, match=r"state.json is missing"):
        checkpoint.settings("0000001")
    (tmp_path / "1234567").mkdir()
    with pytest.raises(ValueError, match="no such checkpoint"):
        checkpoint.find(tmp_path / "1234567")


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["tensors", "write_plain", "name_folder", "checksum", "model"])
@pytest.mark.parametrize("before", [(), (2, 4)], ids=["first", "third"])
def test_a_full_disk_leaves_what_was_there(setting, monkeypatch, either, at, before):
    saved(setting, *before, keep=2)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    reason = "No space left on device"
    if at == "tensors":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
        reason = "File too large"
    elif at != "model":
        raises_at(monkeypatch, shard_writer, at, FULL)
    remedy = "there is none before it"
    if before:
        remedy = r".*/0000004 is whole: go on with --resume .*/0000004"
    monkeypatch.setattr(Small, "save_pretrained", lambda *_: None)
    if at == "model":
        raises_at(monkeypatch, Small, "save_pretrained", FULL)
    message = rf"step 6 could not be written to .* \({reason}\); {remedy}"
    try:
        with pytest.raises(OSError, match=message):
            saved(setting, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert names(setting) == [f"000000{step}" for step in before]
    folder = setting.output / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == (names(setting) or [".0000006"])
    assert checkpoint.begun(setting.output) == (not before)
    if not before:
        assert not any((folder / ".0000006").iterdir())
    if before:
        assert resumable(setting.output, setting)["step"] == 4


def test_a_write_that_failed_meanwhile_ends_the_run(setting, monkeypatch):
    monkeypatch.setattr(saver, "LARGE", 0)
    raises_at(monkeypatch, shard_writer, "name_folder", FULL)
    run, message = trainee(), "step 1 could not be written .*No space left"
    with Saver(setting.output, setting, {}) as save:
        save(run, run.shown, 1, 1.0)
        with pytest.raises(OSError, match=message):
            save(run, run.shown, 2, 1.0)


def test_what_went_wrong_first_is_told_first(setting, monkeypatch):
    monkeypatch.setattr(saver, "LARGE", 0)
    raises_at(monkeypatch, shard_writer, "name_folder", FULL)

    run = trainee()

    def fails():
        with Saver(setting.output, setting, {}) as save:
            save(run, run.shown, 3, 1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        fails()
    assert "step 3 could not be written" in raised.value.__notes__[0]


def test_a_folder_that_vanished_is_named(setting, monkeypatch, either):
    run = trainee()
    with Saver(setting.output, setting, {}) as save:
        save(run, run.shown, 1, 1.0)
        save.wait()
        shutil.rmtree(setting.output)
        with pytest.raises(FileNotFoundError, match=r"step 2 .*, the folder of the run, is gone"):
            save(run, run.shown, 2, 1.0)
    assert not setting.output.exists()
    setting.output.mkdir()
    write = Writer.write_data

    def vanishes(self, plan, planner):
        found = write(self, plan, planner)
        shutil.rmtree(setting.output)
        return found

    monkeypatch.setattr(Writer, "write_data", vanishes)
    monkeypatch.setattr(Small, "save_pretrained", lambda *_: None)
    with pytest.raises(OSError, match=r"step 2 could not be written .*No such file"):
        saved(setting, 2, run=run)


def test_weights_that_are_not_finite_are_not_written(setting):
    run = trainee()
    saved(setting, 1, run=run)
    with torch.no_grad():
        run.step.model[2].bias[1] = float("nan")
    save = Saver(setting.output, setting, {})
    with pytest.raises(FloatingPointError, match=r"after step 2 \(2.bias and 0 more\)"):
        save(run, run.shown, 2, 1.0)
    assert names(setting) == ["0000001"]
