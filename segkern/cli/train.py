"""The command `segkern train`, whose options depend on the recipe, the data and the run to go on
with."""

from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from .. import recipes
from ..data import find_format
from ..models import find_kind, open_model
from ..runtime.device import usable_device
from ..training import checkpoint
from ..training.config import TrainConfig
from ..training.loop import train as run_train
from ..training.state import stored_config
from ..training.validation import BEST, best_of
from .several import launched

# options of train that are read before the others, whose defaults depend on them
_FIRST = ("--recipe", "--resume", "--preset", "--init")
_FIRST += ("--data.root", "--data.layout", "--data.task")
_SHARDS_OF_MAPS = ("shards", "semantic")


def train_command(arguments: list[str]) -> Callable:
    """`segkern train`, whose defaults are the recipe's, or those of the run to go on with."""
    given = {}
    for name, following in zip(arguments, [*arguments[1:], ""]):
        name, _, value = name.partition("=")
        if name in _FIRST and arguments[0] == "train":
            given[name] = value or following
    root, resume = given.get("--data.root"), given.get("--resume")
    chosen = None if resume else given.get("--recipe")
    if root and not (chosen or resume):
        chosen = _recipe_for(root, "--data.layout" in given, given.get("--init"))
    if resume:
        folder = Path(resume)
        default = stored_config(folder)
        default.output = checkpoint.folder_of(folder)
        default.overwrite = False  # it was said of that run, not of what comes now
    else:
        default = _recipe_config(chosen, given, arguments)

    def train(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        recipe: Literal[tuple(recipes.RECIPES)] | None = None,
        resume: Path | None = None,
        preset: str | None = None,
        processes: int = 1,
    ) -> int:
        """Train on pictures of your own in --data.root, or on scenes of handwritten digits.

        Args:
            config: what and how.
            recipe: the model, and the defaults of the other options; not given, with --data.root
                that of the model that --init names, else mask2former for pictures of objects and
                segmenter for maps of classes; digits without. Those of segmenter and segformer are
                their papers' for the layout of --data.root; those of the others have the classes
                of the data in --data.root, whose format is found, and the sizes of the model that
                --init names.
            resume: go on with the run in this folder; other options default to its settings.
            preset: model of a recipe, not given, that of --init or a small one: of mask2former and
                maskformer tiny, resnet50, resnet101, swin_tiny, swin_small, swin_base or
                swin_large; of oneformer tiny, resnet50, swin_tiny, swin_small or swin_large; of
                segmenter such as Seg-B-Mask/16; of segformer b0 to b5; of eomt tiny, small, base,
                large or giant; of seq2seg semantic, semantic-no-skip, instance, tiny or
                tiny-instance; of unet semantic, hungarian, either with -bertN for N transformer
                layers, tiny or tiny-hungarian.
            processes: on this machine, which share each batch, on GPUs one each; torchrun starts
                them on several machines, without this option.
        """
        if preset is not None and not _takes(chosen, "preset"):
            known = ", ".join(name for name in recipes.RECIPES if _takes(name, "preset"))
            raise ValueError(f"train: --preset is for a new run with --recipe {known}")
        if processes > 1:
            return _launched(config, arguments, processes)
        if processes < 1:
            raise ValueError(f"train: processes must be at least 1, got {processes}")
        if _takes(chosen, "root", needed=True):
            names = list((config.model.id2label or {}).values())
            found = f"{config.data.root}: data of kind {config.data.kind} ({config.data.task})"
            print(f"{found}, {len(names)} classes: {', '.join(names[:20])}")
        run = run_train(config, resume)
        print(f"trained {run.steps} steps in {run.seconds:.0f} s: {config.output / 'model'}")
        if best := best_of(config.output):
            print("best: step {}, {} {:.3f}: {}".format(*best, config.output / BEST))
        return 0

    return train


def _launched(config: TrainConfig, arguments: list[str], processes: int) -> int:
    """Runs the command in several processes, and what they would all refuse is refused once."""
    if config.batch_size % processes:
        raise ValueError(
            f"train: batch_size must be a multiple of the {processes} processes that share the "
            f"images of a batch, got {config.batch_size}"
        )
    device = usable_device(config.device)
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise ValueError(
            "train: --processes must be no more than the GPUs of this machine "
            f"({torch.cuda.device_count()}), got {processes}"
        )
    return launched("train", arguments, processes)


def _takes(recipe: str | None, argument: str, needed: bool = False) -> bool:
    """Whether a recipe takes an argument, or cannot be without it."""
    if recipe not in recipes.RECIPES:
        return False
    found = signature(recipes.RECIPES[recipe]).parameters.get(argument)
    return found is not None and not (needed and found.default is not Parameter.empty)


def _recipe_config(name: str | None, given: dict[str, str], arguments: list[str]) -> TrainConfig:
    """What a recipe, or that of digits, makes of the options that it takes."""
    root, layout = given.get("--data.root"), given.get("--data.layout")
    if not _takes(name, "root"):
        return _pruned(recipes.RECIPES.get(name, recipes.digits)(), given.get("--init"))
    if not root and _takes(name, "root", needed=True):
        raise ValueError(f"train: --recipe {name} needs --data.root, a folder of pictures")
    offered = {
        "root": root,
        "layout": layout,
        "dataset": layout or "plain",
        "task": given.get("--data.task"),
        "init": given.get("--init"),
        "preset": given.get("--preset"),
        "pretrained": "--model.no-backbone-pretrained" not in arguments,
    }
    return recipes.RECIPES[name](
        **{k: v for k, v in offered.items() if v is not None and _takes(name, k)}
    )


def _pruned(config: TrainConfig, init: str | None) -> TrainConfig:
    """The recipe's config with as many decoder layers and queries as the model to start from."""
    found = None if init is None else open_model(init).config
    if found is None or found.kind != config.model.kind:
        return config
    sizes = {n: getattr(found, n) for n in ("decoder_layers", "num_queries") if hasattr(found, n)}
    return replace(config, model=replace(config.model, **sizes))


def _recipe_for(root: str, layout: bool, init: str | None) -> str:
    """The recipe of the model to start from, or, without one, for the data in a folder; a folder
    whose layout is given holds maps of classes."""
    if init is not None and (kind := find_kind(init)) in recipes.RECIPES:
        return kind
    found = None if layout else find_format(root)[0]
    maps = layout or "masks" not in found.targets or (found.kind, found.task) == _SHARDS_OF_MAPS
    return "segmenter" if maps else "mask2former"
