"""Data sets and how their samples become batches. Knows no model.

Adding a format: its file here, with a config and a data set, and a line of `FORMATS`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Union

from .ade20k import Ade20kConfig as Ade20kConfig
from .ade20k import ade20k_views as ade20k_views
from .ade20k import read_ade20k
from .cityscapes import CityscapesConfig as CityscapesConfig
from .cityscapes import export_cityscapes as export_cityscapes
from .cityscapes import read_cityscapes
from .class_maps import ClassMapsConfig as ClassMapsConfig
from .class_maps import read_class_maps
from .coco import CocoConfig as CocoConfig
from .coco import read_coco
from .collate import Batch as Batch
from .collate import collate as collate
from .digits import Digits as Digits
from .digits import DigitsConfig as DigitsConfig
from .find_format import find_format as find_format
from .folder import Folder as Folder
from .folder import FolderConfig as FolderConfig
from .instance_maps import InstanceMapsConfig as InstanceMapsConfig
from .instance_maps import read_instance_maps
from .joint_tasks import JointTasks as JointTasks
from .labelme import LabelMeConfig as LabelMeConfig
from .labelme import read_labelme
from .order import Order as Order
from .pascal_context import PascalContextConfig as PascalContextConfig
from .pascal_context import read_pascal_context
from .pictures import Pictures as Pictures
from .pictures import ReadConfig as ReadConfig
from .sample import IdMaps as IdMaps
from .sample import Sample as Sample
from .shards import Shards as Shards
from .shards import ShardsConfig as ShardsConfig
from .streets import Streets as Streets
from .streets import StreetsConfig as StreetsConfig
from .transforms import SemanticViews as SemanticViews
from .views import InstanceViews as InstanceViews
from .views import ViewConfig as ViewConfig
from .wrapped import Wrapped as Wrapped
from .write_shards import write_shards as write_shards
from .yolo import YoloConfig as YoloConfig
from .yolo import read_yolo


class Format(NamedTuple):
    """A row of `FORMATS`.

    Attributes:
        config: class of the settings: a dataclass with `kind`, its key in `FORMATS`; `task`, which
            evaluation during training measures; and `targets`, what its samples have of "masks"
            and "semantic".
        dataset: called with such settings, a split and views (or None); has a length, samples by
            index, `classes` (names) and `stuff` (labels).
    """

    config: type
    dataset: Callable


FORMATS = {
    "digits": Format(DigitsConfig, Digits),
    "folder": Format(FolderConfig, Folder),
    "coco": Format(CocoConfig, read_coco),
    "labelme": Format(LabelMeConfig, read_labelme),
    "instance_maps": Format(InstanceMapsConfig, read_instance_maps),
    "yolo": Format(YoloConfig, read_yolo),
    "ade20k": Format(Ade20kConfig, read_ade20k),
    "cityscapes": Format(CityscapesConfig, read_cityscapes),
    "pascal_context": Format(PascalContextConfig, read_pascal_context),
    "class_maps": Format(ClassMapsConfig, read_class_maps),
    "streets": Format(StreetsConfig, Streets),
    "shards": Format(ShardsConfig, Shards),
}
DataConfig = Union[tuple(row.config for row in FORMATS.values())]  # noqa: UP007


def build_dataset(config: DataConfig, split: str, model=None):
    """The data set that a config describes.

    Args:
        config: its kind says which data set.
        split: "train", "val" or, of scenes that are drawn, "test".
        model: a model's config, whose `input` says on what it is trained: of images in folders
            give random views, `crop` large, at ratio 1 from images with its shortest and longest
            edge; a config with `views` gives those, of the size of `crop` where it is given. None
            leaves the images whole.

    Raises:
        TypeError: no data set has such a config.
        ValueError: a setting out of range, pictures of other channels than the model takes, or a
            folder that is not as its layout says.
    """
    row = FORMATS.get(getattr(config, "kind", None))
    if row is None:
        raise TypeError(
            f"build_dataset: config must be that of one of {', '.join(FORMATS)}, "
            f"got {type(config).__name__}"
        )
    views, read = None, getattr(config, "read", None)
    if model is not None and model.input.channels != (read.channels if read else 3):
        raise ValueError(
            f"build_dataset: channels of the data must be {model.input.channels}, as the model "
            f"takes them (input.channels), got {read.channels if read else 3}"
        )
    if model is not None and hasattr(config, "views"):
        wanted = config.views
        if model.input.crop is not None:
            wanted = replace(wanted, size=model.input.crop)
        look = model.input
        views = InstanceViews(wanted, look.mean, look.std, look.padding)
    elif model is not None and model.input.crop is not None:
        look = model.input
        edges = look.shortest_edge, look.longest_edge
        if look.shortest_edge is None:  # it predicts from pictures of a fixed size
            edges = min(look.crop), 4 * min(look.crop)
        views = SemanticViews(look.crop, edges, look.mean, look.std)
    return row.dataset(config, split, views)


def data_config(settings: dict) -> DataConfig:
    """The config of plain settings with their `kind`.

    Raises:
        KeyError: no such kind.
        TypeError, ValueError: settings that it does not know or allow.
    """
    settings = dict(settings)
    return FORMATS[settings.pop("kind")].config(**settings)
