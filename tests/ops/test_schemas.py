"""The schemas that the CPU library brings, for a process without segkern's Python."""

import json
import subprocess
import sys

import pytest
import torch

from segkern.ops import _library

ALONE = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
found = {}
for name in json.loads(sys.argv[2]):
    schemas = torch._C._jit_get_schemas_for_operator(f"segkern::{name}")
    found[name] = [str(s) for s in schemas]
    if schemas:
        kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        found[name].append(kernel(f"segkern::{name}", "CPU"))
out = torch.ops.segkern.attention(*torch.ones(3, 1, 2, 4, 8), 0.5)
print(json.dumps([found, "segkern" in sys.modules, out.tolist()]))
"""


@pytest.fixture(scope="module")
def alone():
    """What a process finds that has loaded the library and no Python of segkern."""
    library = _library.PACKAGE / "_C_cpu.abi3.so"
    command = [sys.executable, "-c", ALONE, library, json.dumps(_library.OPS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.cpu_only
def test_the_library_states_the_schemas_of_all_that_it_computes(alone):
    found, imported, out = alone
    assert not imported
    assert len(_library.OPS) > 30
    for name in _library.OPS:
        if name in _library.COMPOSED:
            assert found[name] == [], "an op whose kernel is in Python cannot be called"
        else:
            op = getattr(torch.ops.segkern, name).default
            assert found[name] == [str(op._schema), True]
    assert out == [[[1.0] * 32] * 2]


@pytest.mark.cpu_only
def test_kernels_of_another_version_are_refused():
    message = r"of another version: attention is .*scale\) -> Tensor there, .*float other.* here"
    with pytest.raises(ImportError, match=message):
        _library.define("attention(Tensor q, Tensor k, Tensor v, float other) -> Tensor", None)
    assert _library.OPS.count("attention") == 1
