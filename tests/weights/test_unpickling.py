"""Pickles of arrays, and what a pickle might do with NumPy's own classes."""

import argparse
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from segkern.weights.pickling import dump_arrays
from segkern.weights.unpickling import load, load_arrays, names, weights_of

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


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old torch"])
def test_names_without_values(zipped, tmp_path):
    tree = {"model": {"a.weight": torch.ones(2)}, "optimizer": {"state": {0: {}}}, "more": [1]}
    torch.save(tree, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert names(tmp_path / "a.pth") == {"model", "a.weight", "optimizer", "state", "0", "more"}
    arrays = {"model": {"a.weight": np.ones(2)}, "__author__": "x"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays))
    assert names(tmp_path / "a.pkl") == {"model", "a.weight", "__author__"}


def test_where_weights_lie():
    a, b = {"w": torch.ones(2)}, {"w": np.zeros(2), "text": "x", 3: torch.ones(1)}
    assert weights_of({"model": a, "optimizer": b}) == (a, "model")
    found, place = weights_of({"state_dict": b})
    assert (list(found), place) == (["w"], "state_dict")
    assert torch.equal(found["w"], torch.zeros(2, dtype=torch.float64))
    assert weights_of(a) == (a, None)
    with pytest.warns(
        UserWarning, match="weights are those of 'model'; there is 'ema_state', too"
    ):
        assert weights_of({"ema_state": b, "model": a}) == (a, "model")


def test_arrays_that_are_written(tmp_path):
    """Also those of a NumPy below 2, which has no module numpy._core."""
    tree = OrderedDict(
        model=VALUES | {"big endian": np.ones(2, ">f4")}, more=[1, "x", (2.5, None)]
    )
    dump_arrays(tmp_path / "a.pkl", tree)
    assert b"numpy._core" not in (tmp_path / "a.pkl").read_bytes()
    for found in (
        load_arrays(tmp_path / "a.pkl"),
        pickle.loads((tmp_path / "a.pkl").read_bytes()),
    ):
        assert found["more"] == tree["more"]
        for name, value in tree["model"].items():
            np.testing.assert_array_equal(found["model"][name], value)


class Made:
    """Pickles as a call of `function`, and a state that is given to its result."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments, *([] if state is None else [state]))

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old torch"])
@pytest.mark.parametrize("way", [load, names, lambda p: load(p, mapped=True)])
def test_code_in_a_pth_is_named_and_not_run(way, zipped, tmp_path, capsys):
    tree = {"model": {"w": torch.ones(2)}, "scheduler": Made(print, ("run",))}
    torch.save(tree, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    if way in (load, names) or zipped:
        with pytest.raises(ValueError, match=r"holds a (builtins\.)?print, which is code"):
            way(tmp_path / "a.pth")
    assert "run" not in capsys.readouterr().out


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
