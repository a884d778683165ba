"""State dicts in files: what is written, and what is said where it cannot be."""

import errno
import resource

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from segkern.weights import state_dicts
from segkern.weights.state_dicts import write_tensors


def test_tied_and_turned_tensors_are_written_whole(tmp_path):
    weight = torch.randn(3, 4)
    write_tensors(tmp_path / "a.safetensors", {"a": weight, "b": weight, "c": weight.t()})
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["a"], weight)
    assert torch.equal(found["b"], weight)
    assert torch.equal(found["c"], weight.t())


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path, monkeypatch):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(10000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert raised.value.errno == errno.EFBIG

    def fails(*_, **__):
        raise SafetensorError("no reason")

    monkeypatch.setattr(state_dicts, "save_file", fails)
    with pytest.raises(OSError, match="cannot be written: no reason"):
        write_tensors(tmp_path / "a.safetensors", {})
