"""Installing: what an import brings, what is built for which torch, nvcc and GPU, what is said of
what is missing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import segkern

ROOT = Path(__file__).parent.parent


def python(code, cwd, **variables):
    """What a new process prints that runs `code` with this tree's segkern."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    return run.stdout


BROUGHT = """
import sys, torch
before = set(sys.modules)
{code}
print(*sorted(set(sys.modules) - before))
"""
HELP = """
from segkern.cli import main
try:
    main(["--help"])
except SystemExit:
    print()
"""


def test_import_brings_the_ops_alone(tmp_path):
    """Modules are counted, not seconds, which a busy machine stretches."""
    brought = python(BROUGHT.format(code="import segkern"), tmp_path).split()
    assert {name.partition(".")[0] for name in brought} == {"segkern"}
    rooms = {".".join(name.split(".")[:2]) for name in brought}
    assert rooms == {"segkern", "segkern._moved", "segkern.ops"}


def test_help_brings_nothing_that_takes_long(tmp_path):
    brought = python(BROUGHT.format(code=HELP), tmp_path).splitlines()[-1].split()
    assert "segkern.cli" in brought
    long = ("timm", "torchvision", "transformers", "scipy.ndimage", "matplotlib", "sklearn")
    for name in (*long, "torch._dynamo", "torchmetrics", "tensorboard", "triton"):
        assert name not in brought


def test_the_face_has_every_name_that_editors_see():
    tree = ast.parse(Path(segkern.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        seen |= {alias.asname: node.module or "" for alias in node.names}
    assert seen == segkern._HOME
    assert set(segkern.__all__) == {"ops", *seen}
    for name in segkern.__all__:
        assert name in dir(segkern)
        assert getattr(segkern, name) is not None
