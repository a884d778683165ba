"""The command line: train, evaluate, predict, explain, data, convert, export, quantize, prune,
serve, demo, info.

Exit codes: 0 done, 1 training failed, 2 bad input, 130 Ctrl-C.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..data import FolderConfig, find_format
from ..data.folder import Layout
from ..models import Segmenter, open_model
from ..models.convert import FORMATS
from ..models.convert import convert as run_convert
from ..models.segmenter.explain import explain as run_explain
from ..ops import _library
from ..recipes.check_data import check_data, show_data
from ..recipes.compare import LEVELS, compare, markdown
from ..recipes.demo import demo as run_demo
from ..runtime.processes import ALONE, code_before, joined, lost_another, said_before, started
from ..runtime.shared_work import end_with_launcher
from .arguments import Model
from .evaluate import evaluate
from .export import export
from .predict import predict
from .prune import prune
from .quantize import quantize
from .serve import serve
from .several import in_processes
from .shard import data_command
from .train import train_command

_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
_DESCRIPTION = "Segmentation on kernels of its own. --debug shows where an error arose."


def demo(
    output: Path = Path("demo"),
    steps: int | None = None,
    scenes: int = 400,
    every: Annotated[bool, tyro.conf.arg(name="all")] = False,
    models: str | None = None,
    data: Literal[tuple(LEVELS)] = "digits",
    overwrite: bool = False,
) -> int:
    """Train a small model on digits in minutes, measure it, draw pictures. No download, no GPU.

    Args:
        output: folder for figures, pictures and the model.
        steps: of training; the recipe's if not given.
        scenes: held-out scenes to measure on.
        every: train all small models, one after another, for one table and one picture: a run in
            OUTPUT/RECIPE each, kept where it is finished, gone on with where it was stopped.
        models: with --all: recipes, as digits,digits-segmenter; not given, all of the data.
        data: with --all: digits, or streets, the semantic comparison.
        overwrite: with --all: train anew what is finished or begun.
    """
    if not every:
        if models is not None or data != "digits" or overwrite:
            raise ValueError("demo: --models, --data and --overwrite are for --all")
        metrics = run_demo(output, steps, scenes)
        print(json.dumps(metrics, indent=2))
        print(f"pictures, curves and metrics.json: {output.resolve()}")
        print(f"try: segkern predict {output / 'example.png'} --model {output} --threshold 0.5")
        return 0
    names = None if models is None else models.split(",")
    rows = compare(output, data, names, steps, scenes, overwrite)
    print(markdown(data, rows))
    print(
        f"written: {', '.join(str(output / f'{data}.{x}') for x in ('md', 'csv', 'json', 'png'))}"
    )
    return 1 if any("error" in row for row in rows) else 0


def explain(
    image: tyro.conf.Positional[Path],
    model: Model,
    at: tuple[float, float] = (0.5, 0.5),
    out: Path = Path("explain.png"),
    max_pixels: int | None = None,
) -> None:
    """Draw where a Segmenter looks from a place in a picture, and how its classes lie.

    Args:
        image: a picture of any kind and size.
        model: a Segmenter.
        at: x and y of the place, 0 to 1 from the upper left.
        out: figure to write: PNG, PDF or SVG.
        max_pixels: as of `segkern predict`.
    """
    opened = open_model(model)
    if not isinstance(opened, Segmenter):
        raise ValueError(f"explain: model must be a Segmenter, {model} is none")
    run_explain(opened, image, at, out, max_pixels=max_pixels)
    print(f"written: {out}")


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    format: Literal[FORMATS] | None = None,
) -> None:
    """Write a checkpoint in another format of its model, and prove that it computes the same.

    Says what became of each tensor: taken under its name, renamed, merged with others, split, not
    used, or made. Fails where one would be lost, and writes nothing then.

    Args:
        source: folder of a run or a model, a file of a model's original code, or a name on the
            Hugging Face hub.
        target: a folder for Hugging Face's format, or, where the model's original code has files,
            one with their suffix (.pkl or .pth of Mask2Former, .pth of SegFormer, .bin, .pth or
            .ckpt of EoMT); there is nothing yet.
        format: original, for a folder of the original code (Segmenter's), or pretrained, for
            Hugging Face's or our own; not given, by the target's suffix.
    """
    print(*run_convert(source, target, format).lines(), sep="\n")
    print(f"written: {target}")


def info() -> None:
    """Print versions, the kernels that are loaded, and why others are not."""
    rows = _library.info()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def data(
    action: tyro.conf.Positional[Literal["check", "show"]],
    root: tyro.conf.Positional[str],
    out: Path = Path("data-report"),
    layout: Layout | None = None,
    split: Literal["train", "val"] = "train",
    count: int = 12,
    size: tuple[int, int] | None = None,
    workers: int | None = None,
) -> int:
    """Check a folder of training data, show samples of it as training sees them, or shard it.

    `check` reads every picture and annotation of both splits, says what is broken and why, and
    writes report.json, train.png and val.png (objects of each class, sizes) and samples.png;
    exit code 0 where the data can be used, 2 where not. `show` writes views.png. `shard` writes
    the data as WebDataset shards: segkern data shard --help.

    Args:
        action: check or show.
        root: folder of a data set, whose format is told from the files, or address of shards.
        out: folder for what is written.
        layout: of a folder of maps of classes; not given, the format is told from the files.
        split: of show.
        count: of samples that are drawn.
        size: of show: height and width of the views; not given, the recipe's.
        workers: of check: processes that read; not given, one a core, at most 16.
    """
    settings, line = find_format(root) if layout is None else (FolderConfig(root, layout), None)
    print(line or f"{root}: data of kind folder ({layout})")
    if action == "show":
        drawn = show_data(settings, out / "views.png", split, count, size)
        print(f"{drawn} samples; written: {out / 'views.png'}")
        return 0
    good = check_data(settings, out, count, workers)
    print(f"{'usable' if good else 'not usable'}; written: {out}")
    return 0 if good else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: None takes the process's own.

    Returns:
        the exit code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    lines, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        with _processes(arguments) as prints, nullcontext() if prints else redirect_stdout(None):
            return _called(arguments, debug)
    except KeyboardInterrupt as stop:
        return _ended(130, f"\nsegkern: {stop or 'stopped'}", stop)
    except (*_USER_ERRORS, RuntimeError, FloatingPointError) as error:
        if debug:
            raise
        code = 2 if isinstance(error, _USER_ERRORS) else 1
        text = " ".join(str(error).split())
        if lost_another(error):
            text = f"another process of the run has ended or does not answer ({text})"
        return _ended(code, f"segkern: error: {text}", error)
    finally:
        warnings.formatwarning = lines


@contextmanager
def _processes(arguments: list[str]) -> Iterator[bool]:
    """Joins the processes of a command that several may run together; gives whether this one
    prints: the first of them, and of predict each what became of its own pictures."""
    command = arguments[0] if arguments else ""
    several = command in ("train", "evaluate", "predict")
    if several and started() > 1:
        end_with_launcher()
    with joined() if several else nullcontext(ALONE) as processes:
        yield processes.first or command == "predict"


def _called(arguments: list[str], debug: bool) -> int:
    """Runs a command."""
    app = tyro.extras.SubcommandApp()
    whole = ["--debug"] * debug + arguments
    measuring = (in_processes(command, whole) for command in (evaluate, predict))
    others = *measuring, explain, data_command(arguments, data), convert, demo, info
    others += export, quantize, prune, serve
    for command in (train_command(arguments), *others):
        app.command(command)
    # the model's kind is that of the recipe's or the stored config, and no subcommand
    config = (tyro.conf.AvoidSubcommands,)
    return app.cli(prog="segkern", description=_DESCRIPTION, args=arguments, config=config) or 0


def _ended(code: int, text: str, error: BaseException) -> int:
    """Says why, unless another process of the run has said why it fails; the exit code."""
    first = code_before(code, error)
    if first is None:
        print(text, file=sys.stderr)
        return code
    return first


def _warning(message, *_, **__) -> str:
    """A warning in a line, without the line of code that gave it; what several processes warn of
    is said once."""
    text = f"segkern: warning: {' '.join(str(message).split())}\n"
    return "" if said_before(text) else text
