"""Converts a checkpoint from one format of its model to another, and proves what it did.

What becomes of each tensor of the source is traced, not guessed: a copy of the checkpoint whose
tensors each hold one number of their own goes the same way as the real one, and the numbers tell
in the end which tensors lie where. The result is opened again before it gets its name: its weights
must have the same bits, and the model the same outputs.
"""

import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..io.atomic_files import expect_free
from ..weights import unpickling
from ..weights.folders import FILES, SUFFIXES, find_folder, is_model
from ..weights.hf_folders import read_weights
from ..weights.pickling import dump_arrays
from ..weights.state_dicts import write_tensors
from . import MODELS, open_model
from .protocol import SegmentationModel

FORMATS = ("pretrained", "original")
_FIRST = 2**20  # numbers of the tensors: float32 holds them, and no weight is one
_COUNTS = "num_batches_tracked"  # of norms, by which nothing is computed
_BESIDE = ("*.json", "*.yml", "*.yaml")  # settings that belong to weights
_MOVES = "layer_norm_eps"  # a setting that may be another in a format and moves outputs a little:
_FAR = 1e-2  # of the largest logit


class Key(NamedTuple):
    """What became of a tensor of the source.

    Attributes:
        name: in the source; "" where the format of the target has more than the source.
        fate: "taken" under the same name, "renamed", "merged" with others into one, "split" into
            several, "not used" by the model, or "made" in the target.
        targets: names in the target.
    """

    name: str
    fate: Literal["taken", "renamed", "merged", "split", "not used", "made"]
    targets: tuple[str, ...]


class Conversion(NamedTuple):
    """What a conversion did.

    Attributes:
        kind: of the model.
        keys: what became of every tensor of the source, and where those of the target come from.
        settings: those that the format of the target does not hold: name, value before and after.
        difference: largest difference of logits of a random picture before and after; 0, but
            where the format has another epsilon in its norms.
    """

    kind: str
    keys: list[Key]
    settings: list[tuple[str, object, object]]
    difference: float

    def lines(self) -> list[str]:
        """A line for each kind of tensor, `#` for a number in a name, and what else is to say."""
        rows = Counter(
            (key.fate, _pattern(key.name), " + ".join(sorted({*map(_pattern, key.targets)})))
            for key in self.keys
        )
        arrows = {"taken": "{1}", "not used": "{1}", "made": "{2}"}
        lines = [
            f"{count:5d} {row[0]:<8} {arrows.get(row[0], '{1} -> {2}').format(*row)}"
            for row, count in sorted(rows.items())
        ]
        for name, *values in self.settings:
            before, after = (
                text if len(text := str(v)) < 40 else f"{text[:36]} ..." for v in values
            )
            lines.append(f"not held: {name}: {before} is {after} there")
        fates = Counter(key.fate for key in self.keys)
        counted = ", ".join(f"{count} {fate}" for fate, count in sorted(fates.items()))
        same = f"as much as {self.difference:.1g} apart" if self.difference else "the same"
        return [*lines, f"{self.kind}: {counted}; left over: none; outputs: {same}"]


def convert(
    source: str | Path,
    target: str | Path,
    format: Literal["pretrained", "original"] | None = None,
) -> Conversion:
    """Writes a checkpoint in another format of its model.

    Args:
        source: as `open_model` takes it.
        target: a folder, or a file of the original code; there is nothing yet, or an empty folder
            where one is to be. What is written gets this name when all of it is there and proved.
        format: "pretrained" is what `save_pretrained` writes, "original" what `save_original`
            does; None takes "original" where the target has the suffix of such a file.

    Returns:
        what became of every tensor.

    Raises:
        ValueError: no such checkpoint or format, a target that is there or has the suffix of
            another format's files, tensors that have no place in the format (names them), or
            outputs that differ.
        OSError: the target cannot be written.
    """
    source, target = _resolved(source), Path(target).expanduser()
    model = open_model(source)
    format = format or _format_of(target, model)
    if format not in FORMATS:
        raise ValueError(f"convert: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "original" and not hasattr(model, "save_original"):
        raise ValueError(f"convert: a {model.config.kind} has no original format that is known")
    _check_name(target, model.config.kind, format)
    expect_free("convert: target", target, target.suffix not in SUFFIXES)
    near = next(path for path in target.absolute().parents if path.exists())
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=near) as temporary:
        inside = Path(temporary) / "out" / target.name
        inside.parent.mkdir()
        with _named(inside, target):
            _save(model, inside, format)
            settings, difference = _proved(model, inside)
        written = list(inside.parent.iterdir())
        for path in written:
            expect_free("convert: target", target.parent / path.name, path.is_dir())
        kind = model.config.kind
        del model  # the next takes as much memory
        with warnings.catch_warnings():  # which came when the real one was opened and written
            warnings.simplefilter("ignore")
            keys = _traced(source, Path(temporary) / "marked", inside, format)
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in written:
            os.replace(path, target.parent / path.name)  # an empty folder gives way
    return Conversion(kind, keys, settings, difference)


def _check_name(target: Path, kind: str, format: str) -> None:
    """Nobody shall find a folder that is called as a file, or the other way round."""
    files = MODELS[kind].suffixes if format == "original" else ()
    right = target.suffix in files if files else target.suffix.lower() not in SUFFIXES
    if not right or not target.name:
        rule = f"end in {' or '.join(files)}" if files else "be called as a folder"
        raise ValueError(
            f"convert: target must {rule} for the {format} format of a {kind}, got {target}"
        )


@contextmanager
def _named(inside: Path, target: Path) -> Iterator[None]:
    """Messages call what is written by the target's name, and not by where it lies till then."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")  # those who read them have filters of their own
            yield
    except ValueError as error:
        raise ValueError(str(error).replace(str(inside), str(target))) from error
    for warning in told:
        text = str(warning.message).replace(str(inside), str(target))
        warnings.warn(text, warning.category, stacklevel=4)


def _resolved(source: str | Path) -> Path:
    """The file or folder that holds the weights, on this machine."""
    path = Path(source).expanduser()
    alone = path.is_file() and not (path.name in FILES and is_model(path.parent))
    return path if alone else find_folder(source)


def _format_of(target: Path, model: SegmentationModel) -> str:
    return "original" if target.suffix in MODELS[model.config.kind].suffixes else "pretrained"


def _save(model: SegmentationModel, target: Path, format: str) -> None:
    (model.save_original if format == "original" else model.save_pretrained)(target)


def _proved(model: SegmentationModel, written: Path) -> tuple[list[tuple], float]:
    """The settings that differ in what was written, and by how much outputs do.

    Raises:
        ValueError: weights or outputs are others.
    """
    with warnings.catch_warnings():  # of what the format does not hold, as said below
        warnings.simplefilter("ignore")
        again = open_model(written)
    before, after = model.state_dict(), again.state_dict()
    differ = [
        name
        for name in {**before, **after}
        if name != "criterion.seed"
        and not (name in before and name in after and torch.equal(before[name], after[name]))
    ]
    if differ:
        raise ValueError(f"convert: weights come back as others: {_short(differ)}")
    a, b = _plain(asdict(model.config)), _plain(asdict(again.config))
    settings = [(name, a[name], b[name]) for name in a if a[name] != b[name]]
    outputs = [_outputs(m) for m in (model, again)]
    difference = max((x - y).abs().max().item() for x, y in zip(*outputs))
    largest = max(x.abs().max().item() for x in outputs[0])
    moved = any(name == _MOVES for name, *_ in settings)
    if not difference <= (_FAR * largest if moved else 0):
        raise ValueError(
            f"convert: outputs of a random picture differ by {difference:.2g}"
            + "".join(f"; {name} is {x} here, {y} there" for name, x, y in settings)
        )
    return settings, difference


def _plain(value):
    """Tuples are lists, as files have them."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def _outputs(model: SegmentationModel) -> list[Tensor]:
    """Logits of a random picture of a size that the model takes."""
    config = model.config
    side = config.input.window or getattr(config, "image_size", 96)
    side = side if isinstance(side, (tuple, list)) else (side, side)
    generator = torch.Generator().manual_seed(0)
    size = (1, config.input.channels, *config.input.padded(side))
    pixels = torch.randn(size, generator=generator)
    found = model.predict(pixels, *model.inputs(config.tasks[0], 1))
    return [value for value in found if isinstance(value, Tensor)]


def _traced(source: Path, marked: Path, written: Path, format: str) -> list[Key]:
    """What becomes of every tensor, by the way of a copy whose tensors hold their numbers.

    Raises:
        ValueError: some are used here and have no place there (names them).
    """
    names = _write_marked(source, marked)
    at = marked / source.name if source.is_file() else marked
    model = open_model(at)
    out = marked / "out" / written.name
    out.parent.mkdir()
    _save(model, out, format)
    used = {i for value in model.state_dict().values() for i in _numbers(value)}
    comes_from = {name: _numbers(value) for name, value in _weights(out).items()}
    keys, left = [], []
    for i, name in enumerate(names):
        targets = tuple(to for to, numbers in comes_from.items() if i in numbers)
        if not targets:
            keys.append(Key(name, "not used", ()))
            if i in used and not name.endswith(_COUNTS):
                left.append(name)
        elif len(targets) > 1:
            keys.append(Key(name, "split", targets))
        elif len(comes_from[targets[0]]) > 1:
            keys.append(Key(name, "merged", targets))
        else:
            keys.append(Key(name, "taken" if targets[0] == name else "renamed", targets))
    if left:
        raise ValueError(f"convert: no place in the target's format for {_short(left)}")
    return keys + [Key("", "made", (to,)) for to, numbers in comes_from.items() if not numbers]


def _numbers(value: Tensor) -> set[int]:
    """Which of the source's tensors lie in one."""
    if not _markable(value):
        return set()
    found = {int(x) - _FIRST for x in value.flatten().unique_consecutive().tolist()}
    return {i for i in found if i >= 0}


def _markable(value: Tensor) -> bool:
    return value.numel() > 0 and (value.is_floating_point() or value.dtype == torch.int64)


def _write_marked(source: Path, folder: Path) -> list[str]:
    """Writes a checkpoint like another, whose tensors hold their numbers; gives their names."""
    folder.mkdir()
    parent = source.parent if source.is_file() else source
    for pattern in _BESIDE if source.is_dir() else ("config.yaml",):
        for path in parent.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copy(path, folder)
    state = _weights(source)
    marks = {}
    for i, (name, value) in enumerate(state.items()):
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        mark = torch.tensor(_FIRST + i, dtype=dtype) if _markable(value) else value
        marks[name] = mark.expand(value.shape) if _markable(value) else value
    if source.is_dir() and not (source / "variant.yml").is_file():
        write_tensors(folder / "model.safetensors", marks)
        return list(state)
    path = source if source.is_file() else source / "checkpoint.pth"
    content = _content(path)
    _, place = unpickling.weights_of(content)
    rest = {k: v for k, v in content.items() if place and k not in (place, "optimizer")}
    marks = marks if place is None else rest | {place: marks}
    if path.suffix == ".pkl":
        dump_arrays(folder / path.name, _arrays(marks))
    else:
        torch.save(marks, folder / path.name)
    return list(state)


def _arrays(tree):
    if isinstance(tree, dict):
        return {name: _arrays(value) for name, value in tree.items()}
    return tree.contiguous().numpy() if isinstance(tree, Tensor) else tree


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names in its file."""
    if path.is_dir() and not (path / "variant.yml").is_file():
        return read_weights(path)
    state, _ = unpickling.weights_of(_content(path if path.is_file() else path / "checkpoint.pth"))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _content(path: Path) -> dict:
    content = unpickling.load_arrays(path) if path.suffix == ".pkl" else unpickling.load(path)
    return content if isinstance(content, dict) else {}


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _short(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
