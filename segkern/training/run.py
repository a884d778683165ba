"""What a run is made of, ready for its first step: folder, model, optimizer, batches.

settings -> folder, checkpoint to go on from -> data -> model -> processes -> optimizer
-> weights and moments of the checkpoint -> first batch -> an earlier run in the folder goes
"""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..io.atomic_files import writable_folder
from ..models import SegmentationModel, build_model, initialize
from ..runtime.processes import Processes
from ..runtime.shared_work import by_first
from . import checkpoint
from .average import Average
from .config import TrainConfig
from .feed import batches, data_sets
from .optimizer import build_optimizer, freeze
from .parallel import replicated
from .saver import restarted
from .state import Trainee, restore, resumable
from .step import Step, TrainingLoss
from .unmatched import Unmatched
from .unread import Unread
from .validation import BEST, Validation
from .zeros import Zeros


@dataclass
class Run:
    """A run in one of the processes that make it.

    Attributes:
        config: its settings, with those of the model that was given.
        processes: that make it.
        folder: that it writes to.
        own: whether it goes on in the folder of the checkpoint that it began with.
        device: of this process.
        trainee: what changes from step to step.
        whole: the model on the CPU, where each process holds a part of it; None where each holds
            all.
        frozen: parameters that do not train until the run ends.
        start, seconds: steps done before, and spent on them.
        begun: a line on the weights that it starts with; None where there is nothing to say.
        batches: as `feed.batches`.
        validation: evaluations; None without.
        queries: of the model, each of which finds one object; None where it has none.
        unmatched, unread: counts of what is lost.
        given: what its checkpoints say of data sets that the settings do not describe.
    """

    config: TrainConfig
    processes: Processes
    folder: Path
    own: bool
    device: torch.device
    trainee: Trainee
    whole: nn.Module | None
    frozen: list[nn.Parameter]
    start: int
    seconds: float
    begun: str | None
    batches: Iterator
    validation: Validation | None
    queries: int | None
    unmatched: Unmatched
    unread: Unread
    given: dict

    def shown(self) -> nn.Module:
        """The whole model to evaluate and to save; called by all."""
        if self.whole is None:
            return self.trainee.shown
        from .sharded import fill  # it takes long to import

        return fill(self.whole, self.trainee.shown)

    def result(self) -> SegmentationModel:
        """The model that training gives back, in eval mode; called by all."""
        model, average = self.trainee.step.model, self.trainee.average
        if self.whole is not None:
            model = self.shown()
        elif average is not None:
            model.load_state_dict(average.model.state_dict())
        return model.eval()


def prepare(
    processes: Processes,
    config: TrainConfig,
    resume: str | Path | None,
    dataset,
    progress: bool,
    model: SegmentationModel | None,
    val_dataset,
) -> Run:
    """Makes a run of what `train` was called with, whose errors it raises; called by all
    processes. Nothing of an earlier run in the folder is removed before all else is done."""
    config = _agreed(config, model, processes)
    folder = by_first(processes, lambda: writable_folder(config.output))
    resume = restarted(folder, processes) or resume
    state = None if resume is None else resumable(resume, config)
    if state is not None:
        _check_resumed(state, config, resume, dataset, val_dataset)
    own = resume is not None and checkpoint.folder_of(resume).resolve() == folder.resolve()
    if processes.first and not (own or config.overwrite):
        _check_free(folder)
    data, held_out = data_sets(config, dataset, val_dataset, progress, processes)
    processes.from_first()  # which may have read a large folder
    if config.threads:
        torch.set_num_threads(config.threads)
    device = processes.device(config.device)
    torch.manual_seed(config.seed)
    model, begun = _model(config, model, state is not None)
    model.to(device).train()
    cut = processes.count > 1 and config.parallel == "fsdp"  # each holds a part of the model
    whole = None
    if cut:
        from .sharded import to_fill  # it takes long to import

        whole = to_fill(model)
    frozen = freeze(model, config.freeze)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainee = _trainee(config, model, processes, cut)
    start, seconds = (0, 0.0) if state is None else restore(state, trainee, resume)
    if config.keep_zeros:
        trainee.step.zeros = Zeros(model, processes)
    parts = batches(data, config, start, processes)
    first = next(parts)  # before an earlier run is removed, for what is wrong with the files
    validation = None
    if held_out is not None:
        validation = Validation(held_out, config, folder, start, own, processes)
    own_val = val_dataset is not None or bool(state and state.get("own_val"))
    queries = getattr(config.model, "num_queries", None)
    images, most = config.batch_size * config.accumulate, getattr(data, "most_unread", 1.0)
    run = Run(
        config=config,
        processes=processes,
        folder=folder,
        own=own,
        device=device,
        trainee=trainee,
        whole=whole,
        frozen=frozen,
        start=start,
        seconds=seconds,
        begun=begun,
        batches=itertools.chain([first], parts),
        validation=validation,
        queries=queries,
        unmatched=Unmatched(queries, len(data), processes),
        unread=Unread(len(data), images, start, most, processes),
        given={"own_data": dataset is not None, "own_val": own_val},
    )
    if processes.first and not own:
        _remove_run(folder)
    return run


def _agreed(config: TrainConfig, model, processes: Processes) -> TrainConfig:
    """The settings, with those of a model that was given.

    Raises:
        TypeError, ValueError: they do not fit it, or several processes.
    """
    if processes.count > 1 and config.parallel == "fsdp" and config.optimizer == "muon":
        raise ValueError(
            "train: optimizer must be adamw or sgd where parallel is fsdp, got muon, which needs "
            "whole matrices"
        )
    if model is None:
        return config
    if not hasattr(model, "config"):
        raise TypeError(
            f"train: model must be a segmentation model (segkern.models), got a "
            f"{type(model).__name__}, which lacks config"
        )
    if config.init is not None:
        raise ValueError(f"train: init must be None where model is given, got {config.init!r}")
    return replace(config, model=model.config)


def _check_free(folder: Path) -> None:
    """Raises ValueError where a run lies in the folder of another; one that was stopped in its
    first checkpoint has nothing to lose."""
    checkpoints = checkpoint.held(folder)
    held = sorted({path.name if path.is_file() else checkpoint.FOLDER for path in checkpoints})
    others = (BEST,) if checkpoint.begun(folder) else (BEST, "model")
    held += [name for name in others if (folder / name).exists()]
    if held:
        go_on = f"go on with --resume {folder}, " if checkpoints else ""
        raise ValueError(
            f"{folder} holds a run ({', '.join(held)}): {go_on}choose another --output, "
            "or start anew with --overwrite"
        )


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


def _model(
    config: TrainConfig, model: SegmentationModel | None, resumed: bool
) -> tuple[SegmentationModel, str | None]:
    """The model that was given or one that is built, and a line on the weights it starts with."""
    if model is not None:
        return model, None
    fresh = not resumed and config.init is None
    if fresh and config.keep_zeros:
        raise ValueError(
            "train: keep_zeros must be False for a model of random weights, of which some "
            "begin as 0: name a pruned one with init, got True"
        )
    model = build_model(config.model, pretrained=fresh)
    if resumed or config.init is None:
        return model, None
    return model, initialize(model, config.init, config.fresh_head)


def _trainee(
    config: TrainConfig, model: SegmentationModel, processes: Processes, cut: bool
) -> Trainee:
    """The step of a model that is on its device, wrapped for the processes, and the average."""
    average = Average(model, config.ema) if config.ema else None
    loss = TrainingLoss(model)
    if cut:
        from .sharded import shard  # it takes long to import

        shard(loss, processes)
        if average is not None:
            shard(average.model, processes)
    elif processes.count > 1:
        loss = replicated(loss)
    optimizer = build_optimizer(model, config)
    graphs = config.cuda_graphs and config.optimizer != "muon" and config.accumulate == 1
    graphs = graphs and not cut
    step = Step(model, optimizer, config.clip, config.precision, graphs, loss, processes)
    return Trainee(step, average)


def _remove_run(folder: Path) -> None:
    """Removes what an earlier run left, or its results would pass for those of the new one."""
    if any((folder / name).exists() for name in (checkpoint.FOLDER, checkpoint.FILE, BEST)):
        for part in (checkpoint.FOLDER, "model", BEST, "tensorboard", "evaluation"):
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / checkpoint.FILE).unlink(missing_ok=True)
