"""Prints the tables of a smaller model for docs/quantize_and_prune.md, in Markdown.

python tools/small_tables.py MODEL [--data ROOT] [--limit N]: MODEL as of `segkern evaluate`, whose
data it is measured on. Run it on an otherwise idle machine: the tables have times.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import segkern
from segkern.cli.measured import data_for, training_data
from segkern.deploy.figures import markdown
from segkern.deploy.quantize import METHODS
from segkern.models import SegmentationModel
from segkern.models.smaller import parts_of

ZEROS = (0.1, 0.3, 0.5, 0.7, 0.9)


def prunings(model: SegmentationModel) -> Iterator[tuple[str, dict]]:
    """What is cut, and what it is called."""
    parts = parts_of(model)
    if parts.layers is not None:
        for layers in range(model.config.decoder_layers - 1, 0, -1):
            yield f"{layers} of {model.config.decoder_layers} layers", {"layers": layers}
    if parts.queries:
        count = model.config.num_queries
        for queries in sorted({count * 3 // 4, count // 2, count // 4}, reverse=True):
            if queries > parts.fixed:
                yield f"{queries} of {count} queries", {"queries": queries}
    for share in ZEROS:
        yield f"{share:.0%} zeros", {"zeros": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int)
    wanted = parser.parse_args()
    model = segkern.open_model(wanted.model)
    source, title, tasks, limit, options = data_for(wanted.model, model, wanted.data, wanted.limit)
    measured = {"tasks": tasks, "limit": limit, "options": options}
    calibration = training_data(wanted.model, wanted.data, source)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for method in METHODS:
            out = Path(folder, f"{method}.onnx")
            found = segkern.quantize(
                model, out, source, method, calibration, max_drop=1.0, **measured
            )
            rows += found[-1:] if rows else found
        print(f"{type(model).__name__} on {title}\n\n{markdown(rows)}\n")
        rows = []
        for name, cut in prunings(model):
            report = segkern.prune(model, Path(folder, name), **cut, dataset=source, **measured)
            before, after = report["rows"]
            rows += [after | {"name": name}] if rows else [before, after | {"name": name}]
        print(markdown(rows))


if __name__ == "__main__":
    main()
