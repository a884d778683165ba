"""Which format a folder holds, told from its files."""

import mmap
from pathlib import Path

from ..io.sources import is_url
from .ade20k import Ade20kConfig, ade20k_views, is_full
from .cityscapes import CityscapesConfig, truth_files
from .coco import OTHERS, CocoConfig
from .folder import FolderConfig
from .instance_maps import InstanceMapsConfig
from .labelme import LabelMeConfig
from .maps import maps_below
from .pascal_context import PascalContextConfig
from .pictures import files_below, pictures_below
from .shard_files import INDEX, has_index, no_index
from .shards import found_shards
from .yolo import YoloConfig


def find_format(root: str | Path) -> tuple[object, str]:
    """The data set in a folder.

    Args:
        root: the folder; of shards also an address (http://, https://).

    Returns:
        its config, and a line that says what was found and by what, for the caller to show.

    Raises:
        OSError: the index of shards at an address cannot be fetched.
        ValueError: no such folder, or none of the formats.
    """
    if is_url(root) or has_index(Path(root)):
        config = found_shards(root)
        return config, f"{root}: found data of kind shards ({config.task}): it has {INDEX}"
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    found = _found(root)
    if found is None and (tars := sorted(root.glob("*.tar"))):
        raise ValueError(no_index(root, tars))
    if found is None:
        count = len(pictures_below(root))
        raise ValueError(
            f"{root}: holds no data set of a known format: neither JSON of COCO or LabelMe, nor "
            "a YAML of YOLO, nor maps in instances or labels beside images "
            f"({count or 'no'} pictures are there)"
        )
    config, sign = found
    what = getattr(config, "layout", config.task)
    return config, f"{root}: found data of kind {config.kind} ({what}): it has {sign}"


def _found(root: Path) -> tuple[object, str] | None:
    if (known := _published(root)) is not None:
        return known
    if (root / "images").is_dir() and (root / "instances").is_dir():
        return InstanceMapsConfig(root), "images and instances"
    files = files_below(root)
    for path in files:
        if path.parent == root and path.suffix in (".yaml", ".yml") and _holds(path, b"names"):
            return YoloConfig(root), path.name
    jsons = [path for path in files if path.suffix.lower() == ".json"]
    jsons = [path for path in jsons if not any(word in path.name for word in OTHERS)]
    jsons.sort(key=lambda path: "panoptic" not in path.name)  # where both are, it has more
    for path in jsons:
        for make, words in (
            (lambda: CocoConfig(root, "panoptic"), (b'"segments_info"', b'"categories"')),
            (lambda: CocoConfig(root), (b'"annotations"', b'"categories"')),
            (lambda: LabelMeConfig(root), (b'"shapes"',)),
        ):
            if all(_holds(path, word) for word in words):
                return make(), str(path.relative_to(root))
    if (root / "images").is_dir() and (root / "labels").is_dir():
        labels = root / "labels"
        rows = [path for path in files if path.suffix == ".txt" and labels in path.parents]
        if rows and not maps_below(labels):
            raise ValueError(
                f"{root}: has text files as of YOLO ({rows[0].relative_to(root)}), but no "
                "data.yaml with the names of the classes: write one, with a line as "
                "`names: [cat, dog]`"
            )
        return FolderConfig(root), "images and labels"
    return None


def _published(root: Path) -> tuple[object, str] | None:
    """One of the sets that are known by folders which no other has; with objects where it has."""
    if (root / "leftImg8bit").is_dir():
        objects = truth_files(root / "gtFine", "panoptic")
        return CityscapesConfig(root, "panoptic" if objects else "semantic"), "leftImg8bit"
    if is_full(root):
        full = Ade20kConfig(root, "semantic", views=ade20k_views("semantic"))
        return full, "pictures of the full set"
    kinds = [
        k for k in ("annotations_instance", "annotations") if (root / k / "training").is_dir()
    ]
    joint = sorted(root.glob("ade20k_panoptic_*.json"))  # of Mask2Former's converter
    if joint and len(kinds) < 2:
        return CocoConfig(root, "panoptic", views=ade20k_views("panoptic")), joint[0].name
    if kinds:
        alone = "semantic" if kinds == ["annotations"] else "instance"
        task = "panoptic" if len(kinds) == 2 else alone
        return Ade20kConfig(root, task, views=ade20k_views(task)), f"{kinds[0]}/training"
    if (root / "JPEGImages").is_dir():
        for sign in ("ImageSets/SegmentationContext", "trainval"):
            if (root / sign).is_dir():
                return PascalContextConfig(root), sign
    return None


def _holds(path: Path, word: bytes) -> bool:
    """Whether a file, which may be large, holds a word."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return text.find(word) >= 0
    except (OSError, ValueError):  # ValueError: it is empty
        return False
