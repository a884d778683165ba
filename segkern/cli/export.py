"""The command `segkern export`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..deploy.bundle import bundle as write_bundle
from ..deploy.compare import BOUND
from ..deploy.export import export as write_file
from ..deploy.graph import POSTS
from ..models import open_model
from ..structures.settings import Options
from .arguments import Task


def export(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    task: Task | None = None,
    post: Literal[POSTS] | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    fixed: bool = False,
    one_size: bool = False,
    grid_sample: bool = False,
    threshold: float | None = None,
    top_k: int | None = None,
    opset: int = 20,
    bound: float = BOUND,
    check: bool = True,
    bundle: bool = False,
    program: bool = False,
) -> None:
    """Write a model as a file for other runtimes, run it there, and prove that it computes the
    same.

    Says by how much each result differs. Fails where that is more than the bound, and writes
    nothing then.

    Args:
        model: folder of a run or a model, or a name on the Hugging Face hub.
        out: a file, model.onnx, model.xml (OpenVINO) or model.pt2 (with segkern's kernels); or,
            without such a suffix, a new folder for a bundle: model.onnx, labels.json,
            preprocessing.json, and a predict.py that needs numpy, pillow and onnxruntime alone.
        task: what to look for; not given, the first that the model can do.
        post: what the file gives: not given, logits as the model makes them; full, logits at the
            picture's size; semantic, instance or panoptic, that result.
        size: height and width of the pictures; not given, those of the model's crops or windows.
        batch: pictures at a time, with --fixed; not given, 1.
        fixed: one number of pictures of one size; not given, any number, and any sides where the
            model takes them.
        one_size: any number of pictures of one size.
        grid_sample: deformable attention by GridSample, for ONNX Runtime and OpenVINO; not given,
            by gathers, as TensorRT has been seen to compile GridSample wrongly.
        threshold: least score of a segment, of --post panoptic and instance, and of a bundle.
        top_k: most masks, of --post instance, and of a bundle.
        opset: of ONNX.
        bound: the most that a result may differ by, as a share of its largest magnitude.
        check: run the file and compare it with the model.
        bundle: OUT is a folder for a bundle, whatever its name.
        program: of .pt2: what torch.export records, for Python; not given, it is compiled for this
            kind of CPU, for C++ and Python.
    """
    options = None if threshold is top_k is None else Options(threshold, top_k=top_k)
    if bundle or not out.suffix:
        kept = post, size, batch, fixed or None, one_size or None, grid_sample or None
        if any(value is not None for value in kept) or not check or program:
            raise ValueError(
                "export: post, size, batch, fixed, one_size, grid_sample, program and check are "
                "for a file, a bundle has its own"
            )
        made = write_bundle(open_model(model), out, task, options, opset, bound)
    else:
        if fixed and one_size:
            raise ValueError("export: give --fixed or --one-size, got both")
        if batch is not None and not fixed:
            raise ValueError("export: batch is for --fixed")
        dynamic = "batch" if one_size else not fixed
        settings = {"options": options, "opset": opset, "bound": bound, "program": program}
        made = write_file(
            open_model(model),
            out,
            task,
            post,
            size,
            batch,
            dynamic,
            grid_sample,
            check,
            **settings,
        )
    pictures = "any number of pictures" if made.batch is None else f"{made.batch} at a time"
    sides = "any sides" if made.size is None else "{} x {}".format(*made.size)
    print(f"task {made.form.task}; gives {', '.join(made.form.outputs)}; {pictures}, {sides}")
    for line in made.lines():
        print(f"differs from the model, at most, for pixels {line}")
    print(f"written: {out}")
