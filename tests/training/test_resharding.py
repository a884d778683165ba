"""Checkpoints of one process and of two, by DDP and by FSDP2, are one and the same form."""

import errno
import json
import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from segkern.runtime.processes import Processes
from segkern.training import checkpoint, loop, shard_writer
from segkern.training import run as preparation
from segkern.training.saver import Saver
from segkern.training.shard_writer import Writer
from segkern.training.state import gathered, restore
from support.processes import in_two_processes
from support.runs import light, names, trainee

KINDS = ("ddp", "fsdp")
START = 4  # the step from which another number of processes goes on


def setting(output, **changes):
    """Fourteen steps in which nothing is drawn by a process alone."""
    found = light(output, steps=14, checkpoint_every=START, keep=9, ema=0.9, **changes)
    found.model.drop_path_rate = found.model.decoder_dropout = 0.0
    return found


def on_from(folder, source, name, **changes):
    """Goes on from step 4 of a run.

    Returns:
        names of tensors that were not loaded bit by bit.
    """
    path = folder / source / "checkpoints" / checkpoint.name_of(START)
    wanted, wrong = checkpoint.load(path)["tensors"], []

    def checked(state, run, name):
        found = restore(state, run, name)
        tensors = gathered(run)[0]
        if dist.is_initialized() and dist.get_rank():
            wanted.pop("random.cpu")  # the first's
        assert tensors.keys() == wanted.keys()
        for key, value in tensors.items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            if not torch.equal(whole, wanted[key]):
                wrong.append(key)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "restore", checked)
        loop.train(setting(folder / name, **changes), resume=path, progress=False)
    return wrong


def work(rank):
    folder = Path(os.environ["RUNS"])
    wrong = {}
    for kind in KINDS:
        loop.train(setting(folder / kind, parallel=kind), progress=False)
        wrong[kind] = on_from(folder, "one", f"{kind}-on", parallel=kind)
    shards = [
        p.name for p in checkpoint.find(folder / "fsdp").glob("*.distcp") if p.stat().st_size
    ]
    return wrong, sorted(shards)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path))
    (tmp_path / "group").mkdir()
    loop.train(setting(tmp_path / "one"), progress=False)
    for wrong, shards in in_two_processes(work, tmp_path / "group", patience=400).values():
        assert wrong == {"ddp": [], "fsdp": []}
        assert shards == ["__0_0.distcp", "__1_0.distcp"]
    for kind in KINDS:
        assert on_from(tmp_path, kind, f"{kind}-back") == []

    def losses(name):
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["step"] > START]

    wanted = losses("one")
    assert len(wanted) == 10
    for kind in KINDS:
        for name in (kind, f"{kind}-on", f"{kind}-back"):
            assert losses(name) == pytest.approx(wanted, rel=1e-4), name
    tensors = [checkpoint.load(tmp_path / name)["tensors"] for name in ("one", *KINDS)]
    shapes = [{k: (v.shape, v.dtype) for k, v in found.items()} for found in tensors]
    assert shapes[0] == shapes[1] == shapes[2]


def faults(rank, folder, results):
    """What each of two processes is told of what goes wrong in the second, which dies last."""
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/s", timeout=wait, rank=rank, world_size=2)
    config, run, told = light(folder / "run", keep=2), trainee(), []
    config.output.mkdir(exist_ok=True)
    dist.barrier()
    save = Saver(config.output, config, {}, Processes(rank, 2))

    def tries(step):
        try:
            save(run, run.shown, step, 1.0)
        except (OSError, RuntimeError, FloatingPointError) as error:
            told.append(f"{type(error).__name__}: {error}")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(run, run.shown, 1, 1.0)
    before = shard_writer.checksum, Writer.write_data
    if rank == 1:
        shard_writer.checksum = Writer.write_data = full
    tries(2)
    shard_writer.checksum, Writer.write_data = before
    weight = run.step.model[0].weight.detach()
    kept = weight.clone()
    if rank == 1:
        weight[0, 0] = float("inf")
    tries(3)
    weight.copy_(kept)
    save(run, run.shown, 4, 1.0)
    last = checkpoint.find(config.output)
    dist.barrier()
    if rank == 1:
        data = (last / "__0_0.distcp").read_bytes()
        (last / "__0_0.distcp").write_bytes(data[:-1])
    dist.barrier()
    try:
        checkpoint.whole(last)
    except ValueError as error:
        told.append(f"ValueError: {error}")
    if rank == 1:
        results.put(told)
        results.close()
        results.join_thread()
        Writer.write_data = lambda *_: os._exit(9)
    tries(6)
    results.put(told)


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_is_told_in_all(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=faults, args=(r, tmp_path, results)) for r in (0, 1)]
    for worker in workers:
        worker.start()
    found = sorted((results.get(timeout=150) for _ in workers), key=len)
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 9]
    assert found[0] == found[1][:-1]
    run, said = tmp_path / "run", iter(found[1])
    remedy = f"{run}/checkpoints/0000001 is whole: go on with --resume {run}/checkpoints/0000001"
    full = "(process 1: No space left on device)"
    step = "OSError: the checkpoint of step 2 could not be written to"
    assert next(said) == f"{step} {run} {full}; {remedy}"
    assert next(said).startswith("FloatingPointError: weights are not finite after step 3")
    cut = next(said)
    assert cut.startswith(f"ValueError: {run}/checkpoints/0000004: not a whole checkpoint (__0_0")
    assert cut.endswith(f"go on from an earlier one with --resume {run}/checkpoints/0000001")
    dead = next(said)
    assert dead.startswith("RuntimeError: the checkpoint of step 6 could not be written to")
    assert "a process of the group is gone" in dead
    assert names(light(run)) == ["0000001", "0000004"]
