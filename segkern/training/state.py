"""What a training run keeps between sessions, in one form for one process and for many.

    tensors    model.WEIGHT, average.WEIGHT, optimizer.WEIGHT.MOMENT, random.DEVICE
    the rest   settings, steps, the scale of the loss, the optimizer's groups by names of weights

A tensor has the name that its weight has in the plain model, wrapped by DDP or not; under
fully_shard each process has its part of it, and any other number of processes can read it.
"""

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
    "keep evaluate_every best_metric patience evaluate_scenes threshold tensorboard data.root "
    "data.max_pixels cuda_graphs gradient_checkpointing parallel"
)
# of a group of the optimizer: what the schedule sets, and what depends on the device
_NOT_KEPT = ("params", "lr", "foreach", "capturable", "differentiable", "fused")


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

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """One, or the parts of one that is made of several."""
        return tuple(getattr(self.step.optimizer, "parts", (self.step.optimizer,)))


def gathered(run: Trainee) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a run by name, which are its own and not copies, and what else changes in it.

    Where there are several processes, all call it. The generators are those of the first: others
    are seeded anew in every step.
    """
    from torch.distributed.checkpoint import state_dict  # slow to import: with the first use

    model = run.step.model
    tensors = _named("model", state_dict.get_model_state_dict(model))
    if run.average is not None:
        tensors |= _named("average", state_dict.get_model_state_dict(run.average.model))
    optimizer = state_dict.get_optimizer_state_dict(model, run.optimizers)
    for name, moments in optimizer["state"].items():
        tensors |= _named(f"optimizer.{name}", moments)
    if _is_first():
        tensors["random.cpu"] = torch.get_rng_state()
        if run.step.device == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(run.step.place)
    groups = [
        {"params": group["params"]} | {k: v for k, v in group.items() if k not in _NOT_KEPT}
        for group in optimizer["param_groups"]
    ]
    return tensors, {"groups": groups, "scaler": run.step.scaler.state_dict()}


def resumable(path: str | Path, config: TrainConfig) -> dict:
    """What a checkpoint says that the config may go on from, whose files are whole.

    Raises:
        ValueError: it is spoilt, of another model, data set or recipe, or has all the steps.
    """
    state = checkpoint.whole(path)
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
        state: what the checkpoint says, if it is read already.

    Raises:
        ValueError: no such checkpoint, or settings that this version does not know.
    """
    state = checkpoint.settings(path) if state is None else state
    try:
        return TrainConfig.from_dict(state["config"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def restore(state: dict, run: Trainee, name: str | Path) -> tuple[int, float]:
    """Loads weights, average, optimizer, scale and generators. Returns steps and seconds done.

    Where there are several processes, all call it; as many as wrote the checkpoint, or others.

    Args:
        state: of `resumable`.
        run: nothing was trained in it yet.
        name: of the checkpoint, as `checkpoint.find` takes it.

    Raises:
        ValueError: the weights or the optimizer's state are of another model; nothing is loaded
            then.
    """
    from ..weights import shards

    for part in run.optimizers:
        part.zero_grad()  # of a model that was trained before: such an optimizer gets no moments
    path, own = checkpoint.find(name), gathered(run)[0]
    if path.is_dir():
        found, groups = shards.empty_tensors(path, "meta"), state["groups"]
    else:
        found, groups = _of_one_file(state, run, name)
    _check(found, groups, run, own, name)
    wanted = {key: own[key] for key in found if key in own}
    with torch.no_grad():
        if path.is_dir():
            shards.read(wanted, path)
        else:
            for key, tensor in wanted.items():
                tensor.copy_(_as_distributed(found[key], tensor))
    _put(run, wanted, groups)
    run.step.scaler.load_state_dict(state.get("scaler", {}))
    if "random.cpu" in wanted:
        torch.set_rng_state(wanted["random.cpu"])
    if "random.cuda" in wanted:
        torch.cuda.set_rng_state(wanted["random.cuda"], run.step.place)
    return state["step"], state["seconds"]


def _is_first() -> bool:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not several or torch.distributed.get_rank() == 0


def _named(prefix: str, tensors: dict) -> dict[str, Tensor]:
    found = {f"{prefix}.{name}": value for name, value in tensors.items() if value is not None}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor to be saved, got a {type(value).__name__}")
    return found


def _part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def _check(found: dict, groups: list[dict], run: Trainee, own: dict, name) -> None:
    """Raises ValueError where what was found does not fit."""
    parts = ["model"] if run.average is None else ["model", "average"]
    wrong = [x for part in parts for x in misfits(_part(part, found), _part(part, own))]
    if wrong:
        raise ValueError(f"{name}: the weights are of another model; {'; '.join(wrong)}")
    theirs, mine = (_part("optimizer", tensors) for tensors in (found, own))
    # a weight that had no gradient yet has no moments
    wrong = misfits(theirs, {k: v for k, v in mine.items() if k in theirs})
    names = [{frozenset(g["params"]) for g in x} for x in (groups, _groups(run))]
    if names[0] != names[1]:
        wrong.append("its weights are grouped otherwise")
    if wrong:
        raise ValueError(f"{name}: the optimizer's state is of another model ({'; '.join(wrong)})")


def _groups(run: Trainee) -> list[dict]:
    """Groups of the optimizer with the names of their weights."""
    names = {parameter: name for name, parameter in run.step.model.named_parameters()}
    return [
        group | {"params": [names[p] for p in group["params"]]} for group in _optimizer_groups(run)
    ]


def _optimizer_groups(run: Trainee) -> list[dict]:
    return [group for part in run.optimizers for group in part.param_groups]


def _put(run: Trainee, tensors: dict[str, Tensor], groups: list[dict]) -> None:
    """Makes tensors and groups those of the run."""
    from torch.distributed.checkpoint import state_dict

    state_dict.set_model_state_dict(run.step.model, _part("model", tensors))
    if run.average is not None:
        state_dict.set_model_state_dict(run.average.model, _part("average", tensors))
    moments: dict[str, dict] = {}
    for key, value in _part("optimizer", tensors).items():
        name, _, moment = key.rpartition(".")
        moments.setdefault(name, {})[moment] = value
    kept = {frozenset(group["params"]): group for group in groups}
    for named, group in zip(_groups(run), _optimizer_groups(run)):
        numbers = kept[frozenset(named["params"])]
        group |= {key: value for key, value in numbers.items() if key not in _NOT_KEPT}
    if not moments:  # of an optimizer that keeps none, or of steps that were all left out
        for part in run.optimizers:
            part.state.clear()
        return
    state_dict.set_optimizer_state_dict(
        run.step.model,
        run.optimizers,
        {"state": moments, "param_groups": _groups(run)},
        options=state_dict.StateDictOptions(strict=False),  # not all weights have moments
    )


def _of_one_file(state: dict, run: Trainee, name) -> tuple[dict[str, Tensor], list[dict]]:
    """Tensors by name and groups of a last.pt, whose optimizer numbered its weights.

    Raises:
        ValueError: it has another number of weights.
    """
    tensors = _named("model", state["model"]) | _named("average", state.get("average", {}))
    tensors["random.cpu"] = state["random"]["cpu"]
    if cuda := state["random"]["cuda"]:
        tensors["random.cuda"] = cuda[min(run.step.place.index or 0, len(cuda) - 1)]
    mine, groups = _groups(run), []
    for part in state["optimizer"].get("parts", [state["optimizer"]]):
        names = {}
        for group in part["param_groups"]:
            here = mine[len(groups)]["params"] if len(groups) < len(mine) else []
            if len(here) != len(group["params"]):
                raise ValueError(
                    f"{name}: the optimizer's state is of another model (a group of "
                    f"{len(group['params'])} weights instead of {len(here)})"
                )
            names |= dict(zip(group["params"], here))
            groups.append(group | {"params": here})
        for number, moments in part["state"].items():
            tensors |= _named(f"optimizer.{names[number]}", moments)
    return tensors, groups


def _as_distributed(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process has of one like `like`."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
