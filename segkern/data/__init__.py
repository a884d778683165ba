"""Data sets and how their samples become batches. Ground floor: knows no model."""

from .collate import Batch as Batch
from .collate import Order as Order
from .collate import collate as collate
from .digits import Digits as Digits
from .digits import DigitsConfig as DigitsConfig


def build_dataset(config: DigitsConfig, split: str) -> Digits:
    """The data set that a config describes.

    Args:
        config: its class says which data set.
        split: "train", "val" or "test".

    Raises:
        TypeError: no data set has such a config.
        ValueError: a setting out of range.
    """
    if isinstance(config, DigitsConfig):
        return Digits(config, split)
    raise TypeError(f"build_dataset: config must be a DigitsConfig, got {type(config).__name__}")
