"""Writes pickles of NumPy arrays that NumPy's versions of before 2 open, too."""

import pickle
from pathlib import Path


class _OldNames(pickle._Pickler):  # of Python, as that of C does not ask how functions are called
    """Calls NumPy's functions by the names that all of its versions know."""

    def save_global(self, obj, name=None):
        module = str(getattr(obj, "__module__", ""))
        if not module.startswith("numpy._core."):
            return super().save_global(obj, name)
        module = module.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{obj.__name__}\n".encode())
        return self.memoize(obj)


def dump_arrays(path: Path, tree) -> None:
    """Writes dicts, lists and plain values with arrays in them, as `unpickling.load_arrays` opens
    them.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        _OldNames(file, protocol=3).dump(tree)
