"""Scenes of streets with perspective: small, endless, drawn on the fly, never downloaded.

Letters: H W image size, n segment.

A scene is a street of chance, seen from a car: road and pavement between rows of buildings, cars
parked and moving, people, trees, poles and signs, under some weather. The own bonnet, at the lower
edge of half of the scenes, belongs to no class: it is void. Scene i of a split and seed is always
the same, whatever process draws it.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..structures.labels import VOID
from .digits import MEAN, SPLITS, STD
from .sample import Sample
from .street_objects import FIRST, Canvas, objects
from .street_surfaces import CLASSES, TREE, Street, grain, interleaved, surfaces

TASKS = ("panoptic", "semantic")
THINGS = tuple(CLASSES.index(name) for name in ("car", "person"))


@dataclass
class StreetsConfig:
    """Scenes of streets.

    Attributes:
        size: height and width of a scene, at least 32; what is seen grows with the height, and a
            wider scene shows more to the sides.
        task: "semantic" (a mask for each class present) or "panoptic" (each car and person has a
            mask, each other class one).
        scenes: of the training split; val and test have no end.
        seed: other seeds give other scenes.
    """

    kind: ClassVar[str] = "streets"
    targets: ClassVar[tuple[str, ...]] = ("masks", "semantic")

    size: tuple[int, int] = (128, 256)
    task: str = "semantic"
    scenes: int = 100_000
    seed: int = 0

    def __post_init__(self):
        self.size = tuple(self.size)
        if self.task not in TASKS:
            raise ValueError(
                f"StreetsConfig: task must be one of {', '.join(TASKS)}, got {self.task!r}"
            )
        if len(self.size) != 2 or min(self.size) < 32:
            raise ValueError(
                f"StreetsConfig: size must be a height and width >= 32, got {self.size}"
            )
        if self.scenes < 1 or self.seed < 0:
            raise ValueError(
                f"StreetsConfig: scenes must be >= 1 and seed >= 0, got {self.scenes}, {self.seed}"
            )


class Streets:
    """Scene i of a split as a dict.

    pixel_values [3, H, W] float32 normalised; image [H, W, 3] uint8; masks [n, H, W] uint8,
    visible parts only; labels [n] int64; semantic [H, W] uint8, label of each pixel, 255 void;
    id, int.

    Attributes:
        classes: name of each label.
        things, stuff: labels with and without instances.
    """

    def __init__(self, config: StreetsConfig, split: str = "train", views=None):
        """
        Args:
            config: what the scenes are like.
            split: "train", "val" or "test"; they have no scene in common.
            views: taken because every data set does, and not used: scenes have their own size.

        Raises:
            ValueError: no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"Streets: split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.config = config
        self.split = split
        self.classes = list(CLASSES)
        self.things = THINGS
        self.stuff = tuple(k for k in range(len(CLASSES)) if k not in THINGS)

    def __len__(self) -> int:
        return self.config.scenes if self.split == "train" else 2**31

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"Streets: index must be in [0, {len(self)}), got {index}")
        rng = np.random.default_rng((self.config.seed, SPLITS.index(self.split), index))
        image, owner, label_of = _draw(rng, self.config.size)
        semantic = label_of.take(owner)
        segments = semantic if self.config.task == "semantic" else owner
        ids = np.flatnonzero(np.bincount(segments.ravel(), minlength=256))
        labels = ids if self.config.task == "semantic" else label_of[ids]
        seen = labels < len(CLASSES)  # else void
        pixels = image.transpose(2, 0, 1).astype(np.float32, order="C")
        pixels *= (1 / 255 / STD)[:, None, None]
        pixels -= (MEAN / STD)[:, None, None]
        return {
            "pixel_values": pixels,
            "image": image,
            "masks": (segments == ids[seen, None, None].astype(np.uint8)).view(np.uint8),
            "labels": labels[seen].astype(np.int64),
            "semantic": semantic,
            "id": index,
        }


def _draw(rng, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A scene of H x W.

    Returns:
        image [H, W, 3] uint8; owner [H, W] uint8: a label, the id of a car or person, or 255 for
        void; and the label of each such value [256] uint8.
    """
    street = Street(rng, size)
    canvas = Canvas(*surfaces(rng, street), street)
    for z, thing in objects(rng, street):
        thing(canvas, z)
    if rng.random() < 0.5:
        canvas.bonnet(rng)
    owner = np.asarray(canvas.owner)
    label_of = np.full(256, VOID, np.uint8)
    label_of[: len(CLASSES)] = range(len(CLASSES))
    label_of[FIRST : FIRST + len(canvas.labels)] = canvas.labels
    return _photograph(rng, canvas.picture, owner), owner, label_of


def _photograph(rng, picture, owner) -> np.ndarray:
    """What a camera makes of a picture [H, W, 3] uint8: leaves, a soft lens, exposure, noise."""
    image = np.asarray(picture).transpose(2, 0, 1).astype(np.float32, order="C")
    middle, others = image[:, 1:-1, 1:-1], image[:, :-2, 1:-1] + image[:, 2:, 1:-1]
    others += image[:, 1:-1, :-2]
    others += image[:, 1:-1, 2:]
    near = np.float32(rng.uniform(0.05, 0.15))  # what each of four neighbours lends a pixel
    middle *= 1 - 4 * near
    others *= near
    middle += others
    gain = rng.uniform(0.65, 1.15) * rng.uniform(0.94, 1.06, (3, 1, 1)).astype(np.float32)
    image *= (1 + np.float32(0.22) * (owner == TREE) * grain(rng, 0, *owner.shape)) * gain
    image += np.frombuffer(rng.bytes(image.size), np.uint8).reshape(image.shape) & 15
    image -= 7.5
    return interleaved(image)
