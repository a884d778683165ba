"""Reads pickled checkpoints without executing anything that they hold."""

import argparse
import codecs
import pickle
import re
import threading
from collections import OrderedDict
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from torch.serialization import get_safe_globals, safe_globals

_SCALAR, _ARRAY = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
_DTYPES = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
# what people keep beside weights: values that do nothing when they are made; a name is what the
# pickle calls it, which versions of Python and NumPy spell differently
_HARMLESS = [
    argparse.Namespace,
    frozenset,
    np.dtype,
    np.ndarray,
    *_DTYPES,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]
_LOCK = threading.Lock()  # torch keeps one list for all threads


def load(path: str | Path):
    """What torch.save wrote, on the CPU: tensors, plain types, and NumPy's values, paths and
    argparse.Namespace, as people keep them beside weights.

    Raises:
        ValueError: damaged, cut short, or holds other things; says why in one line.
    """
    try:
        with _LOCK, safe_globals([x for x in _HARMLESS if x not in get_safe_globals()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign or cut file makes the unpickler raise anything
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch writes for a terminal
        if found := re.search(r"(?:GLOBAL|class) (\S+) (?:was not an allowed|whose module)", text):
            raise ValueError(
                f"holds a {found[1]}, which is code and not run here: save it anew without"
            ) from error
        reason = text.splitlines()[0][:120] if text else ""
        reason = f"{type(error).__name__}: {reason}".rstrip(": ")
        raise ValueError(f"not a whole checkpoint ({reason})") from error


_OF_ARRAYS = {
    "collections.OrderedDict": OrderedDict,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": codecs.encode,  # of bytes, in old protocols
    **{
        f"numpy.{core}.multiarray.{name}": made
        for core in ("core", "_core")
        for name, made in (("_reconstruct", _ARRAY), ("scalar", _SCALAR))
    },
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
        ValueError: damaged, cut short, or holds other things; says why in one line.
    """
    try:
        with Path(path).open("rb") as file:
            return _Arrays(file).load()
    except Exception as error:  # a foreign or cut file makes the unpickler raise anything
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"{path}: not a whole pickle of arrays ({reason})") from error
