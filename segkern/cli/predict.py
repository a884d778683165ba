"""The command `segkern predict`."""

import sys
from pathlib import Path
from typing import Annotated, Literal, TextIO

import tyro

from ..inference.predict_files import Predicted, pictures, predict_files
from ..inference.predict_many import ERRORS, Shard, predict_many
from ..models import open_model
from ..runtime.processes import of_group
from ..runtime.shared_work import by_first
from ..structures.settings import Options, Views
from .arguments import Model, Task


def predict(
    images: tyro.conf.Positional[tuple[str, ...]],
    model: Model = "demo",
    out: Path = Path("predictions"),
    task: Task | None = None,
    threshold: float | None = None,
    window: int | None = None,
    stride: int | None = None,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
    device: str = "auto",
    cuda_graphs: bool = True,
    max_pixels: int | None = None,
    size: tuple[int, ...] | None = None,
    lists: Annotated[tuple[Path, ...], tyro.conf.arg(name="list")] = (),
    recursive: bool = False,
    format: Literal["files", "jsonl", "parquet"] = "files",
    shard_size: int | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    retry: bool = False,
    processes: int = 1,
) -> int:
    """Segment pictures: writes an overlay, a label map and a JSON of segments for each, and says
    what it found in a line; or, for any number of pictures, the segments alone in shards.

    With --format jsonl or parquet it writes shard-000000.jsonl and so on, of --shard-size pictures
    each, whole or not there; started again it does those that are missing. What has no result is
    in errors.jsonl, and the exit code is 2.

    Args:
        images: pictures of any kind and size, folders of them, or tar archives (WebDataset).
        model: what to use.
        out: folder for the results.
        task: what to look for; not given, panoptic, or semantic with a Segmenter, which does no
            other.
        threshold: least score of a segment, 0 to 1; not given, 0.8. Semantic results have none.
        window: side in pixels of a Segmenter's windows; not given, the model's.
        stride: pixels from one window to the next; not given, the model's.
        scales: of a Segmenter: sizes of the picture to average over; 1 is the model's.
        flip: of a Segmenter: average over the mirror images, too.
        device: "cpu", "cuda", or "auto" for cuda where there are kernels for it.
        cuda_graphs: on a GPU run the model from a CUDA graph for sizes that come again and again.
        max_pixels: width times height that a picture may have; not given, 178,956,970, which keeps
            a small file from filling the memory.
        size: pixels to which pictures are resized, of the short side, or height and width; not
            given, the model's.
        lists: text files with a path, an address (http://, https://) or an archive a line.
        recursive: take the pictures of folders in folders, too.
        format: files for three files a picture, jsonl or parquet for shards.
        shard_size: pictures in a shard; not given, 1000.
        batch_size: with shards, pictures of one size that go through the model together; not
            given, 4.
        threads: with shards, those that read pictures while the model runs; not given, 2.
        retry: with shards, do finished ones with errors again.
        processes: on this machine, which share the pictures, on GPUs one each. torchrun starts
            them on several machines, without this option.
    """
    if not images and not lists:
        raise ValueError("predict: no image given")
    shards = {"shard_size": shard_size, "batch_size": batch_size, "threads": threads}
    shards = {name: value for name, value in shards.items() if value is not None}
    shards |= {"retry": True} if retry else {}
    if format == "files":
        if shards:
            option = next(iter(shards)).replace("_", "-")
            raise ValueError(f"predict: --{option} is for shards: give --format jsonl or parquet")
        # before a model is opened, maybe from the network
        by_first(of_group(), lambda: len(pictures(images, lists, recursive)))
    if model == "demo" and not Path(model).is_dir():
        raise ValueError("no folder demo: run `segkern demo` first or give --model")
    opened = open_model(model).to(of_group().device(device))
    options, views = Options(threshold), Views(window, stride, scales, flip)
    side = size[0] if size is not None and len(size) == 1 else size
    limits = {"max_pixels": max_pixels, "size": side}
    chosen = {"lists": lists, "recursive": recursive, **limits}
    settings = opened, images, out, task, options, views, cuda_graphs
    if format == "files":
        _, failed = predict_files(*settings, _tell, **chosen)
        return 2 if failed else 0
    shards |= {"format": format, "report": _tell_shard}
    count, failed = predict_many(*settings, **shards, **chosen)
    if of_group().first and failed:
        text = f"{failed} of {count} pictures have no result: {out / ERRORS} says why"
        print(f"segkern predict: error: {text}", file=sys.stderr)
    return 2 if failed else 0


def _tell_shard(shard: Shard) -> None:
    """Prints what became of a shard, in a line."""
    failed = f", {shard.failed} without a result" if shard.failed else ""
    _say(f"{shard.path}: {shard.pictures} pictures{failed}{', as it was' if shard.kept else ''}")


def _tell(picture: Predicted) -> None:
    """Prints what became of a picture, in a line."""
    if picture.error is not None:
        _say(f"segkern predict: error: {picture.error}", sys.stderr)
        return
    nothing = "nothing scored above the threshold; a lower --threshold shows more"
    _say(f"{picture.image}: {picture.result.summary() or nothing}; written: {picture.json}")


def _say(line: str, file: TextIO | None = None) -> None:
    """Prints a line at once and in one piece, as other processes print to the same place."""
    print(f"{line}\n", end="", file=file, flush=True)
