"""Images and maps of their classes in folders, as `Folder` reads them, for models of masks: each
class of a picture is a segment.

Views are those of pictures with segments; evaluation measures the semantic task.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from .folder import Folder, FolderConfig, Layout
from .maps import MapSizes
from .pictures import FlatPaths, Pictures, ReadConfig, Truth, settle
from .views import InstanceViews, ViewConfig, scaled_sides


@dataclass
class ClassMapsConfig:
    """Images and maps of their classes in folders, a segment a class.

    Attributes:
        root, layout: as of `FolderConfig`.
        seed: other seeds give other views.
        read: how files are read.
        views: of the training pictures.
    """

    kind: ClassVar[str] = "class_maps"
    task: ClassVar[str] = "semantic"
    targets: ClassVar[tuple[str, ...]] = ("masks", "semantic")

    root: Path = Path(".")
    layout: Layout = "plain"
    seed: int = 0
    read: ReadConfig = field(default_factory=ReadConfig)
    views: ViewConfig = field(
        default_factory=lambda: ViewConfig(
            (512, 512), short_sides=scaled_sides(512), long_side=2048, colours=True
        )
    )

    def __post_init__(self):
        settle(self)
        _ = self.folder  # checks the layout

    @property
    def folder(self) -> FolderConfig:
        """The same folder for models of pixels."""
        read = self.read
        return FolderConfig(
            self.root, self.layout, self.seed, read.exif, read.max_pixels, read.channels
        )


def read_class_maps(
    config: ClassMapsConfig, split: str = "train", views: InstanceViews | None = None
) -> Pictures:
    """The pictures of a split.

    Args:
        config: where they are.
        split: "train" or "val".
        views: for training; None leaves them whole.

    Raises:
        ValueError: as `Folder`.
    """
    folder = Folder(config.folder, split)
    paths, files = zip(*folder.pairs)
    truth = _Maps(folder, FlatPaths(files))
    settings = config.read, views, config.seed
    return Pictures(
        paths,
        truth,
        folder.classes,
        folder.stuff,
        *settings,
        sizes=MapSizes(truth.files),
        semantic=True,
    )


class _Maps:
    """Maps of classes, called with an index and the picture's size."""

    def __init__(self, folder: Folder, files: FlatPaths):
        self.folder, self.files = folder, files
        folder.pairs = []  # they are in flat arrays now

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        path = self.files[index]
        labels = self.folder.labels(path)
        if labels.shape != size:
            raise ValueError(
                f"{path}: must have its picture's size, {list(size)}, got {list(labels.shape)}"
            )
        return Truth.of_map(labels)
