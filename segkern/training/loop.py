"""Training: one loop for every model and data set.

    batch -> loss -> backward -> clip -> optimizer -> log -> checkpoint

The samples of a step depend on seed and step alone, the random points of the loss on a seed inside
the model, and dropout on the generators' states in the checkpoint: a resumed run gives the weights
of one that was never stopped. No value is read back from the device except where it is logged.
Several processes run this loop side by side on their parts of each batch (parallel.py); the first
alone writes and shows. What it is made of is prepared in run.py.
Recipes: Mask2Former (Cheng et al., CVPR 2022): AdamW without decay on norms, embeddings and
position tables, a smaller rate for the backbone, the whole model's gradient clipped by its norm.
Segmenter (Strudel et al., ICCV 2021): SGD with momentum, a polynomial schedule, nothing clipped.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.collate import Batch
from ..models import SegmentationModel
from ..runtime.interrupt import Interrupt
from ..runtime.processes import ALONE, Processes, joined
from .batch_norm import synchronised
from .config import TrainConfig
from .distributed import together
from .log import Log, ProgressBar
from .optimizer import backbone_share, learning_rate
from .parallel import reseed
from .run import Run, prepare
from .saver import Saver


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
        progress = progress and processes.first
        run = prepare(processes, config, resume, dataset, progress, model, val_dataset)
        return _train(run, progress)


def _train(run: Run, progress: bool) -> Trained:
    """The steps of a run, in one of the processes that make it."""
    config, processes, trainee = run.config, run.processes, run.trainee
    model, seconds, images = trainee.step.model, run.seconds, config.batch_size * config.accumulate
    with (
        _given_back(run.frozen),
        synchronised(model, processes) if config.sync_batch_norm else contextlib.nullcontext(),
        _without_denormals(),
        _log(run) as log,
        ProgressBar(config.steps, run.start, images, progress) as bar,
        Interrupt() as stop,
        Saver(run.folder, config, run.given, processes) as save,
    ):
        if run.begun is not None:
            bar.show(run.begun)
        for step in range(run.start, config.steps):
            began = time.perf_counter()
            done = step + 1
            parts = _batch(run, done, bar)
            reseed(config.seed, step, processes.rank)
            rate = learning_rate(step, config)
            if hasattr(model, "anneal"):
                model.anneal(step / config.steps)
            loss, losses = trainee.step(parts, rate, backbone_share(step, config))
            if trainee.average is not None:
                trainee.average.update(done)
            # read once: it may change any time
            stopping = processes.any(stop.asked) and done < config.steps
            measure = config.evaluate_every and done % config.evaluate_every == 0
            due = (
                measure or stopping or done == config.steps or done % config.checkpoint_every == 0
            )
            line = None
            if due or done % config.log_every == 0 or done == run.start + 1:
                line = _line(done, loss, losses, rate, config.precision, processes)
            seconds += time.perf_counter() - began
            bar.advance(line)
            waited = 0
            if due:  # before the evaluation, whose failure shall cost nothing
                shown = run.shown()
                save(trainee, shown, done, seconds)
                if measure:
                    metrics, text = run.validation(shown.to(run.device), done)
                    if run.whole is not None:
                        shown.cpu()
                    line |= {"metrics": metrics}
                    bar.show(text)
                    waited = run.validation.waited(done)
            if line is not None and log is not None:
                log.write(line | {"seconds": round(seconds, 3)})
            if stopping:
                save.wait()
                raise KeyboardInterrupt(
                    f"stopped after step {done} of {config.steps}; "
                    f"go on with: segkern train --resume {run.folder}"
                )
            if measure and config.patience and waited >= config.patience:
                bar.show(f"stopped: {config.patience} evaluations without a better figure")
                break
        save.wait()
        if processes.any(stop.asked):
            raise KeyboardInterrupt(f"stopped after {done} steps; {run.folder} has them")
    return Trained(run.result(), done, seconds, done * images / max(seconds, 1e-9))


def _log(run: Run) -> contextlib.AbstractContextManager:
    """The log of a run, which the first process alone writes; None in the others."""
    if not run.processes.first:
        return contextlib.nullcontext()
    return Log(run.folder, run.start, run.config.tensorboard, keep=run.own)


def _batch(run: Run, done: int, bar: ProgressBar) -> list[Batch]:
    """The parts of the next step's batch, which know by how much to divide; what is lost of them
    is told at the end of a pass."""
    parts = [next(run.batches) for _ in range(run.config.accumulate)]
    last = done == run.config.steps
    for count in (run.unmatched, run.unread):
        if told := count(parts, last):
            bar.show(told)
    agreed = together([part.targets for part in parts], run.queries, run.processes.group)
    for part, targets in zip(parts, agreed):
        part.targets = targets
    return parts


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
