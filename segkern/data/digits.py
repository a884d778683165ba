"""Scenes of handwritten digits: small, endless, drawn on the fly, never downloaded.

Letters: H W image size, n object, s side of a digit in pixels.

A scene has 1 to 4 handwritten digits from scikit-learn's `load_digits` (1,797 images of 8 x 8) on
a shaded background. "easy" scenes keep them apart; "hard" ones have 2 to 4, and at least one digit
hides a part of another. The digit images are split into train, val and test before anything is
drawn. Scene i of a split and seed is always the same, whatever process draws it.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from ..structures.labels import IMAGENET_MEAN, IMAGENET_STD
from .sample import Sample

SPLITS = ("train", "val", "test")
LEVELS = ("easy", "hard", "mixed")
TASKS = ("panoptic", "instance", "semantic")
BACKGROUND = 10
MEAN = np.array(IMAGENET_MEAN, np.float32)
STD = np.array(IMAGENET_STD, np.float32)

_SHARES = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1.0)}  # of the digit images
_SIDES = (18, 26)  # of a digit, in an image whose short side is 64
_INK = (0.25, 0.55)  # brightness of the 8 x 8 image at which a stroke is 0 and 1 opaque
_SEEN = 0.5  # share of each digit that stays visible in a hard scene, at least
_HIDDEN = 12  # pixels of 64 x 64 that are hidden in a hard scene, at least
_TRIES = 24  # layouts drawn before the one that always fits is taken


@dataclass
class DigitsConfig:
    """Scenes of handwritten digits.

    Attributes:
        size: height and width of a scene, at least 32; digits grow with the shorter one.
        level: "easy" (apart), "hard" (overlapping) or "mixed" (half of each).
        task: "panoptic" (digits and background), "instance" (digits) or "semantic" (a mask for
            each class present, background included).
        scenes: of the training split; val and test have no end.
        seed: other seeds give other scenes of the same digit images.
    """

    kind: ClassVar[str] = "digits"
    targets: ClassVar[tuple[str, ...]] = ("masks", "semantic")

    size: tuple[int, int] = (64, 64)
    level: str = "easy"
    task: str = "panoptic"
    scenes: int = 100_000
    seed: int = 0

    def __post_init__(self):
        self.size = tuple(self.size)
        for name, known in (("level", LEVELS), ("task", TASKS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"DigitsConfig: {name} must be one of {', '.join(known)}, "
                    f"got {getattr(self, name)!r}"
                )
        if len(self.size) != 2 or min(self.size) < 32:
            raise ValueError(
                f"DigitsConfig: size must be a height and width >= 32, got {self.size}"
            )
        if self.scenes < 1 or self.seed < 0:
            raise ValueError(
                f"DigitsConfig: scenes must be >= 1 and seed >= 0, got {self.scenes}, {self.seed}"
            )


class Digits:
    """Scene i of a split as a dict.

    pixel_values [3, H, W] float32 normalised; image [H, W, 3] uint8; masks [n, H, W] uint8,
    visible parts only; labels [n] int64; semantic [H, W] uint8, label of each pixel; id, int.

    Attributes:
        classes: name of each label; label 10 is the background, absent from the instance task.
        things, stuff: labels with and without instances.
    """

    def __init__(self, config: DigitsConfig, split: str = "train", views=None):
        """
        Args:
            config: what the scenes are like.
            split: "train", "val" or "test": which digit images they are made of.
            views: taken because every data set does, and not used: scenes have their own size.

        Raises:
            ValueError: no such split.
            ImportError: scikit-learn is missing.
        """
        if split not in SPLITS:
            raise ValueError(f"Digits: split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.config = config
        self.split = split
        self.pictures, self.answers = digit_images(split)
        self.classes = [str(k) for k in range(10)]
        self.things = tuple(range(10))
        self.stuff = () if config.task == "instance" else (BACKGROUND,)
        self.classes += ["background"] * len(self.stuff)

    def __len__(self) -> int:
        return self.config.scenes if self.split == "train" else 2**31

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"Digits: index must be in [0, {len(self)}), got {index}")
        height, width = self.config.size
        rng = np.random.default_rng((self.config.seed, SPLITS.index(self.split), index))
        hard = self.config.level == "hard" or (self.config.level == "mixed" and rng.random() < 0.5)
        count = int(rng.integers(2 if hard else 1, 5))
        chosen = rng.integers(len(self.pictures), size=count)
        unit = min(height, width) / 64
        sides = np.rint(rng.integers(_SIDES[0], _SIDES[1] + 1, count) * unit).astype(int)
        inks = [_ink(self.pictures[k], s) for k, s in zip(chosen, sides)]
        corners = _place(rng, inks, (height, width), hard, _HIDDEN * unit**2)
        image, colours = _paint_background(rng, (height, width), count)
        owner = np.zeros((height, width), np.uint8)  # 0 background, else the topmost digit from 1
        for i, (ink, (y, x)) in enumerate(zip(inks, corners), 1):
            part = slice(y, y + len(ink)), slice(x, x + len(ink))
            image[part] += ink[..., None] * (colours[i - 1] - image[part])
            owner[part][ink >= 0.5] = i
        image += rng.integers(-6, 7, image.shape, dtype=np.int8)
        image = image.clip(0, 255).astype(np.uint8)
        answers = self.answers[chosen]
        semantic = np.append(np.uint8(BACKGROUND), answers.astype(np.uint8))[owner]
        labels, masks = self._targets(owner, answers, semantic)
        pixels = (image * np.float32(1 / 255) - MEAN) / STD
        return {
            "pixel_values": np.ascontiguousarray(pixels.transpose(2, 0, 1)),
            "image": image,
            "masks": masks.view(np.uint8),
            "labels": labels,
            "semantic": semantic,
            "id": index,
        }

    def _targets(self, owner, answers, semantic) -> tuple[np.ndarray, np.ndarray]:
        """Labels [n] int64 and masks [n, H, W] bool of the configured task."""
        if self.config.task == "semantic":
            labels = np.unique(semantic).astype(np.int64)
            return labels, semantic == labels[:, None, None].astype(np.uint8)
        labels, ids = answers.astype(np.int64), np.arange(1, len(answers) + 1, dtype=np.uint8)
        if self.config.task == "panoptic":
            labels, ids = np.append(labels, BACKGROUND), np.append(ids, np.uint8(0))
        return labels, owner == ids[:, None, None]


@cache
def digit_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's digit images [m, 8, 8] float32 in [0, 1] and labels [m] int64.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn: pip install scikit-learn "
            "(or segkern's extra `train`: pip install '.[train]' in its folder)"
        ) from error
    pictures, answers = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(answers))  # a frozen stream
    start, stop = (round(share * len(order)) for share in _SHARES[split])
    mine = order[start:stop]
    return (pictures[mine] / 16).reshape(-1, 8, 8).astype(np.float32), answers[mine]


def _ink(picture: np.ndarray, side: int) -> np.ndarray:
    """An 8 x 8 image as the opacity [side, side] of its strokes."""
    rows = _upsampling(side)
    bright = rows @ picture @ rows.T
    return ((bright - _INK[0]) / (_INK[1] - _INK[0])).clip(0, 1)


@cache
def _upsampling(side: int) -> np.ndarray:
    """[side, 8]: cubic interpolation (Catmull-Rom) of 8 pixels, with zeros around them."""
    at = (np.arange(side) + 0.5) * (8 / side) - 0.5
    d = np.abs(at[:, None] - np.arange(8))
    near = 1.5 * d**3 - 2.5 * d**2 + 1
    far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return np.where(d < 1, near, np.where(d < 2, far, 0)).astype(np.float32)


def _place(rng, inks, size, hard, hidden) -> np.ndarray:
    """Upper left corners [n, 2] of the digits' squares.

    Args:
        rng: numpy generator.
        inks: opacities [s, s], the topmost last.
        size: H and W.
        hard: overlapping or apart.
        hidden: pixels to hide in a hard scene, at least.
    """
    sides = np.array([len(ink) for ink in inks])
    room = np.array(size) - sides[:, None] + 1
    if hard:
        return _place_near(rng, [ink >= 0.5 for ink in inks], sides, room, size, hidden)
    corners = (rng.random((_TRIES, len(inks), 2)) * room).astype(int)
    ends = corners + sides[:, None]
    apart = (corners[:, :, None] >= ends[:, None]).any(-1)
    apart |= apart.transpose(0, 2, 1) | np.eye(len(inks), dtype=bool)
    good = apart.all((1, 2))
    if good.any():
        return corners[good.argmax()]
    # a digit in each quarter always fits
    quarters = rng.permutation(4)[: len(inks), None] // (2, 1) % 2 * (np.array(size) // 2)
    spare = np.array(size) // 2 - sides[:, None] + 1
    return quarters + (rng.random((len(inks), 2)) * spare).astype(int)


def _place_near(rng, shapes, sides, room, size, hidden) -> np.ndarray:
    """Corners of overlapping digits: the second lies near the first, half of the rest near one."""
    areas = np.array([shape.sum() for shape in shapes])
    best, most = None, -np.inf
    for _ in range(_TRIES):
        place, angle, reach = rng.random((3, len(shapes)))
        step = np.stack((np.sin(angle * 2 * np.pi), np.cos(angle * 2 * np.pi)), -1)
        step *= ((0.3 + 0.5 * reach) * sides)[:, None]
        layout = np.empty((len(shapes), 2))
        spots = np.stack((angle, reach), -1) * room
        layout[0] = spots[0]
        for i in range(1, len(shapes)):
            near = place[i] < 0.5 or i == 1
            layout[i] = layout[int(2 * place[i] % 1 * i)] + step[i] if near else spots[i]
            layout[i] = layout[i].clip(0, room[i] - 1)
        layout = layout.astype(int)
        owner = np.zeros(size, np.uint8)
        for i, (shape, (y, x)) in enumerate(zip(shapes, layout), 1):
            owner[y : y + len(shape), x : x + len(shape)][shape] = i
        seen = np.bincount(owner.ravel(), minlength=len(shapes) + 1)[1:]
        lost = areas.sum() - seen.sum()
        if lost >= hidden and (seen >= _SEEN * areas).all():
            return layout
        if (found := min((seen / areas).min() - _SEEN, lost / hidden - 1)) > most:
            best, most = layout, found
    return best


def _paint_background(rng, size, count) -> tuple[np.ndarray, np.ndarray]:
    """A shaded background [H, W, 3] in [0, 255], and `count` colours [count, 3] that stand out.

    The background varies smoothly about a dark, muted colour. Digits are bright, in hues of their
    own.
    """
    base = rng.uniform(25, 85) + rng.uniform(-20, 20, 3)
    knots = base + rng.uniform(-28, 28, (4, 4, 3))
    rows, columns = (_ramp(n) for n in size)
    image = np.einsum("ya,xb,abc->yxc", rows, columns, knots.astype(np.float32), optimize=True)
    turns = (rng.permutation(count) + rng.uniform(-0.2, 0.2, count)) / 4
    hues = 2 * np.pi * (rng.random() + turns)
    tint = np.cos(hues[:, None] + np.array((0, 2.094, 4.189)))
    level = rng.uniform(170, 205, count)
    return image, (level[:, None] + 50 * tint).astype(np.float32)


@cache
def _ramp(length: int) -> np.ndarray:
    """[length, 4] float32: weights that run smoothly from the first of 4 knots to the last."""
    at = np.linspace(0, 3, length)
    d = np.abs(at[:, None] - np.arange(4)).clip(0, 1)
    return (0.5 + 0.5 * np.cos(np.pi * d)).astype(np.float32)
