"""Evaluation during training: figures of held-out images, and the best model by one of them."""

import json
import os
import tempfile
from pathlib import Path

import torch

from ..evaluation.evaluate import evaluate
from ..io.atomic_files import write_json
from ..models import SegmentationModel
from ..runtime.processes import ALONE, Processes
from ..runtime.shared_work import by_first
from ..structures.settings import Options
from .config import METRICS, TrainConfig

BEST = "best"
_FIGURES = "metrics.json"  # in BEST: step, metric and what was measured


class Validation:
    """Evaluates a model in training, and keeps the best in `folder`/best.

    Args:
        data: held-out samples as `evaluate` takes them; None where there are no evaluations.
        config: of the run.
        folder: of the run.
        start: steps done before, from which `waited` counts.
        own: what `folder` holds as best counts, unless it is from later steps.
        processes: that all make and call this together, with the same model: each measures its
            share, and the first keeps the best. Alone, a process measures all, though it be one of
            several.

    Raises:
        ValueError: `folder`/best is not what training writes.
    """

    def __init__(
        self,
        data,
        config: TrainConfig,
        folder: Path,
        start: int,
        own: bool,
        processes: Processes = ALONE,
    ):
        self.data, self.config, self.folder = data, config, folder / BEST
        self.processes = processes
        self.metric = config.best_metric or METRICS[config.task][0]
        held = None
        if own:  # one reads for all: a shared folder may show each another state
            held = by_first(self.processes, lambda: _to_surpass(folder, self.metric, start))
        self.best, self.best_step = held or (None, start)

    def __call__(self, model: SegmentationModel, step: int) -> tuple[dict[str, float], str]:
        """Measures, and keeps the model if it is the best so far.

        Returns:
            figures by name, without those that are undefined, and a line that tells them.
        """
        config = self.config
        with torch.random.fork_rng():
            value = evaluate(
                model,
                self.data,
                (config.task,),
                limit=config.evaluate_scenes,
                options=Options(config.threshold if config.task == "panoptic" else None),
                progress=False,
                cuda_graphs=False,  # their memory is the next step's
                shared=self.processes.count > 1,
            )
        if config.task == "panoptic" and value["things"]["pq"] is not None:
            value["pq"] = value["things"]["pq"]
        found = {name: value[name] for name in METRICS[config.task] if value[name] is not None}
        told = ", ".join(f"{k} {x:.3f}" for k, x in found.items())
        text = f"step {step}: {told or 'the held-out images have nothing to measure'}"
        x = found.get(self.metric)
        if x is not None and (self.best is None or x > self.best):
            self.best, self.best_step = x, step
            figures = {"step": step, "metric": self.metric, **found}
            by_first(self.processes, lambda: self._keep(model, figures))
            text += f", the best {self.metric} so far"
        return {name.replace("_", " "): x for name, x in found.items()}, text

    def waited(self, step: int) -> int:
        """Evaluations up to `step` since the best, or since the start where there is none."""
        return (step - self.best_step) // self.config.evaluate_every

    def _keep(self, model: SegmentationModel, figures: dict) -> None:
        """Puts the model in place of the best before, whole or not at all."""
        with tempfile.TemporaryDirectory(prefix=".best-", dir=self.folder.parent) as name:
            new, old = Path(name, "new"), Path(name, "old")
            model.save_pretrained(new)
            write_json(new / _FIGURES, figures)
            held = self.folder.exists()
            if held:
                os.replace(self.folder, old)
            try:
                os.replace(new, self.folder)
            except OSError:
                if held:
                    os.replace(old, self.folder)
                raise


def best_of(run: Path) -> tuple[int, str, float] | None:
    """Step, metric and figure of the best model of a run; None where it has none.

    Raises:
        ValueError: `run`/best is not what training writes.
    """
    path = run / BEST / _FIGURES
    if not path.parent.is_dir():
        return None
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        metric = figures["metric"]
        return int(figures["step"]), metric, float(figures[metric])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not what training writes there; remove {path.parent}"
        ) from error


def _to_surpass(run: Path, metric: str, start: int) -> tuple[float, int] | None:
    """Figure and step of the best model of a run that goes on from `start`.

    One of later steps, to which it has not come, or by another metric stays until the next
    evaluation.
    """
    best = best_of(run)
    if best is None:
        return None
    step, by, figure = best
    return (figure, step) if by == metric and step <= start else None
