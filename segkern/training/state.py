"""What a training run keeps between sessions: its state is saved, checked and restored here."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..weights.state_dicts import misfits
from . import checkpoint
from .average import Average
from .config import TrainConfig
from .step import Step

# settings that a resumed run may change: none touches a step, except that more steps stretch the
# schedule: from the resume on, the rate is that of a run of so many
_FREE = (
    "output overwrite init fresh_head steps device workers threads log_every checkpoint_every "
    "evaluate_every best_metric patience evaluate_scenes threshold tensorboard data.root "
    "data.max_pixels cuda_graphs gradient_checkpointing"
)


class Trainee(NamedTuple):
    """What changes in a run.

    Attributes:
        step: trains the model.
        average: of its weights; None without.
    """

    step: Step
    average: Average | None

    @property
    def shown(self):
        """The model to evaluate and to save."""
        return self.step.model if self.average is None else self.average.model


def save(
    folder: Path, run: Trainee, config: TrainConfig, step: int, seconds: float, given: dict
) -> None:
    """Writes a checkpoint and model/, unless the weights are spoilt: those before stay then.

    Raises:
        FloatingPointError: weights that are not finite.
    """
    weights = run.step.model.state_dict()
    _check_weights(weights, step)
    average = {} if run.average is None else {"average": run.average.model.state_dict()}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    checkpoint.save(
        folder,
        {
            "config": config.to_dict(),
            **given,
            "step": step,
            "seconds": seconds,
            "seed": config.seed,
            "model": weights,
            **average,
            "optimizer": run.step.optimizer.state_dict(),
            "scaler": run.step.scaler.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
        },
    )
    run.shown.save_pretrained(folder / "model")


def resumable(path: str | Path, config: TrainConfig) -> dict:
    """A checkpoint that the config may go on from.

    Raises:
        ValueError: it is of another model, data set or recipe, or has all the steps.
    """
    state = checkpoint.load(path)
    stored = stored_config(path, state).to_dict()
    found = checkpoint.differences(stored, config.to_dict(), tuple(_FREE.split()))
    if found:
        raise ValueError(f"{path}: cannot go on from it: {'; '.join(found)}")
    if state["step"] >= config.steps:
        raise ValueError(
            f"{path}: has its {state['step']} steps; --steps must be larger to go on, "
            f"got {config.steps}"
        )
    return state


def stored_config(path: str | Path, state: dict | None = None) -> TrainConfig:
    """The settings of a run.

    Args:
        path: of its checkpoint, or its folder.
        state: the checkpoint, if it is read already.

    Raises:
        ValueError: no such checkpoint, or settings that this version does not know.
    """
    state = checkpoint.load(path) if state is None else state
    try:
        return TrainConfig.from_dict(state["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def restore(state: dict, run: Trainee, name) -> tuple[int, float]:
    """Loads weights, average, optimizer, scale and generators. Returns steps and seconds done.

    Raises:
        ValueError: the weights are not of this model; nothing is loaded then.
    """
    step, parts = run.step, {"model": run.step.model}
    if run.average is not None:
        parts["average"] = run.average.model
    found = [x for k, part in parts.items() for x in misfits(state.get(k, {}), part.state_dict())]
    if found:
        raise ValueError(f"{name}: the weights are of another model; {'; '.join(found)}")
    try:
        step.optimizer.load_state_dict(state["optimizer"])
        step.scaler.load_state_dict(state.get("scaler", {}))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name}: the optimizer's state is of another model ({error})") from error
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available() and state["random"]["cuda"]:
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return state["step"], state["seconds"]


def _check_weights(weights: dict[str, Tensor], step: int) -> None:
    """Raises FloatingPointError for weights that are not finite."""
    spoilt = [k for k, v in weights.items() if v.is_floating_point() and not v.isfinite().all()]
    if spoilt:
        raise FloatingPointError(
            f"weights are not finite after step {step} ({spoilt[0]} and {len(spoilt) - 1} more): "
            "lower --lr or clip harder; earlier checkpoints are kept"
        )
