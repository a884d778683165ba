"""Segments pictures: an overlay, a label map and a JSON of segments for each."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..io.atomic_files import writable_folder, write_json
from ..io.overlay import save_label_map, save_picture
from ..io.picture_list import Place, listed, read_place
from ..io.sources import is_url
from ..models.protocol import SegmentationModel
from ..ops.segment_map import THRESHOLD
from ..runtime.processes import of_group
from ..runtime.shared_work import Together, by_first
from ..structures.segmentation import Segmentation
from ..structures.settings import Options, Views
from .segment import FAILURES, check_one, reason_of, segment


class Predicted(NamedTuple):
    """What became of a picture.

    Attributes:
        image: the picture's path, address, or name in its archive.
        result: its segments; None where it failed.
        json: the JSON file written; the other two stand beside it.
        error: what went wrong, a line that names the picture.
    """

    image: str
    result: Segmentation | None = None
    json: Path | None = None
    error: str | None = None


def predict_files(
    model: SegmentationModel,
    paths: Sequence[str | Path],
    out_dir: str | Path,
    task: str | None = None,
    options: Options = Options(),  # noqa: B008  (frozen)
    views: Views = Views(),  # noqa: B008
    cuda_graphs: bool = True,
    report: Callable[[Predicted], None] | None = None,
    max_pixels: int | None = None,
    size: int | tuple[int, int] | dict[str, int] | None = None,
    lists: Sequence[str | Path] = (),
    recursive: bool = False,
) -> tuple[list[Path], list[tuple[str, str]]]:
    """Segments every picture and writes NAME_overlay.png, NAME_labels.png and NAME.json for each.

    A picture that cannot be read, or is too large for the memory, does not keep the others from
    being written. Two of the same name get NAME and NAME_2. Where torch.distributed has a group of
    several processes, all of them call it, and each takes its share of the pictures.

    Args:
        model: such as a `Mask2Former`.
        paths, lists, recursive: pictures, folders, archives and lists of them, as
            `io.picture_list.listed` takes them.
        out_dir: is made if it is not there.
        task: "panoptic", "instance" or "semantic"; None for the first that the model can do.
        options: of the results; threshold is 0.8 for instances, too, if none is given.
        views: windows, scales and mirror images.
        cuda_graphs: as in `segment`.
        report: called after each picture.
        max_pixels, size: as in `segment`.

    Returns:
        the JSON files written by this process, and its pictures that failed with the reasons.

    Raises:
        TypeError, ValueError: an option out of range or not for this task or model, no path, a
            folder without pictures, or `out_dir` holds some of them.
        OSError: nothing can be written to `out_dir`; found before the model runs.
        Exception: what went wrong in another process.
    """
    task = check_one("predict", model, task, options, views)
    model.config.input.sized("predict", size)
    if task == "instance" and options.threshold is None:
        options = replace(options, threshold=THRESHOLD)
    processes, folder = of_group(), Path(out_dir)

    def begin() -> list[Place]:
        places = pictures(paths, lists, recursive)
        folders = {Path(place.path).parent for place in places if not is_url(place.path)}
        if folder.resolve() in {own.resolve() for own in folders}:
            raise ValueError(
                f"predict: {folder} holds the pictures themselves; choose another --out"
            )
        writable_folder(folder)
        return places

    places = by_first(processes, begin)  # what a folder holds may change between two looks
    read = {"max_pixels": max_pixels, "channels": model.config.input.channels}
    given = {"options": options, "views": views, "cuda_graphs": cuda_graphs, "size": size}
    written, failed = [], []
    with Together(processes) as work:
        names = enumerate(zip(places, _names(Path(place.name) for place in places)))
        for number, (place, name) in names:
            if number % processes.count != processes.rank:
                continue
            if work.failed():
                break
            try:
                result = segment(model, read_place(place, **read), task, **given)
                save_picture(folder / f"{name}_overlay.png", result.plot())
                save_label_map(folder / f"{name}_labels.png", result)
                write_json(folder / f"{name}.json", {"image": place.name, **result.to_json()})
                written.append(folder / f"{name}.json")
                outcome = Predicted(place.image, result, written[-1])
            except FAILURES as error:
                reason = reason_of(str(place), error)
                failed.append((place.image, reason))
                outcome = Predicted(place.image, error=reason)
            if report is not None:
                report(outcome)
    return written, failed


def pictures(
    paths: Iterable[str | Path], lists: Iterable[str | Path] = (), recursive: bool = False
) -> list[Place]:
    """All that `io.picture_list.listed` gives.

    Raises:
        ValueError: no path, or a folder without pictures.
    """
    places = list(listed(paths, lists, recursive))
    if not places:
        raise ValueError("predict: no image given")
    return places


def _names(paths: Iterable[Path]) -> Iterator[str]:
    """File stems, made unique by _2, _3 and so on, also where a file system ignores case."""
    taken: set[str] = set()
    last: dict[str, int] = {}  # number of a stem's last name: no number is tried twice
    for path in paths:
        name = path.stem
        key = name.casefold()
        while name.casefold() in taken:
            last[key] = last.get(key, 1) + 1
            name = f"{path.stem}_{last[key]}"
        taken.add(name.casefold())
        yield name
