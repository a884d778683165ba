"""Pascal Context: maps of 59 classes and the background, as MMSegmentation's converter or the
original has them.

    JPEGImages/NAME.jpg
    SegmentationClassContext/NAME.png            0 the background, 1 to 59; 255 does not count
    trainval/NAME.mat                            where there are no such PNGs: LabelMap of 459
    ImageSets/SegmentationContext/train.txt      names of the split, and val.txt; where there are
      or ImageSets/Main/train.txt                  none the lists of VOC 2010, which the set keeps

The 59 classes are those of the original's 459 that the paper's benchmark keeps; all others are
background. Where `background` is false it is no class, and its pixels do not count.
Source: Mottaghi et al., CVPR 2014.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..structures.labels import PASCAL_CONTEXT, PASCAL_CONTEXT_IDS, VOID
from .maps import MAPS, MapSizes, maps_below, name_below, paired, read_map
from .pictures import FlatPaths, Pictures, ReadConfig, Truth, expect_split, pictures_below, settle
from .views import InstanceViews, ViewConfig, scaled_sides

LISTS = ("ImageSets/SegmentationContext", "ImageSets/Main")
_MAT = ".mat"


@dataclass
class PascalContextConfig:
    """Pascal Context.

    Attributes:
        root: VOCdevkit/VOC2010.
        background: whether the background is a class, the first of 60, or does not count.
        seed: other seeds give other views.
        read: how files are read.
        views: of the training pictures.
    """

    kind: ClassVar[str] = "pascal_context"
    task: ClassVar[str] = "semantic"
    targets: ClassVar[tuple[str, ...]] = ("masks", "semantic")

    root: Path = Path(".")
    background: bool = True
    seed: int = 0
    read: ReadConfig = field(default_factory=ReadConfig)
    views: ViewConfig = field(
        default_factory=lambda: ViewConfig(
            (480, 480), short_sides=scaled_sides(520), colours=True, most=0.75
        )
    )

    def __post_init__(self):
        settle(self)


def read_pascal_context(
    config: PascalContextConfig, split: str = "train", views: InstanceViews | None = None
) -> Pictures:
    """The pictures of a split.

    Args:
        config: where they are.
        split: "train" or "val".
        views: for training; None leaves them whole.

    Raises:
        ValueError: a folder or list is missing, or no picture with a map is left; names it.
    """
    expect_split("pascal_context", split)
    images = config.root / "JPEGImages"
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder")
    lists = [config.root / folder / f"{split}.txt" for folder in LISTS]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        raise ValueError(f"{lists[0]}: no such file; it has the names of the images, one a line")
    listed = {
        line.split()[0] for line in found.read_text("utf-8-sig").splitlines() if line.strip()
    }
    pictures = {path: name_below(path, images) for path in pictures_below(images)}
    lost = sorted(listed - {*pictures.values()})
    faults = [f"{images}: has no image {name}, which {found} lists" for name in lost]
    pictures = {path: name for path, name in pictures.items() if name in listed}
    maps = maps_below(config.root / "trainval", kinds=(_MAT,))
    maps |= maps_below(config.root / "SegmentationClassContext", kinds=MAPS)
    wanted = f"{config.root}/SegmentationClassContext/{{}}.png"
    paths, (files,) = paired(pictures, {wanted: maps}, faults)
    names = PASCAL_CONTEXT[0 if config.background else 1 :]
    settings = config.read, views, config.seed
    truth, stuff = Maps(files, config.background), tuple(range(len(names)))
    sizes = MapSizes(truth.files)
    return Pictures(
        paths, truth, names, stuff, *settings, sizes=sizes, semantic=True, faults=faults
    )


class Maps:
    """Maps of classes, called with an index and the picture's size."""

    def __init__(self, files: list[Path], background: bool):
        self.files, self.background = FlatPaths(files), background

    def __call__(self, index: int, size: tuple[int, int]) -> Truth:
        path, K = self.files[index], len(PASCAL_CONTEXT)
        if path.suffix.lower() == _MAT:
            labels = _of_459(path, size)
        else:
            labels = read_map(path, size, channels=1)
            if (foreign := labels[(labels < 0) | ((labels >= K) & (labels != VOID))]).size:
                raise ValueError(f"{path}: values must be 0 to {K - 1} or 255, got {foreign[0]}")
        labels = labels.astype(np.uint8)
        if not self.background:
            labels = np.where(labels == VOID, labels, labels - np.uint8(1))  # 0 becomes 255
        return Truth.of_map(labels)


def _of_459(path: Path, size: tuple[int, int]) -> np.ndarray:
    """[H, W] labels of the 60 classes from a file of MATLAB.

    Raises:
        ValueError: it cannot be read, or holds no such map; names the file.
    """
    from scipy.io import loadmat  # here, as few have such files

    try:
        values = np.asarray(loadmat(path, variable_names=["LabelMap"])["LabelMap"])
    except Exception as error:  # of a damaged file it raises whatever it stumbles over
        raise ValueError(f"{path}: not a MATLAB file with a LabelMap ({error!r:.80})") from error
    if values.shape != size or values.dtype.kind not in "iu" or values.min(initial=0) < 0:
        raise ValueError(
            f"{path}: LabelMap must be integers >= 0 of its picture's size, {list(size)}, "
            f"got {list(values.shape)} {values.dtype}"
        )
    table = np.zeros(max(int(values.max(initial=0)), PASCAL_CONTEXT_IDS[-1]) + 1, np.uint8)
    table[list(PASCAL_CONTEXT_IDS)] = range(len(PASCAL_CONTEXT_IDS))
    return table[values]
