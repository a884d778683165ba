"""Data sets and how their samples become batches. Ground floor: knows no model."""

from .collate import Batch as Batch
from .collate import collate as collate
from .digits import Digits as Digits
from .digits import DigitsConfig as DigitsConfig
from .folder import Folder as Folder
from .folder import FolderConfig as FolderConfig
from .order import Order as Order
from .transforms import SemanticViews as SemanticViews

DataConfig = DigitsConfig | FolderConfig


def build_dataset(config: DataConfig, split: str, model=None) -> Digits | Folder:
    """The data set that a config describes.

    Args:
        config: its class says which data set.
        split: "train", "val" or, of digits, "test".
        model: the config of a Segmenter: of images in folders give random views as it is trained
            on, image_size large, at ratio 1 from images with its shortest and longest edge; None
            leaves the images whole.

    Raises:
        TypeError: no data set has such a config.
        ValueError: a setting out of range, or a folder that is not as its layout says.
    """
    if isinstance(config, DigitsConfig):
        return Digits(config, split)
    if not isinstance(config, FolderConfig):
        raise TypeError(
            "build_dataset: config must be a DigitsConfig or a FolderConfig, "
            f"got {type(config).__name__}"
        )
    if model is None:
        return Folder(config, split)
    scale = model.shortest_edge, model.longest_edge
    views = SemanticViews(model.image_size, scale, model.image_mean, model.image_std)
    return Folder(config, split, views)
