"""Reads pickled checkpoints without executing anything that they hold."""

import argparse
import codecs
import pickle
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from torch.serialization import get_safe_globals, safe_globals


class _Dtype:
    """Stands in for numpy.dtype, whose own would take flags that make numbers pointers."""

    def __init__(self, name: str, *_):
        if not re.fullmatch(r"[biuf]\d{1,2}", name):
            raise ValueError(f"holds values of type {name}, which are no numbers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple):
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """Stands in for numpy.ndarray until its numbers are copied."""

    def __init__(self, *_):
        self.value = None

    def __setstate__(self, state: tuple):
        _, shape, kind, fortran, data = state
        order = "F" if fortran else "C"
        self.value = np.ndarray(shape, kind.dtype, bytearray(data), order=order)


class _Scalar(_Array):
    def __init__(self, kind: _Dtype, data: bytes):
        self.value = np.frombuffer(data, kind.dtype)[0]


class _Buffer(_Array):
    """As protocol 5 writes arrays, which is Python's own from 3.14 on."""

    def __init__(self, data: bytes, kind: _Dtype, shape: tuple, order: str, axes=None):
        flat = np.frombuffer(bytearray(data), kind.dtype)
        value = flat.reshape(shape, order="F" if order == "F" else "C")
        self.value = value if axes is None else value.transpose(axes)


def _plain(x):
    """The arrays themselves in a tree of dicts, lists and tuples."""
    if isinstance(x, _Array):
        return x.value
    if type(x) in (dict, OrderedDict):
        return type(x)((key, _plain(value)) for key, value in x.items())
    return type(x)(map(_plain, x)) if type(x) in (list, tuple) else x


# a name is what the pickle calls it, which versions of Python and NumPy spell differently
_ARRAYS = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    **{
        f"numpy.{core}.{name}": made
        for core in ("core", "_core")
        for name, made in (
            ("multiarray._reconstruct", _Array),
            ("multiarray.scalar", _Scalar),
            ("numeric._frombuffer", _Buffer),
        )
    },
}
# what people keep beside weights: values that do nothing when they are made
_HARMLESS = [
    argparse.Namespace,
    frozenset,
    _Array,
    _Buffer,
    _Dtype,
    _Scalar,
    *((made, name) for name, made in _ARRAYS.items()),
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]
_WEIGHTS = ("model", "state_dict", "ema_state")  # what they are called in files, by preference
_LOCK = threading.Lock()  # torch keeps one list for all threads


def load(path: str | Path, mapped: bool = False):
    """What torch.save wrote, on the CPU: tensors, plain types, and NumPy's values, paths and
    argparse.Namespace, as people keep them beside weights.

    Args:
        path: of the file.
        mapped: tensors are read when they are used, from the file, which must be a zip archive.

    Raises:
        ValueError: not there, damaged, cut short, or holds other things; says why in one line.
    """
    try:
        with _LOCK, safe_globals([x for x in _HARMLESS if x not in get_safe_globals()]):
            return _plain(torch.load(path, "cpu", weights_only=True, mmap=mapped))
    except FileNotFoundError as error:
        raise ValueError("no such file") from error
    except Exception as error:  # a foreign or cut file makes the unpickler raise anything
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch writes for a terminal
        if found := re.search(r"(?:GLOBAL|class) (\S+) (?:was not an allowed|whose module)", text):
            raise ValueError(
                f"holds a {found[1]}, which is code and not run here: save it anew without"
            ) from error
        reason = text.partition("\n")[0].partition(". ")[0][:120]  # its first sentence
        reason = f"{type(error).__name__}: {reason}".rstrip(": ")
        raise ValueError(f"not a whole checkpoint ({reason})") from error


_OF_ARRAYS = _ARRAYS | {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": codecs.encode,  # of bytes, in old protocols
}


class _Arrays(pickle.Unpickler):
    """Makes arrays, and nothing else that a pickle names."""

    def find_class(self, module: str, name: str):
        if (found := f"{module}.{name}") not in _OF_ARRAYS:
            raise ValueError(f"holds a {found}, which is code and not run here")
        return _OF_ARRAYS[found]


def load_arrays(path: str | Path):
    """What a pickle holds of NumPy arrays and plain types, as Detectron2 writes checkpoints.

    Raises:
        ValueError: not there, damaged, cut short, or holds other things; says why in one line.
    """
    try:
        with Path(path).open("rb") as file:
            return _plain(_Arrays(file).load())
    except FileNotFoundError as error:
        raise ValueError("no such file") from error
    except Exception as error:  # a foreign or cut file makes the unpickler raise anything
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"not a whole pickle of arrays ({reason})") from error


def weights_of(content: dict) -> tuple[dict[str, torch.Tensor], str | None]:
    """The weights in what a file of `load` or `load_arrays` holds, and under which name they lie
    there; None where they are all that it holds. Arrays are tensors; what is neither is left out.
    """
    places = [name for name in _WEIGHTS if isinstance(content.get(name), dict)]
    state = content[places[0]] if places else content
    if len(places) > 1:
        warnings.warn(
            f"weights are those of '{places[0]}'; there is '{places[1]}', too", stacklevel=2
        )
    found = {
        name: torch.as_tensor(value)
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, (torch.Tensor, np.ndarray, np.generic))
    }
    return found, places[0] if places else None


def names(path: str | Path) -> set[str]:
    """The keys of the dicts that a file of `load` holds, or, where it is a .pkl, of `load_arrays`;
    of what torch.save writes today the values are not read.

    Raises:
        ValueError: as they do.
    """
    if Path(path).suffix == ".pkl":
        tree = load_arrays(path)
    else:
        tree = load(path, mapped=zipfile.is_zipfile(path))
    return set(_keys(tree))


def _keys(tree) -> Iterator[str]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield str(name)
            yield from _keys(value)
