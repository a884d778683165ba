"""Helpers of the metrics: numbers that may be undefined, packages that may be missing."""

import importlib

import numpy as np


def import_extra(name: str):
    """A module of the extra `train`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"evaluate needs {package}: pip install {package} "
            "(or segkern's extra `train`: pip install '.[train]' in its folder)"
        ) from error


def or_none(x: float) -> float | None:
    """The number, None for NaN."""
    return None if np.isnan(x) else float(x)


def mean_or_none(x: np.ndarray) -> float | None:
    """The mean of those that are not NaN, None where all are."""
    x = x[~np.isnan(x)]
    return float(x.mean()) if x.size else None


def ratio_or_none(a: float, b: float) -> float | None:
    """a / b, None where b is 0."""
    return float(a / b) if b else None
