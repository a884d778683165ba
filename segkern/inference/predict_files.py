"""Segments pictures in files: an overlay, a label map and a JSON of segments for each."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ..io.atomic_files import writable_folder, write_json
from ..io.images import open_image, picture_suffixes, read_pixels
from ..io.overlay import overlay, save_label_map, save_picture
from ..models.protocol import SegmentationModel
from ..structures.settings import Options, Views
from .segment import check, segment


def predict_files(
    model: SegmentationModel,
    paths: Sequence[str | Path],
    out_dir: str | Path,
    task: str | None = None,
    options: Options = Options(),  # noqa: B008  (frozen)
    views: Views = Views(),  # noqa: B008
    cuda_graphs: bool = True,
    report: Callable[[Path, str | None], None] | None = None,
) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Segments every picture and writes NAME_overlay.png, NAME_labels.png and NAME.json for each.

    A picture that cannot be read, or is too large for the memory, does not keep the others from
    being written. Two of the same name get NAME and NAME_2.

    Args:
        model: such as a `Mask2Former`.
        paths: pictures, and folders whose pictures are taken (not those of folders inside).
        out_dir: is made if it is not there.
        task: "panoptic", "instance" or "semantic"; None for the first that the model can do.
        options: of the results; instances below its object_mask_threshold are left out.
        views: windows, scales and mirror images.
        cuda_graphs: as in `segment`.
        report: called after each picture with its path and None, or what went wrong.

    Returns:
        the JSON files written, and the pictures that failed with the reasons.

    Raises:
        TypeError, ValueError: an option out of range or not for this model, no path, a folder
            without pictures, or `out_dir` holds some of them.
        OSError: nothing can be written to `out_dir`; found before the model runs.
    """
    task, *_ = check("predict", model, None if task is None else (task,), options, views)
    pictures = image_files(paths)
    if Path(out_dir).resolve() in {path.resolve().parent for path in pictures}:
        raise ValueError(f"predict: {out_dir} holds the pictures themselves; choose another --out")
    folder = writable_folder(out_dir)
    written, failed = [], []
    for path, name in zip(pictures, _names(pictures)):
        try:
            image = open_image(path)
            given = {"options": options, "views": views, "cuda_graphs": cuda_graphs}
            result = segment(model, image, task, **given).above(options.object_mask_threshold)
            save_picture(folder / f"{name}_overlay.png", overlay(read_pixels(image), result))
            save_label_map(folder / f"{name}_labels.png", result)
            write_json(folder / f"{name}.json", {"image": path.name, **result.to_json()})
            written.append(folder / f"{name}.json")
        except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            failed.append((path, reason if str(path) in reason else f"{path}: {reason}"))
        if report is not None:
            report(path, failed[-1][1] if failed and failed[-1][0] is path else None)
    return written, failed


def image_files(paths: Iterable[str | Path]) -> list[Path]:
    """Files as given, and of each folder the files with a suffix that PIL knows, sorted.

    Raises:
        ValueError: no path, or a folder without pictures.
    """
    known = picture_suffixes()
    out = []
    for path in map(Path, paths):
        if not path.is_dir():
            out.append(path)
            continue
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in known and p.is_file())
        if not found:
            raise ValueError(f"folder {path} holds no image")
        out += found
    if not out:
        raise ValueError("predict: no image given")
    return out


def _names(paths: Sequence[Path]) -> list[str]:
    """File stems, made unique by _2, _3 and so on."""
    names: list[str] = []
    for path in paths:
        name, n = path.stem, 1
        while name in names:
            n += 1
            name = f"{path.stem}_{n}"
        names.append(name)
    return names
