"""Checkpoints of training runs, for tests of what opens, resumes or refuses them."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from segkern.data import DigitsConfig
from segkern.models import SegmenterConfig
from segkern.training import checkpoint
from segkern.training.average import Average
from segkern.training.config import TrainConfig
from segkern.training.optimizer import MuonAndAdamW
from segkern.training.saver import Saver
from segkern.training.shard_writer import Writer
from segkern.training.state import Trainee, gathered, restore, resumable
from segkern.training.step import Step
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


def light(output: Path, **changes) -> TrainConfig:
    """Quick steps of a model of few tensors, with dropout."""
    size = {"image_size": (32, 32), "patch_size": 16, "window_size": 32, "window_stride": 32}
    width = {"embed_dim": 64, "depth": 1, "num_heads": 1, "decoder_layers": 1}
    drop = {"drop_path_rate": 0.1, "decoder_dropout": 0.1}
    model = SegmenterConfig(num_labels=11, backbone_pretrained=False, **size, **width, **drop)
    settings = {
        "steps": 6,
        "batch_size": 2,
        "lr": 1e-3,
        "clip": 1.0,
        "log_every": 1,
        "tensorboard": False,
        "data": DigitsConfig(size=(32, 32), level="mixed", scenes=7),
        "model": model,
    }
    return TrainConfig(output=output, **(settings | changes))


class Small(torch.nn.Sequential):
    """A model with matrices, a norm over batches and a seed."""

    def __init__(self, width: int = 6):
        linear = torch.nn.Linear
        norm = torch.nn.BatchNorm1d(width)
        super().__init__(linear(4, width), norm, linear(width, 8), linear(8, 2, bias=False))
        self.register_buffer("seed", torch.zeros(1, dtype=torch.int64))

    def loss(self, x: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, dict]:
        loss = (self(x) - targets).square().mean()
        return loss, {"loss": loss[None]}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.state_dict(), folder / "model.pth")


def trainee(optimizer: str = "adamw", ema: float = 0.0, seed: int = 0, steps: int = 1) -> Trainee:
    """A `Small` after steps with random gradients, as the loop has it."""
    torch.manual_seed(seed)
    return of_model(Small(), optimizer, ema, steps)


def of_model(model: torch.nn.Module, optimizer: str, ema: float = 0.0, steps: int = 1) -> Trainee:
    """What trains a model, after steps with random gradients."""
    average = Average(model, ema) if ema else None
    groups = [
        {
            "params": [p for p in model.parameters() if (p.ndim == 2) == matrices],
            "weight_decay": 0.1 * matrices,
            "factor": 1.0,
            "matrices": matrices,
            "later": False,
            "lr": torch.tensor(0.01),
        }
        for matrices in (True, False)
    ]
    made = {
        "adamw": lambda: torch.optim.AdamW(groups, fused=True),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, fused=True),
        "plain sgd": lambda: torch.optim.SGD(groups, fused=True),
        "muon": lambda: MuonAndAdamW(groups, 0.9),
    }[optimizer]()
    run = Trainee(Step(model, made, graphs=False), average)
    for step in range(steps):
        advance(run, step)
    return run


def advance(run: Trainee, step: int) -> None:
    """A step with random gradients."""
    for parameter in run.step.parameters:
        parameter.grad = torch.randn_like(parameter)
    run.step.optimizer.step()
    if run.average is not None:
        run.average.update(step + 1)


def copied(run: Trainee) -> dict[str, torch.Tensor]:
    """All tensors of a run, as they are now."""
    return {name: value.clone() for name, value in gathered(run)[0].items()}


def saved(
    setting: TrainConfig, *steps: int, run: Trainee | None = None, **changes
) -> dict[int, dict[str, torch.Tensor]]:
    """Writes checkpoints of these steps, and what was in each of them.

    Args:
        setting: of the run; `changes` are made to it before.
    """
    run, found = run or trainee(), {}
    for name, value in changes.items():
        setattr(setting, name, value)
    with Saver(setting.output, setting, {}) as save:
        for step in steps:
            advance(run, step)
            found[step] = copied(run)
            save(run, run.shown, step, 1.5)
    return found


def names(setting: TrainConfig) -> list[str]:
    """Whole checkpoints of a run, the oldest first."""
    return [path.name for path in checkpoint.held(setting.output)]


def restored(setting: TrainConfig, run: Trainee) -> tuple[int, float]:
    """Loads the newest checkpoint of a run."""
    state = resumable(setting.output, setting)
    return restore(state, run, setting.output)
