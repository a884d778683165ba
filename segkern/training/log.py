"""The log of a training run: JSON lines, curves for tensorboard, a progress bar."""

import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..io.atomic_files import atomic

FILE = "log.jsonl"


class Log:
    """Lines of `folder`/log.jsonl; a context.

    Args:
        folder: of the run.
        start: steps done before.
        keep: keep the lines there up to `start`; a run that is resumed drops those after it.
        tensorboard: write scalars to `folder`/tensorboard where tensorboard is installed.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool, keep: bool = True):
        self.path = folder / FILE
        kept = []
        if keep and start and self.path.is_file():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:  # a killed run may leave half a line
                    continue
                if line["step"] <= start:
                    kept.append(text + "\n")
        with atomic(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self.writer = _tensorboard(folder, start) if tensorboard else None

    def write(self, line: dict) -> None:
        """Appends a line: step, and numbers, or dicts of numbers, by name."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.writer is None:
            return
        for name, value in line.items():
            for part, x in value.items() if isinstance(value, dict) else [("", value)]:
                self.writer.add_scalar(f"{name}/{part}".rstrip("/"), x, line["step"])

    def __enter__(self):
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *error) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


class ProgressBar:
    """A bar with losses, images a second and the time left; a context.

    Where the output is no terminal, a line at each twentieth of the steps.

    Args:
        steps: of the run.
        start: those done before.
        batch_size: images of a step.
        show: False is silent.
    """

    def __init__(self, steps: int, start: int, batch_size: int, show: bool):
        self.steps, self.start, self.batch_size = steps, start, batch_size
        self.done = self.told = start
        console = Console()
        self.shown = show
        self.plain = show and not console.is_terminal
        self.bar = Progress(
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (show and console.is_terminal),
        )

    def __enter__(self):
        self.bar.start()
        self.job = self.bar.add_task("train", total=self.steps, completed=self.start, text="")
        self.began = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def advance(self, line: dict | None) -> None:
        """A step is done; `line` is its line of the log, if it has one."""
        self.done += 1
        if line is None:
            self.bar.update(self.job, completed=self.done)
            return
        took = max(time.perf_counter() - self.began, 1e-9)
        rate = (self.done - self.start) / took
        parts = " ".join(f"{name} {x:.2f}" for name, x in line["losses"].items())
        text = f"loss {line['loss']:.1f} {parts} {rate * self.batch_size:.0f} images/s"
        self.bar.update(self.job, completed=self.done, text=text)
        part = max(1, self.steps // 20)
        if self.plain and self.done // part > self.told // part:
            left = (self.steps - self.done) / rate
            print(f"step {self.done}/{self.steps} {text}, {left:.0f} s left", flush=True)
            self.told = self.done

    def show(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.shown:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _tensorboard(folder: Path, start: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=start + 1 if start else None)
