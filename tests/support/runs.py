"""Checkpoints of training runs, for tests of what opens, resumes or refuses them."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from segkern.training import checkpoint
from segkern.training.shard_writer import Writer
from segkern.weights.shards import quiet_without_group


def write_checkpoint(folder: Path, state: dict) -> Path:
    """Writes a checkpoint in a run's folder.

    Args:
        state: as `checkpoint.load` gives one; "tensors" may be left out.

    Returns:
        the folder of the checkpoint.
    """
    path = folder / checkpoint.FOLDER / checkpoint.name_of(state["step"])
    about = {"groups": []} | {k: v for k, v in state.items() if k not in ("files", "tensors")}
    writer = Writer(path, about, lambda: None)
    quiet_without_group()
    tensors = state.get("tensors") or {"model.none": torch.zeros(1)}
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    return path


def part(state: dict, name: str) -> dict[str, torch.Tensor]:
    """The model's or the average's weights in what `checkpoint.load` gave, or moments."""
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in state["tensors"].items() if k.startswith(start)}
