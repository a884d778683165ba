"""Segments any number of pictures: results in shards, finished shards kept, what was begun gone on
with, shared by processes.

The list of pictures is written first. Picture n lies in shard n // shard_size, and a shard is the
work of one process: so its content does not depend on their number, nor on where a run was
stopped.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..io.ahead import ahead
from ..io.atomic_files import atomic, remove_left, writable_folder, write_json
from ..io.picture_list import Place, listed, parsed, read_list, read_place, write_list
from ..models.protocol import SegmentationModel
from ..ops._checks import expect_integer
from ..ops.segment_map import THRESHOLD
from ..runtime.processes import of_group
from ..runtime.shared_work import Together, by_first
from ..structures.segmentation import Segmentation
from ..structures.settings import Options, Views
from .result_shards import FORMATS, errors_name, import_arrow, shard_name, writer
from .segment import FAILURES, check_one, reason_of, segment

JOB, LIST, ERRORS = "job.json", "pictures.jsonl", "errors.jsonl"
_TOGETHER = 2  # batches whose pictures are held at once, and grouped by size
_PIXELS = 2**25  # that they may have


class Shard(NamedTuple):
    """What became of a shard.

    Attributes:
        path: its file.
        pictures, failed: how many there were, and how many of them have no result.
        kept: it was finished before.
    """

    path: Path
    pictures: int
    failed: int
    kept: bool


def predict_many(
    model: SegmentationModel,
    inputs: Iterable[str | Path],
    out_dir: str | Path,
    task: str | None = None,
    options: Options = Options(),  # noqa: B008  (frozen)
    views: Views = Views(),  # noqa: B008
    cuda_graphs: bool = True,
    format: str = "jsonl",
    shard_size: int = 1000,
    lists: Iterable[str | Path] = (),
    recursive: bool = False,
    batch_size: int = 4,
    threads: int = 2,
    retry: bool = False,
    report: Callable[[Shard], None] | None = None,
    max_pixels: int | None = None,
    size: int | tuple[int, int] | dict[str, int] | None = None,
) -> tuple[int, int]:
    """Segments pictures and writes shard-000000.jsonl, shard-000001.jsonl and so on, each whole or
    not there, and errors.jsonl with what had no result.

    Where torch.distributed has a group of several processes, all of them call it, and each takes
    its share of the shards. Called again with the same folder it does the shards that are missing.

    Args:
        model: such as a `Mask2Former`.
        inputs, lists, recursive: as `io.picture_list.listed` takes them.
        out_dir: is made if it is not there.
        task: "panoptic", "instance" or "semantic"; None for the first that the model can do.
        options: of the results; threshold is 0.8 for instances, too, if none is given.
        views: windows, scales and mirror images.
        cuda_graphs, max_pixels, size: as in `segment`.
        format: "jsonl" or "parquet" (`result_shards.writer`).
        shard_size: pictures in a shard.
        batch_size: pictures of one size that go through the model together.
        threads: that read pictures while the model runs.
        retry: does finished shards with errors again.
        report: called after each shard by the process that did it.

    Returns:
        how many pictures there are, and how many have no result.

    Raises:
        TypeError, ValueError: an option out of range or not for this task or model, no picture, or
            a folder that holds the shards of another job.
        ImportError: Parquet without pyarrow.
        OSError: nothing can be written to `out_dir`, or a folder or list cannot be read.
        Exception: what went wrong in another process.
    """
    task = check_one("predict", model, task, options, views)
    model.config.input.sized("predict", size)
    if task == "instance" and options.threshold is None:
        options = replace(options, threshold=THRESHOLD)
    for name, value in (
        ("shard_size", shard_size),
        ("batch_size", batch_size),
        ("threads", threads),
    ):
        expect_integer(f"predict: {name}", value)
    if format not in FORMATS:
        raise ValueError(f"predict: format must be one of {FORMATS}, got {format!r}")
    if format == "parquet":
        import_arrow()
    inputs, lists = [str(path) for path in inputs], [str(path) for path in lists]
    job = {
        "inputs": inputs,
        "lists": lists,
        "recursive": recursive,
        "task": task,
        "options": asdict(options),
        "views": asdict(views),
        "batch_size": batch_size,
        "max_pixels": max_pixels,
        "size": size,
        "format": format,
        "shard_size": shard_size,
    }
    processes, folder = of_group(), Path(out_dir)
    by_first(processes, lambda: _begin(folder, model, job, listed(inputs, lists, recursive)))
    given = {"options": options, "views": views, "cuda_graphs": cuda_graphs, "size": size}
    find = partial(segment, model, task=task, batch_size=batch_size, **given)
    read = partial(read_place, max_pixels=max_pixels, channels=model.config.input.channels)
    pictures, most = 0, _TOGETHER * batch_size
    with Together(processes) as work:
        for number, lines in read_list(folder / LIST, shard_size):
            pictures += len(lines)
            if number % processes.count != processes.rank:
                continue
            if work.failed():
                break
            path, errors = folder / shard_name(number, format), folder / errors_name(number)
            kept = path.is_file() and not (retry and errors.is_file())
            if not kept:
                with closing(
                    ahead(read, map(parsed, lines), threads, max(threads, most))
                ) as found:
                    places = enumerate(found, number * shard_size)
                    failed = _write(path, errors, format, places, find, most)
            else:
                failed = _lines(errors)
            if report is not None:
                report(Shard(path, len(lines), failed, kept))
    return by_first(processes, lambda: (pictures, _join_errors(folder, pictures, shard_size)))


def _digest(model: SegmentationModel) -> str:
    """Tells a model's settings and weights from others."""
    found = hashlib.blake2b(repr(model.config).encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _begin(folder: Path, model: SegmentationModel, job: dict, places: Iterator[Place]) -> None:
    """Writes what the job is and its pictures, or checks that it is the one that was begun."""
    path = folder / JOB
    writable_folder(folder)
    job = json.loads(json.dumps({"model": _digest(model)} | job))  # as it is read again
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in job if job[name] != before.get(name)]
        if other:
            name = other[0]
            raise ValueError(
                f"predict: {folder} holds the results of another job, whose {name} is "
                f"{before.get(name)!r}, here {job[name]!r}: choose another --out"
            )
        remove_left(folder)
        return
    if next(folder.glob("shard-*"), None) is not None:
        raise ValueError(f"predict: {folder} holds shards without {JOB}: choose another --out")
    first = next(places, None)
    if first is None:
        raise ValueError("predict: no image given")
    write_list(folder / LIST, itertools.chain([first], places))
    write_json(path, job)


def _write(
    path: Path,
    errors: Path,
    format: str,
    found: Iterator[tuple[int, tuple[Place, Tensor | Exception]]],
    find: Callable,
    most: int,
) -> int:
    """Writes a shard and its errors; returns how many pictures of it have no result.

    A shard that is there has the errors that are: one of an earlier try goes before them, so that
    a kill in between leaves none, which is written anew.
    """
    bad = []
    with writer(path, format) as write:
        for some in _grouped(found, most):
            pictures = [item for item in some if isinstance(item[2], Tensor)]
            rows = {}
            for (number, place, _), result in zip(pictures, _results(find, pictures)):
                if isinstance(result, Segmentation):
                    told = {"number": number, "image": _text(place.image)}
                    rows[number] = told | {"archive": _text(place.archive), **result.to_json()}
                else:
                    bad.append((number, place, result))
            write([rows[number] for number, *_ in pictures if number in rows])
            bad += [item for item in some if not isinstance(item[2], Tensor)]
        path.unlink(missing_ok=True)
        errors.unlink(missing_ok=True)
        if bad:
            with atomic(errors) as temporary, temporary.open("w", encoding="utf-8") as file:
                for number, place, error in sorted(bad, key=lambda item: item[0]):
                    file.write(f"{json.dumps(_failure(number, place, error))}\n")
    return len(bad)


def _grouped(found: Iterator, most: int) -> Iterator[list[tuple[int, Place, Tensor | Exception]]]:
    """Pictures that are worked on at once: those that follow each other, as far as memory goes."""
    some, pixels = [], 0
    for number, (place, picture) in found:
        if isinstance(picture, Exception) and not isinstance(picture, FAILURES):
            raise picture
        more = picture[0].numel() if isinstance(picture, Tensor) else 0
        if some and (len(some) >= most or pixels + more > _PIXELS):
            yield some
            some, pixels = [], 0
        some.append((number, place, picture))
        pixels += more
    if some:
        yield some


def _results(find: Callable, pictures: Sequence[tuple]) -> list[Segmentation | Exception]:
    """A result or an error for each; where all together fail, one by one."""
    try:
        return find([picture for *_, picture in pictures]) if pictures else []
    except FAILURES:
        pass
    return [_tried(find, picture) for *_, picture in pictures]


def _tried(find: Callable, picture: Tensor) -> Segmentation | Exception:
    try:
        return find(picture)
    except FAILURES as error:
        return error


def _failure(number: int, place: Place, error: Exception) -> dict:
    told = {"number": number, "image": _text(place.image), "archive": _text(place.archive)}
    return told | {"error": _text(reason_of(str(place), error))}


def _text(name: str | None) -> str | None:
    """A name whose bytes are no UTF-8 with these written as escapes."""
    return name and name.encode("utf-8", "backslashreplace").decode()


def _lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _join_errors(folder: Path, pictures: int, shard_size: int) -> int:
    """Puts the errors of all shards into one file, where there are any; returns how many."""
    paths = (folder / errors_name(i) for i in range(-(-pictures // shard_size)))
    count = 0
    with atomic(folder / ERRORS) as temporary, temporary.open("w", encoding="utf-8") as joined:
        for path in paths:
            if path.is_file():
                with path.open(encoding="utf-8") as file:
                    for line in file:
                        joined.write(line)
                        count += 1
    if not count:
        (folder / ERRORS).unlink()
    return count
