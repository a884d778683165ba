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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from . import checkpoint
from .data import DataConfig, DigitsConfig, FolderConfig, Order, build_dataset, collate
from .evaluate import evaluate
from .files import writable_folder
from .models import (
    CLASSES,
    Config,
    Mask2FormerConfig,
    Model,
    SegmenterConfig,
    build_model,
    kind_of,
)
from .optimizer import build_optimizer, learning_rate
from .process import Interrupt, leave_interrupts_to_parent, usable_device
from .step import PRECISIONS, Step
from .trainlog import Log, Meter
from .weights.fit import misfits

# settings that a resumed run may change: none touches a step, except that more steps stretch the
# schedule: from the resume on, the rate is that of a run of so many
_FREE = (
    "output overwrite steps device workers threads log_every checkpoint_every evaluate_every "
    "evaluate_scenes threshold tensorboard data.root "
    "cuda_graphs gradient_checkpointing"
)


@dataclass
class TrainConfig:
    """How to train.

    Attributes:
        output: folder of the run: last.pt and model/, both of the last checkpoint, and log.jsonl.
        overwrite: start anew in a folder that holds a run; its files are removed.
        steps: batches to train on. A resumed run that gets more follows the longer schedule from
            there on.
        batch_size: images of a step.
        lr: highest learning rate.
        backbone_lr_factor: the backbone's rate over the others'.
        min_lr: least learning rate of the schedule.
        optimizer: "adamw", "sgd", or "muon" for the matrices inside blocks with AdamW for the
            rest, which takes fewer steps from scratch and more time for each.
        momentum: of SGD and Muon.
        weight_decay: of the optimizer.
        schedule: "cosine" or "poly" (power 0.9) to min_lr, or "steps": a tenth at 8/9 of the steps
            and again at 26/27.
        warmup: steps in which the rate rises.
        clip: largest norm of the gradient; 0 does not clip.
        precision: "fp32", "bf16" for autocast, or "fp16" for autocast with a scaled loss.
        cuda_graphs: on a GPU capture the whole step in a CUDA graph for each size of a batch; not
            with Muon, whose rate is a number of the host.
        gradient_checkpointing: keep only the inputs of blocks and layers for backward, and compute
            the rest again: less memory, more time.
        seed: of the weights, the order of the samples and dropout.
        device: "cpu", "cuda", or "auto" for cuda where there are kernels for it.
        threads: of the CPU; 0 keeps torch's own choice.
        workers: processes that load data; 0 loads in this one.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints; the last step has one.
        evaluate_every: steps between evaluations on the val split; 0 for none.
        evaluate_scenes: images of each.
        threshold: least score of a segment in evaluation, 0 to 1.
        tensorboard: write curves for it, too, where it is installed.
        data: the data set.
        model: the model.
    """

    output: Path = Path("runs/digits")
    overwrite: bool = False
    steps: int = 2000
    batch_size: int = 8
    lr: float = 1e-4
    backbone_lr_factor: float = 0.1
    min_lr: float = 0.0
    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.05
    schedule: Literal["cosine", "poly", "steps"] = "cosine"
    warmup: int = 10
    clip: float = 0.01
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    cuda_graphs: bool = True
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    workers: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    evaluate_every: int = 0
    evaluate_scenes: int = 100
    threshold: float = 0.8
    tensorboard: bool = True
    data: DataConfig = field(default_factory=DigitsConfig)
    model: Config = field(default_factory=lambda: Mask2FormerConfig.tiny(11))

    def __post_init__(self):
        self.output = Path(self.output)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"TrainConfig: threshold must be in [0, 1], got {self.threshold}")
        for names, least in (
            ("steps batch_size log_every checkpoint_every evaluate_scenes", 1),
            ("lr min_lr backbone_lr_factor momentum weight_decay warmup clip seed", 0),
            ("threads workers evaluate_every", 0),
        ):
            for name in names.split():
                if not getattr(self, name) >= least:
                    raise ValueError(
                        f"TrainConfig: {name} must be >= {least}, got {getattr(self, name)}"
                    )
        for name, known in (
            ("schedule", ("cosine", "poly", "steps")),
            ("precision", tuple(PRECISIONS)),
            ("optimizer", ("adamw", "sgd", "muon")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"TrainConfig: {name} must be one of {', '.join(known)}, "
                    f"got {getattr(self, name)!r}"
                )
        if isinstance(self.data, FolderConfig) and not isinstance(self.model, SegmenterConfig):
            raise ValueError(
                "TrainConfig: model must be a SegmenterConfig where data is a FolderConfig, "
                f"got a {type(self.model).__name__}"
            )

    def to_dict(self) -> dict:
        """Nested plain types, as checkpoints keep it."""
        model = {"type": kind_of(self.model)} | asdict(self.model)
        data = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.data).items()}
        return asdict(self) | {"output": str(self.output), "data": data, "model": model}

    @classmethod
    def from_dict(cls, settings: dict) -> "TrainConfig":
        """The config that `to_dict` described.

        Raises:
            ValueError: there are settings that this version does not know or allow.
        """
        try:
            model, data = dict(settings["model"]), settings["data"]
            parts = {
                "data": (FolderConfig if "root" in data else DigitsConfig)(**data),
                "model": CLASSES[model.pop("type")][0](**model),
            }
            return cls(**(settings | parts))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"settings of another version of segkern ({error})") from error


@dataclass
class Trained:
    """What `train` returns.

    Attributes:
        model: in eval mode.
        steps: trained in all, also before a resume.
        seconds: spent on them, evaluation left out.
        images_per_second: over that time.
    """

    model: Model
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
        Meter(config.steps, start, config.batch_size, progress) as meter,
        Interrupt() as stop,
    ):
        for step in range(start, config.steps):
            began = time.perf_counter()
            batch = next(batches).to(device)
            rate = learning_rate(step, config)
            loss, losses = train_step(batch, rate)
            done = step + 1
            stopping = stop.asked and done < config.steps  # read once: it may change any time
            due = stopping or done == config.steps or done % config.checkpoint_every == 0
            line = None
            if due or done % config.log_every == 0 or done == start + 1:
                line = _line(done, loss, losses, rate)
            seconds += time.perf_counter() - began
            meter.advance(line)
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
    pack = partial(collate, num_labels=config.model.num_labels, divisor=config.model.size_divisor)
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


def _metrics(model: Model, data, config: TrainConfig) -> dict[str, float]:
    task = config.data.task
    with torch.random.fork_rng():
        value = evaluate(
            model,
            data,
            (task,),
            limit=config.evaluate_scenes,
            object_mask_threshold=config.threshold,
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
    found = checkpoint.differences(state["config"], config.to_dict(), tuple(_FREE.split()))
    if found:
        raise ValueError(f"{path}: cannot go on from it: {'; '.join(found)}")
    if state["step"] >= config.steps:
        raise ValueError(
            f"{path}: has its {state['step']} steps; --steps must be larger to go on, "
            f"got {config.steps}"
        )
    return state


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
