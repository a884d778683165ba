"""Training: one loop for every model and data set.

    batch -> loss -> backward -> clip -> optimizer -> log -> checkpoint

The samples of a step depend on seed and step alone, the random points of the loss on a seed inside
the model, and dropout on the generators' states in the checkpoint: a resumed run gives the weights
of one that was never stopped. No value is read back from the device except where it is logged.
Several processes run this loop side by side on their parts of each batch (parallel.py); the first
alone writes, shows and measures.
Recipes: Mask2Former (Cheng et al., CVPR 2022): AdamW without decay on norms, embeddings and
position tables, a smaller rate for the backbone, the whole model's gradient clipped by its norm.
Segmenter (Strudel et al., ICCV 2021): SGD with momentum, a polynomial schedule, nothing clipped.
"""

import contextlib
import copy
import itertools
import math
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import Folder, JointTasks, Order, build_dataset, collate
from ..evaluation.evaluate import check_dataset, some_of
from ..io.atomic_files import writable_folder
from ..models import SegmentationModel, build_model, initialize
from ..runtime.interrupt import Interrupt, leave_interrupts_to_parent
from ..runtime.processes import ALONE, Processes, joined
from . import checkpoint
from .average import Average
from .batch_norm import synchronised
from .config import TrainConfig
from .distributed import together
from .log import Log, ProgressBar
from .optimizer import backbone_share, build_optimizer, freeze, learning_rate
from .parallel import replicated, reseed
from .saver import Saver, restarted
from .state import Trainee, restore, resumable
from .state import stored_config as stored_config
from .step import Step, TrainingLoss
from .unmatched import Unmatched
from .unread import Unread
from .validation import BEST, Validation
from .zeros import Zeros


@dataclass
class Trained:
    """What `train` returns.

    Attributes:
        model: in eval mode; with the average of its weights where one is kept.
        steps: trained in all, also before a resume; fewer than asked for where patience ended.
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
    model: SegmentationModel | None = None,
    val_dataset=None,
) -> Trained:
    """Trains a model and writes checkpoints, weights and a log to `config.output`.

    Args:
        config: what and how.
        resume: checkpoint, or folder of a run, to go on from; with more steps the schedule is the
            longer one's from there on.
        dataset: the training samples, with a length, `classes` and samples as `collate` takes
            them, and a true `passes` if it takes (index, pass) for one; None builds those of
            `config.data`. A run on it needs it again to be resumed.
        progress: show a bar, and a line for each evaluation.
        model: to train as it is, in place; its config stands for `config.model`. None builds one.
        val_dataset: for evaluations, as `evaluate` takes it; None builds the val split of
            `config.data`, where `dataset` is None, too. A run on it needs it again to be resumed.

    Raises:
        ValueError: a setting that does not fit the data, the checkpoint or the folder; a map of a
            folder that is bad, before the first step; a bad sample; a batch that several processes
            cannot share.
        OSError: the folder cannot be written to; found before work starts.
        FloatingPointError: the loss or the weights are not finite.
        KeyboardInterrupt: Ctrl-C, of any process: all finish the same step, and a checkpoint is
            written before; a second Ctrl-C does not wait.
    """
    with joined() as processes:
        return _train(processes, config, resume, dataset, progress, model, val_dataset)


def _train(
    processes: Processes, config: TrainConfig, resume, dataset, progress: bool, model, val_dataset
) -> Trained:
    """`train` in one of the processes that make a run."""
    progress = progress and processes.first
    cut = processes.count > 1 and config.parallel == "fsdp"  # each holds a part of the model
    if cut:  # here: it takes long to import
        from .sharded import fill, shard
    if cut and config.optimizer == "muon":
        raise ValueError(
            "train: optimizer must be adamw or sgd where parallel is fsdp, got muon, which needs "
            "whole matrices"
        )
    if model is not None:
        if not hasattr(model, "config"):
            raise TypeError(
                f"train: model must be a segmentation model (segkern.models), got a "
                f"{type(model).__name__}, which lacks config"
            )
        if config.init is not None:
            raise ValueError(f"train: init must be None where model is given, got {config.init!r}")
        config = replace(config, model=model.config)
    folder = writable_folder(config.output) if processes.first else config.output
    resume = restarted(folder) or resume
    state = None if resume is None else resumable(resume, config)
    if state is not None:
        _check_resumed(state, config, resume, dataset, val_dataset)
    own = resume is not None and checkpoint.folder_of(resume).resolve() == folder.resolve()
    checkpoints = checkpoint.held(folder)  # whole ones: of a first one that was stopped none is
    held = sorted({path.name if path.is_file() else checkpoint.FOLDER for path in checkpoints})
    others = (BEST,) if checkpoint.begun(folder) else (BEST, "model")
    held += [name for name in others if (folder / name).exists()]
    if held and not own and not config.overwrite and processes.first:
        go_on = f"go on with --resume {folder}, " if checkpoints else ""
        raise ValueError(
            f"{folder} holds a run ({', '.join(held)}): {go_on}choose another --output, "
            "or start anew with --overwrite"
        )
    data, held_out = _data(config, dataset, val_dataset, progress, processes.first)
    processes.from_first()  # which may have read a large folder
    if config.threads:
        torch.set_num_threads(config.threads)
    device = processes.device(config.device)
    torch.manual_seed(config.seed)
    if model is None:
        fresh = state is None and config.init is None
        if fresh and config.keep_zeros:
            raise ValueError(
                "train: keep_zeros must be False for a model of random weights, of which some "
                "begin as 0: name a pruned one with init, got True"
            )
        model = build_model(config.model, pretrained=fresh)
    start, seconds, begun = 0, 0.0, None
    if state is None and config.init is not None:
        begun = initialize(model, config.init, config.fresh_head)
    model.to(device).train()
    whole = copy.deepcopy(model).cpu() if cut else model
    frozen = freeze(model, config.freeze)  # until the run ends, however it does
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    average = Average(model, config.ema) if config.ema else None
    loss = TrainingLoss(model)
    if cut:
        shard(loss, processes)
        if average is not None:
            shard(average.model, processes)
    elif processes.count > 1:
        loss = replicated(loss)
    optimizer = build_optimizer(model, config)
    graphs = config.cuda_graphs and config.optimizer != "muon" and config.accumulate == 1
    graphs = graphs and not cut
    train_step = Step(model, optimizer, config.clip, config.precision, graphs, loss, processes)
    run = Trainee(train_step, average)
    if state is not None:
        start, seconds = restore(state, run, resume)
    if config.keep_zeros:
        train_step.zeros = Zeros(model)
    batches = _batches(data, config, start, processes)
    first = next(batches)  # before an earlier run is removed, for what is wrong with the files
    validation = None
    if held_out is not None and processes.first:
        validation = Validation(held_out, config, folder, start, own)
    queries = getattr(config.model, "num_queries", None)
    unmatched = Unmatched(queries, len(data), processes)
    own_val = val_dataset is not None or bool(state and state.get("own_val"))
    given = {"own_data": dataset is not None, "own_val": own_val}
    images, most = config.batch_size * config.accumulate, getattr(data, "most_unread", 1.0)
    unread = Unread(len(data), images, start, most)
    log = contextlib.nullcontext()
    if processes.first:
        if not own:
            _remove_run(folder)
        log = Log(folder, start, config.tensorboard, keep=own)
    with (
        _given_back(frozen),
        synchronised(model, processes) if config.sync_batch_norm else contextlib.nullcontext(),
        _without_denormals(),
        log,
        ProgressBar(config.steps, start, config.batch_size * config.accumulate, progress) as bar,
        Interrupt() as stop,
        Saver(folder, config, given, processes) as save,
    ):
        if begun is not None:
            bar.show(begun)
        batches = itertools.chain([first], batches)
        for step in range(start, config.steps):
            began = time.perf_counter()
            done = step + 1
            parts = [next(batches) for _ in range(config.accumulate)]
            if told := unmatched(parts, done == config.steps):
                bar.show(told)
            if told := unread(parts, done == config.steps):
                bar.show(told)
            agreed = together([part.targets for part in parts], queries, processes.group)
            for part, targets in zip(parts, agreed):
                part.targets = targets
            reseed(config.seed, step, processes.rank)
            rate = learning_rate(step, config)
            if hasattr(model, "anneal"):
                model.anneal(step / config.steps)
            loss, losses = train_step(parts, rate, backbone_share(step, config))
            if run.average is not None:
                run.average.update(done)
            # read once: it may change any time
            stopping = processes.any(stop.asked) and done < config.steps
            measure = config.evaluate_every and done % config.evaluate_every == 0
            due = (
                measure or stopping or done == config.steps or done % config.checkpoint_every == 0
            )
            line = None
            if due or done % config.log_every == 0 or done == start + 1:
                line = _line(done, loss, losses, rate, config.precision, processes)
            seconds += time.perf_counter() - began
            bar.advance(line)
            if due:  # before the evaluation, whose failure shall cost nothing
                shown = fill(whole, run.shown) if cut else run.shown
                save(run, shown, done, seconds)
                waited = 0
                if measure and processes.first:
                    metrics, text = validation(shown.to(device), done)
                    if cut:
                        shown.cpu()
                    line |= {"metrics": metrics}
                    bar.show(text)
                    waited = validation.waited(done)
                waited = processes.from_first(waited)
            if line is not None and processes.first:
                log.write(line | {"seconds": round(seconds, 3)})
            if stopping:
                save.wait()
                raise KeyboardInterrupt(
                    f"stopped after step {done} of {config.steps}; "
                    f"go on with: segkern train --resume {folder}"
                )
            if measure and config.patience and waited >= config.patience:
                bar.show(f"stopped: {config.patience} evaluations without a better figure")
                break
        save.wait()
        if processes.any(stop.asked):
            raise KeyboardInterrupt(f"stopped after {done} steps; {folder} has them")
    if cut:
        model = fill(whole, run.shown)
    elif run.average is not None:
        model.load_state_dict(run.average.model.state_dict())
    images = done * config.batch_size * config.accumulate
    return Trained(model.eval(), done, seconds, images / max(seconds, 1e-9))


@contextlib.contextmanager
def _given_back(frozen: list[torch.nn.Parameter]) -> Iterator[None]:
    """Parameters that were frozen for a run train again after it."""
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_()


@contextlib.contextmanager
def _without_denormals() -> Iterator[None]:
    """Numbers below 1e-38, which a CPU multiplies slowly, are 0: gradients of attention that looks
    at few places are full of them."""
    before = not torch.tensor(1e-39).mul(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _check_resumed(state: dict, config: TrainConfig, name, dataset, val_dataset) -> None:
    """Raises ValueError where a run cannot have again what was handed to it, or shall begin with
    other weights than its own."""
    val_needed = config.evaluate_every and state.get("own_val")
    for argument, given, needed in (
        ("dataset", dataset, state.get("own_data")),
        ("val_dataset", val_dataset, val_needed),
    ):
        if needed and given is None:
            raise ValueError(
                f"train: {argument} must be given to go on with {name}, which was handed one that "
                "its settings do not describe, got None"
            )
    if config.init not in (None, state["config"].get("init")):
        raise ValueError(
            f"train: init (--init) must be left out where a run goes on, got {config.init}"
        )


def _data(config: TrainConfig, dataset, val_dataset, progress: bool, checks: bool) -> tuple:
    """The data sets for training and, where there are evaluations, for those; with `checks` every
    map of a folder is read.

    Raises:
        ValueError: their classes are not the model's, one is missing, or a map is bad.
    """
    data = build_dataset(config.data, "train", config.model) if dataset is None else dataset
    held_out = val_dataset
    if val_dataset is not None and not config.evaluate_every:
        raise ValueError("train: evaluate_every must be at least 1 where val_dataset is given")
    if config.evaluate_every and held_out is None:
        if dataset is not None:
            raise ValueError(
                "train: val_dataset must be given where dataset is and evaluate_every is not 0, "
                "got None"
            )
        held_out = build_dataset(config.data, "val")
    for name, part in (("dataset", data), ("val_dataset", held_out)):
        if part is None:
            continue
        if name == "val_dataset":
            part = part.dataset if isinstance(part, DataLoader) else part
            check_dataset(part, config.model, (config.task,), "train: val_dataset")
        elif (classes := getattr(part, "classes", None)) is None:
            raise ValueError("train: dataset must have `classes`, the names of its labels")
        elif len(classes) != config.model.num_labels:
            raise ValueError(
                f"train: model.num_labels must be {len(classes)}, the classes of the data, "
                f"got {config.model.num_labels}"
            )
        if checks and isinstance(part, Folder) and (absent := part.check(progress)):
            split = "training" if name == "dataset" else "val"
            warnings.warn(
                f"train: {len(absent)} of {len(part.classes)} classes occur in no map of the "
                f"{split} split (255 or 65535 stands for no class): {some_of(absent)}",
                stacklevel=3,
            )
    if getattr(config.model, "joint_tasks", False):
        stuff = getattr(data, "stuff", config.model.labels.stuff)
        data = JointTasks(data, stuff, config.seed)
    return data, held_out


def _batches(data, config: TrainConfig, start: int, processes: Processes = ALONE) -> Iterator:
    passes = getattr(data, "passes", False)
    first, last = start * config.accumulate, config.steps * config.accumulate
    shuffled = getattr(data, "shuffled", None)
    own = processes.rank, processes.count
    order = Order(len(data), config.batch_size, config.seed, first, last, passes, *own, shuffled)
    pack = partial(
        collate,
        num_labels=config.model.num_labels,
        divisor=config.model.input.divisor,
        void=config.void,
    )
    loader = DataLoader(
        data,
        batch_sampler=order,
        collate_fn=pack,
        num_workers=config.workers,
        worker_init_fn=leave_interrupts_to_parent,
        generator=torch.Generator(),  # or the loader would draw from the global one
    )
    return iter(loader)


def _line(
    step: int,
    loss: Tensor,
    losses: dict[str, Tensor],
    lr: float,
    precision: str,
    processes: Processes = ALONE,
) -> dict:
    """A line of the log: the total, and the parts of the last prediction, of the joined batch.

    Raises:
        FloatingPointError: one of them is not finite.
    """
    last = [value.detach()[-1].double() for value in losses.values()]
    total, *parts = processes.mean(torch.stack([loss.detach().double(), *last])).tolist()
    names = [name.removeprefix("loss_").replace("cross_entropy", "class") for name in losses]
    values = dict(zip(names, parts))
    if not all(math.isfinite(x) for x in (total, *parts)):
        shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
        cause = "lower --lr, raise --warmup or clip harder"
        if step == 1:  # of the weights that training starts from: no rate has touched them
            cause = "no rate has touched the weights yet: see those it starts from, and the labels"
        if precision != "fp32":
            cause += ", or use --precision fp32"
        raise FloatingPointError(
            f"the loss is not finite at step {step} (total {total:.4g}; {shown}): {cause}; "
            "earlier checkpoints are kept"
        )
    return {"step": step, "loss": total, "losses": values, "lr": lr}


def _remove_run(folder: Path) -> None:
    """Removes what an earlier run left, or its results would pass for those of the new one."""
    if any((folder / name).exists() for name in (checkpoint.FOLDER, checkpoint.FILE, BEST)):
        for part in (checkpoint.FOLDER, "model", BEST, "tensorboard", "evaluation"):
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / checkpoint.FILE).unlink(missing_ok=True)
