"""Pickles of arrays, and what a pickle might do with NumPy's own classes."""

import argparse
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from segkern.weights.unpickling import load, load_arrays

VALUES = {
    "C order": np.arange(6.0).reshape(2, 3),
    "Fortran order": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    "big endian": np.array([1.5, -2], ">f4"),
    "turned": np.arange(24, dtype=np.int16).reshape(2, 3, 4).transpose(1, 0, 2),
    "every other": np.arange(9.0)[::2],
    "bool": np.array([True, False]),
    "no dimension": np.array(7, np.uint16),
    "scalar": np.float64(0.25),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", VALUES)
def test_arrays_are_those_that_were_written(name, protocol, tmp_path):
    if name == "empty" and protocol < 3:
        protocol = 3  # NumPy writes them as it can there
    tree = OrderedDict(model={"a": VALUES[name]}, more=[1, (VALUES[name],)])
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree, protocol))
    found = load_arrays(tmp_path / "a.pkl")
    for value in (found["model"]["a"], found["more"][1][0]):
        np.testing.assert_array_equal(value, VALUES[name])
        assert value.dtype == VALUES[name].dtype


def test_values_beside_weights(tmp_path):
    tree = {
        "w": torch.ones(2),
        "args": argparse.Namespace(rate=np.float64(0.5)),
        "n": np.arange(3),
    }
    torch.save(tree, tmp_path / "a.pth")
    found = load(tmp_path / "a.pth")
    assert torch.equal(found["w"], tree["w"])
    assert found["n"].tolist() == [0, 1, 2]


class Made:
    """Pickles as a call of `function`, and a state that is given to its result."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments, *([] if state is None else [state]))

    def __reduce__(self):
        return self.call


POINTERS = {
    "an array of pointers": Made(np.ndarray, (1,), "O", b"A" * 8),
    "a dtype of pointers": Made(np.dtype, "O"),
    "a buffer of pointers": Made(
        np._core.numeric._frombuffer, b"A" * 8, Made(np.dtype, "O"), (1,), "C"
    ),
    "numbers that are called pointers": np.array(
        Made(np.dtype, "f8", state=(3, "<", None, None, None, -1, -1, 63)), object
    ),
}


@pytest.mark.parametrize("case", POINTERS)
def test_no_pickle_makes_pointers(case, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Made(OrderedDict, POINTERS[case]), 2))
    with pytest.raises(ValueError, match="not a whole pickle of arrays"):
        load_arrays(tmp_path / "a.pkl")
    torch.save(Made(OrderedDict, POINTERS[case]), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"not a whole checkpoint|code and not run"):
        load(tmp_path / "a.pth")
