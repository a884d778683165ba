"""Writes the checkpoints of a run: whole ones alone have a name, and the old ones go after that.

    state -> finite in all processes? -> .STEP/ -> later ones of another course go -> STEP/ -> old
    ones go

On a GPU, and where the state is large, training goes on while a copy is written; one at a time.
"""

import os
import shutil
import uuid
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from ..runtime.processes import ALONE, Processes
from ..runtime.shared_work import by_first
from . import checkpoint
from .config import TrainConfig
from .parallel import own_part
from .state import Trainee, gathered

# bytes of the tensors of a process from which a CPU's training goes on meanwhile; a smaller state
# is written before its copy would be worth it
LARGE = 1 << 28
_PATIENCE = timedelta(hours=1)  # with the slowest disk; a process that ends is noticed at once


class Saver:
    """Writes checkpoints and model/; a context, which ends when the last one is written.

    Args:
        folder: of the run.
        config: of the run.
        given: more to say in `checkpoint.settings`.
        processes: of the run; all of them make one.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, given: dict, processes: Processes = ALONE
    ):
        self.folder, self.config, self.given = folder, config, given
        self.processes, self.group = processes, None
        if processes.count > 1:  # what a thread says there meets nothing that the training says
            self.group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        self.writing: tuple[Future, int] | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except (OSError, RuntimeError) as fault:
            if error is None:
                raise
            error.add_note(str(fault))
        finally:
            if self.group is not None and error is None:  # or others may still wait there
                torch.distributed.destroy_process_group(self.group)

    def __call__(self, run: Trainee, shown: nn.Module, step: int, seconds: float) -> None:
        """Writes a checkpoint and model/; a checkpoint that is not written yet is waited for.

        Where there are several processes, all call it.

        Args:
            run: what is saved, as it is now.
            shown: the whole model that model/ is to hold, in the first process.
            step: steps done.
            seconds: spent on them.

        Raises:
            FloatingPointError: weights that are not finite; nothing is written.
            OSError: this checkpoint or the one before cannot be written; earlier ones are whole.
            RuntimeError: the same because a process is gone.
        """
        self.wait()
        tensors, about = gathered(run)
        self._check(tensors, step)
        about |= {"config": self.config.to_dict(), **self.given, "step": step, "seconds": seconds}
        about["launch"] = launch()
        try:  # before, so that it is never older than a last checkpoint
            by_first(self.processes, lambda: self._show(shown, step))
        except OSError as error:
            raise self._failed(step, error, 0) from error
        self._write(tensors, about, step, run.step.device)

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole.

        Raises:
            OSError, RuntimeError: it cannot be written.
        """
        if self.writing is None:
            return
        (future, step), self.writing = self.writing, None
        self._done(future.result, step)

    def _show(self, shown: nn.Module, step: int) -> None:
        """Writes model/, beside a checkpoint that is begun."""
        checkpoint.unnamed(self.folder, step).mkdir(parents=True, exist_ok=True)
        shown.save_pretrained(self.folder / "model")

    def _write(self, tensors: dict[str, Tensor], about: dict, step: int, device: str) -> None:
        import torch.distributed.checkpoint as dcp  # slow to import: with the first checkpoint

        from ..weights.shards import quiet_without_group
        from .shard_writer import Writer

        quiet_without_group()
        path = self.folder / checkpoint.FOLDER / checkpoint.name_of(step)
        writer = Writer(path, about, lambda: self._make_room(step))
        # what each has of its own, as the statistics of a norm, is that of the first
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        settings = {"storage_writer": writer, "planner": planner, "process_group": self.group}
        settings["no_dist"] = self.group is None
        size = sum(x.numel() * x.element_size() for x in map(own_part, tensors.values()))
        if device == "cuda" or size >= LARGE:
            self.writing = dcp.async_save(tensors, **settings), step
        else:
            self._done(lambda: dcp.save(tensors, **settings), step)

    def _done(self, write, step: int) -> None:
        """Calls what writes, and removes what is older then.

        Raises:
            OSError, RuntimeError: what went wrong, in a line that says what can be gone on with.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            write()
        except (CheckpointException, Exception) as error:
            rank, cause = None, error
            if isinstance(error, CheckpointException):
                rank, (cause, _) = next(iter(error.failures.items()))
            raise self._failed(step, cause, rank) from error
        if self.processes.first:
            for path in checkpoint.held(self.folder)[: -self.config.keep]:
                _remove(path)
            self._remove_leftovers()

    def _failed(self, step: int, cause: BaseException, rank: int | None) -> Exception:
        """The error of a checkpoint that could not be written, which says what can be gone on
        with; what is left of it goes.

        Args:
            cause: what went wrong.
            rank: of the process where it did; None where that is gone.
        """
        text = str(getattr(cause, "strerror", None) or cause).partition("\n")[0]
        if self.group is not None:
            where = "a process of the group is gone" if rank is None else f"process {rank}"
            text = f"{where}: {text}"
        self._remove_leftovers()
        found = checkpoint.held(self.folder)
        remedy = "there is none before it"
        if found:
            remedy = f"{found[-1]} is whole: go on with --resume {found[-1]}"
        kind = OSError if isinstance(cause, OSError) else RuntimeError
        message = f"the checkpoint of step {step} could not be written to {self.folder}"
        return kind(f"{message} ({text}); {remedy}")

    def _check(self, tensors: dict[str, Tensor], step: int) -> None:
        """Raises, in all processes, what is wrong in one of them before anything is written."""
        found: Exception | None = None
        spoilt = [
            name
            for name, value in tensors.items()
            if name.startswith("model.") and not own_part(value).isfinite().all()
        ]
        if spoilt:
            found = FloatingPointError(
                f"weights are not finite after step {step} ({spoilt[0].removeprefix('model.')} "
                f"and {len(spoilt) - 1} more): lower --lr or clip harder; earlier checkpoints are "
                "kept"
            )
        if not self.folder.is_dir():
            found = FileNotFoundError(
                f"the checkpoint of step {step} could not be written: {self.folder}, the folder "
                "of the run, is gone"
            )
        self._remove_leftovers()
        if self.group is not None:
            all_found = [None] * self.processes.count
            torch.distributed.all_gather_object(all_found, found, group=self.group)
            found = next((x for x in all_found if x is not None), None)
        if found is not None:
            raise found

    def _make_room(self, step: int) -> None:
        """Before a checkpoint has its name: those of this step or later, of a course that the run
        has left, lose theirs, or they would pass for its newest."""
        for path in checkpoint.held(self.folder):
            if path.is_dir() and int(path.name) >= step:
                _remove(path)

    def _remove_leftovers(self) -> None:
        """What a write or a removal that was stopped has left goes, by the first process; while no
        checkpoint is whole an empty folder stays, which says that one was begun: without it model/
        would be taken for that of a run."""
        if not self.processes.first:
            return
        begun = checkpoint.begun(self.folder)
        for path in (self.folder / checkpoint.FOLDER).glob(".*"):
            if begun:
                for part in path.glob("*"):
                    part.unlink(missing_ok=True)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Takes a checkpoint's name away, at once; what is left goes with the leftovers."""
    if path.is_dir():
        path.rename(path.with_name(f".removed-{uuid.uuid4().hex}"))
    else:
        path.unlink()


def launch() -> str | None:
    """What tells the processes of one start by torchrun, restarts included, from those of another;
    None where this process was started otherwise."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return str(os.getppid()) if name == "none" else name


def restarted(folder: Path, processes: Processes = ALONE) -> Path | None:
    """The checkpoint that a group which torchrun started again goes on from: the newest that an
    earlier try of it wrote to `folder`; None in a first try, or where it wrote none.

    All processes call it, and the first looks for all: torchrun counts the restarts of each
    machine, where its own processes failed.
    """
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
    return by_first(processes, lambda: _own(folder)) if processes.any(again) else None


def _own(folder: Path) -> Path | None:
    """The newest checkpoint of a run, where this start has written it."""
    found = [path for path in checkpoint.held(folder) if path.is_dir()]
    if not found or checkpoint.settings(found[-1]).get("launch") != launch():
        return None
    return found[-1]
