"""Writes the reference pages of the package's Python names: `python tools/reference.py FOLDER`.

A warning of pdoc, such as for an annotation that names nothing, is an error.
"""

import ast
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ("kernels",)  # Triton's code, which ops call
ROOMS = sorted({path.parent.name for path in ROOT.glob("segkern/*/__init__.py")} - {*LEFT_OUT})


def write(folder: Path) -> None:
    """Writes the pages, index.html the first.

    Raises:
        UserWarning: pdoc could not make sense of something.
    """
    import pdoc

    import segkern

    for name in segkern.__all__:  # which come when they are first asked for
        getattr(segkern, name)
    pdoc.render.configure(docformat="google")
    rooms = [f"segkern.{name}" for name in ROOMS if name not in segkern.__all__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc("segkern", *rooms, output_directory=folder)


def undocumented(package: Path = ROOT / "segkern") -> list[str]:
    """Public modules, classes, functions and methods without docstring, as FILE:LINE NAME."""
    found = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        if where.parts[0] in LEFT_OUT:
            continue
        tree = ast.parse(path.read_text())
        if ast.get_docstring(tree) is None:
            found.append(f"{where}:1 the module")
        found += [f"{where}:{line} {name}" for line, name in _bare(tree, "")]
    return found


def _bare(node: ast.Module | ast.ClassDef, prefix: str):
    for child in node.body:
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if child.name.startswith("_") or child.name == "forward":  # its class says what it does
            continue
        if ast.get_docstring(child) is None:
            yield child.lineno, prefix + child.name
        if isinstance(child, ast.ClassDef):
            yield from _bare(child, f"{prefix}{child.name}.")


if __name__ == "__main__":
    if lacking := undocumented():
        sys.exit("without docstring:\n" + "\n".join(lacking))
    write(Path(sys.argv[1]))
    print(f"{sys.argv[1]}/index.html")
