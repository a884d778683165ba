"""Prints how far the files that `segkern export` writes are from their models, in Markdown.

python tools/export_table.py [--only MODEL ...] [--format FORMAT ...]: small models of every kind
with random weights, each as a file of each format, of one size and of any sides. A cell is the
largest difference of any result, as a share of its largest magnitude. Takes some minutes.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import segkern

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # support

from support.small_models import EXPORTED

FORMATS = {  # suffix and options of a format; a package is compiled, which takes minutes a cell
    "ONNX": (".onnx", {}),
    "OpenVINO": (".xml", {}),
    "program": (".pt2", {"program": True}),
    "package": (".pt2", {}),
}
USUAL = ("ONNX", "OpenVINO", "program")


def cell(kind: str, form: str, dynamic: bool) -> tuple[str, bool]:
    """What is said of one file, and whether it was written."""
    torch.manual_seed(0)
    model = EXPORTED[kind]()
    size = None if kind == "EoMT" else (96, 128)  # whose own size is the only one
    suffix, options = FORMATS[form]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"model{suffix}")
        try:
            made = segkern.export(model, path, size=size, dynamic=dynamic, **options)
        except ValueError as error:
            return f"refused: {error}".replace("|", "/"), False
    worst = max(max(one.largest.values()) for one in made.differences)
    return f"{worst:.1e}" + (", one size" if dynamic and made.size else ""), True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=EXPORTED, default=list(EXPORTED))
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=USUAL)
    wanted = parser.parse_args()
    columns = [(f, d) for f in wanted.format for d in (False, True)]
    heads = [f"{f}, {'any sides' if d else 'fixed'}" for f, d in columns]
    print(f"| model | {' | '.join(heads)} |\n|{' --- |' * (1 + len(heads))}", flush=True)
    every = True
    for kind in wanted.only:
        row = [cell(kind, *column) for column in columns]
        every &= all(written for _, written in row)
        print(f"| {kind} | {' | '.join(text for text, _ in row)} |", flush=True)
    return 0 if every else 1


if __name__ == "__main__":
    sys.exit(main())
