"""Training: one loop for every model and data set.

    batch -> loss -> backward -> clip -> optimizer -> log -> checkpoint

The samples of a step depend on seed and step alone, the random points of the loss on a seed inside
the model, and dropout on the generators' states in the checkpoint: a resumed run gives the weights
of one that was never stopped. No value is read back from the device except where it is logged.
Recipes: Mask2Former (Cheng et al., CVPR 2022): AdamW without decay on norms, embeddings and
position tables, a smaller rate for the backbone, the whole model's gradient clipped by its norm.
Segmenter (Strudel et al., ICCV 2021): SGD with momentum, a polynomial schedule, nothing clipped.
"""

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import Order, build_dataset, collate
from ..evaluation.evaluate import evaluate
from ..io.atomic_files import writable_folder
from ..models import SegmentationModel, build_model
from ..runtime.device import usable_device
from ..runtime.interrupt import Interrupt, leave_interrupts_to_parent
from ..structures.settings import Options
from ..weights.state_dicts import misfits
from . import checkpoint
from .config import TrainConfig
from .distributed import normalized
from .log import Log, ProgressBar
from .optimizer import build_optimizer, learning_rate
from .step import Step

# settings that a resumed run may change: none touches a step, except that more steps stretch the
# schedule: from the resume on, the rate is that of a run of so many
_FREE = (
    "output overwrite steps device workers threads log_every checkpoint_every evaluate_every "
    "evaluate_scenes threshold tensorboard data.root "
    "cuda_graphs gradient_checkpointing"
)


@dataclass
class Trained:
    """What `train` returns.

    Attributes:
        model: in eval mode.
        steps: trained in all, also before a resume.
        seconds: spent on them, evaluation left out.
        images_per_second: over that time.
    """

    model: SegmentationModel
    steps: int
    seconds: float
    images_per_second: float


def train(
    config: TrainConfig,
    resume: str | Path | None = None,
    dataset=None,
    progress: bool = True,
) -> Trained:
    """Trains a model and writes checkpoints, weights and a log to `config.output`.

    Args:
        config: what and how.
        resume: checkpoint, or folder of a run, to go on from; with more steps the schedule is the
            longer one's from there on.
        dataset: the training samples, with a length, `classes` and samples as `collate` takes
            them, and a true `passes` if it takes (index, pass) for one; None builds those of
            `config.data`.
        progress: show a bar.

    Raises:
        ValueError: a setting that does not fit the data, the checkpoint or the folder; a bad
            sample.
        OSError: the folder cannot be written to; found before work starts.
        FloatingPointError: the loss or the weights are not finite.
        KeyboardInterrupt: Ctrl-C. The step is finished and a checkpoint written before; a second
            Ctrl-C does not wait.
    """
    folder = writable_folder(config.output)
    state = None if resume is None else _open(resume, config)
    own = resume is not None and checkpoint.folder_of(resume).resolve() == folder.resolve()
    if not own and (folder / checkpoint.FILE).exists() and not config.overwrite:
        raise ValueError(
            f"{folder} holds a run: go on with --resume {folder}, choose another --output, "
            "or start anew with --overwrite"
        )
    data = build_dataset(config.data, "train", config.model) if dataset is None else dataset
    if len(data.classes) != config.model.num_labels:
        raise ValueError(
            f"train: model.num_labels must be {len(data.classes)}, the classes of the data, "
            f"got {config.model.num_labels}"
        )
    held_out = build_dataset(config.data, "val") if config.evaluate_every else None
    if config.threads:
        torch.set_num_threads(config.threads)
    device = usable_device(config.device)
    torch.manual_seed(config.seed)
    model = build_model(config.model, pretrained=state is None).to(device).train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = build_optimizer(model, config)
    graphs = config.cuda_graphs and config.optimizer != "muon"
    train_step = Step(model, optimizer, config.clip, config.precision, graphs)
    start, seconds = 0, 0.0
    if state is not None:
        start, seconds = _restore(state, train_step, resume)
    batches = _batches(data, config, start)
    if not own:
        _remove_run(folder)
    log = Log(folder, start, config.tensorboard, keep=own)
    with (
        log,
        ProgressBar(config.steps, start, config.batch_size, progress) as bar,
        Interrupt() as stop,
    ):
        for step in range(start, config.steps):
            began = time.perf_counter()
            batch = next(batches).to(device)
            batch.targets = normalized(batch.targets)
            rate = learning_rate(step, config)
            loss, losses = train_step(batch, rate)
            done = step + 1
            stopping = stop.asked and done < config.steps  # read once: it may change any time
            due = stopping or done == config.steps or done % config.checkpoint_every == 0
            line = None
            if due or done % config.log_every == 0 or done == start + 1:
                line = _line(done, loss, losses, rate)
            seconds += time.perf_counter() - began
            bar.advance(line)
            if config.evaluate_every and done % config.evaluate_every == 0:
                _check_weights(model.state_dict(), done)
                line = (line or {"step": done}) | {"metrics": _metrics(model, held_out, config)}
            if line is not None:
                log.write(line | {"seconds": round(seconds, 3)})
            if due:
                _save(folder, train_step, config, done, seconds)
            if stopping:
                raise KeyboardInterrupt(
                    f"stopped after step {done} of {config.steps}; "
                    f"go on with: segkern train --resume {folder}"
                )
        if stop.asked:
            raise KeyboardInterrupt(f"stopped after all {config.steps} steps; {folder} has them")
    return Trained(
        model.eval(), config.steps, seconds, config.steps * config.batch_size / max(seconds, 1e-9)
    )


def _batches(data, config: TrainConfig, start: int) -> Iterator:
    passes = getattr(data, "passes", False)
    order = Order(len(data), config.batch_size, config.seed, start, config.steps, passes)
    pack = partial(collate, num_labels=config.model.num_labels, divisor=config.model.input.divisor)
    loader = DataLoader(
        data,
        batch_sampler=order,
        collate_fn=pack,
        num_workers=config.workers,
        worker_init_fn=leave_interrupts_to_parent,
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    return iter(loader)


def _line(step: int, loss: Tensor, losses: dict[str, Tensor], lr: float) -> dict:
    """A line of the log: the total, and the parts of the last prediction.

    Raises:
        FloatingPointError: one of them is not finite.
    """
    last = [value.detach()[-1].double() for value in losses.values()]
    total, *parts = torch.stack([loss.detach().double(), *last]).tolist()
    names = [name.removeprefix("loss_").replace("cross_entropy", "class") for name in losses]
    values = dict(zip(names, parts))
    if not all(math.isfinite(x) for x in (total, *parts)):
        shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
        raise FloatingPointError(
            f"the loss is not finite at step {step} (total {total:.4g}; {shown}): lower --lr, "
            "raise --warmup, clip harder or use --precision fp32; earlier checkpoints are kept"
        )
    return {"step": step, "loss": total, "losses": values, "lr": lr}


def _metrics(model: SegmentationModel, data, config: TrainConfig) -> dict[str, float]:
    task = config.data.task
    with torch.random.fork_rng():
        value = evaluate(
            model,
            data,
            (task,),
            limit=config.evaluate_scenes,
            options=Options(threshold=config.threshold if task == "panoptic" else None),
            progress=False,
            cuda_graphs=False,  # their memory is the next step's
        )
    if task == "panoptic":
        value |= {"pq": value["things"]["pq"]}
    names = {"panoptic": ("pq", "class_accuracy", "dice"), "instance": ("ap", "ap50")}
    found = {name: value[name] for name in names.get(task, ("miou", "pixel_accuracy"))}
    return {name.replace("_", " "): x for name, x in found.items() if x is not None}


def _check_weights(weights: dict[str, Tensor], step: int) -> None:
    """Raises FloatingPointError for weights that are not finite."""
    spoilt = [k for k, v in weights.items() if v.is_floating_point() and not v.isfinite().all()]
    if spoilt:
        raise FloatingPointError(
            f"weights are not finite after step {step} ({spoilt[0]} and {len(spoilt) - 1} more): "
            "lower --lr or clip harder; earlier checkpoints are kept"
        )


def _remove_run(folder: Path) -> None:
    """Removes what an earlier run left, or its results would pass for those of the new one."""
    if (folder / checkpoint.FILE).exists():
        for part in ("model", "tensorboard"):
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / checkpoint.FILE).unlink()


def _save(folder, run: Step, config: TrainConfig, step: int, seconds: float) -> None:
    """Writes a checkpoint and model/, unless the weights are spoilt: those before stay then.

    Raises:
        FloatingPointError: weights that are not finite.
    """
    weights = run.model.state_dict()
    _check_weights(weights, step)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    checkpoint.save(
        folder,
        {
            "config": config.to_dict(),
            "step": step,
            "seconds": seconds,
            "seed": config.seed,
            "model": weights,
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
        },
    )
    run.model.save_pretrained(folder / "model")


def _open(path: str | Path, config: TrainConfig) -> dict:
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


def _restore(state: dict, run: Step, name) -> tuple[int, float]:
    """Loads weights, optimizer, scale and generators. Returns steps and seconds done.

    Raises:
        ValueError: the weights are not of this model; nothing is loaded then.
    """
    found = misfits(state["model"], run.model.state_dict())
    if found:
        raise ValueError(f"{name}: the weights are of another model; {'; '.join(found)}")
    try:
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state.get("scaler", {}))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name}: the optimizer's state is of another model ({error})") from error
    run.model.load_state_dict(state["model"])
    torch.set_rng_state(state["random"]["cpu"])
    if torch.cuda.is_available() and state["random"]["cuda"]:
        torch.cuda.set_rng_state_all(state["random"]["cuda"])
    return state["step"], state["seconds"]
