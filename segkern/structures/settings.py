"""Settings that travel as one object: a model's input, views of an image, options of a result."""

from dataclasses import asdict, dataclass, replace
from numbers import Real

from ..io.images import cut_size, fitted_size, target_size
from ..ops._checks import expect_integer
from ..ops.segment_map import USED


@dataclass(frozen=True)
class InputConfig:
    """How a model takes images.

    Attributes:
        mean, std: of the pixels in [0, 1], a number a channel: red, green, blue, or as many as
            the pictures have; std above 0.
        shortest_edge: pixels, to which an image's short side is resized; None keeps its size.
        longest_edge: pixels, the most that the long side may get; None for no limit.
        divisor: sides of a batch are padded to a multiple of it, in prediction only where there is
            no `multiple`.
        window: side in pixels of the windows that a large image is cut into; None takes it whole.
        stride: pixels from one window to the next; None is the window's side, or, of models that
            give masks, lets as few windows as cover a side overlap evenly.
        crop: (H, W) of random views in training; None where the data set decides.
        black: what an image is padded with is black, not the mean colour.
        size: (H, W) that every image gets, whatever its shape, in place of the edges.
        within: (H, W) in which every image becomes as large as it can, in place of the edges.
        multiple: images are resized to sides that are cut to whole pixels and then go up to
            multiples of it, as Hugging Face's processors do; None rounds sides, as the papers'
            code does.
        resample: "bilinear", "bicubic", "lanczos" or "nearest-exact".
        pad_size: (H, W) that every image is padded to.

    Raises:
        ValueError: mean or std are no numbers, not equally many, or std not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shortest_edge: int | None = None
    longest_edge: int | None = None
    divisor: int = 1
    window: int | None = None
    stride: int | None = None
    crop: tuple[int, int] | None = None
    black: bool = False
    size: tuple[int, int] | None = None
    within: tuple[int, int] | None = None
    multiple: int | None = None
    resample: str = "bilinear"
    pad_size: tuple[int, int] | None = None

    def __post_init__(self):
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = len(value) > 0 and all(isinstance(x, Real) for x in value)
            if not numbers or (name == "std" and min(value) <= 0):
                rule = "numbers" + (" above 0" if name == "std" else "")
                raise ValueError(f"image_{name} must be {rule}, one a channel, got {tuple(value)}")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"image_std must have {len(self.mean)} numbers, one a channel as image_mean, "
                f"got {tuple(self.std)}"
            )

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.mean)

    @property
    def padding(self) -> tuple[float, ...]:
        """What an image is padded with, a number a channel, normalised as its pixels are."""
        return tuple(-m / s if self.black else 0.0 for m, s in zip(self.mean, self.std))

    def at(self, scale: float) -> "InputConfig":
        """The same with the size of images times `scale`, at least 1."""
        if scale == 1:
            return self

        def scaled(side: int | None) -> int | None:
            return None if side is None else max(1, round(scale * side))

        edges = {name: scaled(getattr(self, name)) for name in ("shortest_edge", "longest_edge")}
        pairs = {name: getattr(self, name) for name in ("size", "within")}
        return replace(self, **edges, **{k: v and tuple(map(scaled, v)) for k, v in pairs.items()})

    def sized(self, caller: str, size: "int | tuple[int, int] | dict | None") -> "InputConfig":
        """The same with another size of images.

        Args:
            caller: begins the message of an error.
            size: pixels of the short side; (H, W) whatever an image's shape; or by the names
                "shortest_edge" and "longest_edge". None keeps it.

        Raises:
            TypeError, ValueError: of no such form, or not positive.
        """
        if size is None:
            return self
        edges, pair = {}, None
        if isinstance(size, dict):
            edges = size
        elif isinstance(size, (tuple, list)):
            pair = tuple(size)
        else:
            edges = {"shortest_edge": size}
        if not edges.keys() <= {"shortest_edge", "longest_edge"} or (not edges and not pair):
            raise ValueError(
                f"{caller}: size must be a number, (height, width), or have shortest_edge and "
                f"longest_edge, got {size!r}"
            )
        if pair and len(pair) != 2:
            raise ValueError(f"{caller}: size must be (height, width), got {size!r}")
        for side in (*edges.values(), *(pair or ())):
            expect_integer(f"{caller}: size", side)
        none = {"shortest_edge": None, "longest_edge": None, "within": None, "size": pair}
        return replace(self, **none | edges)

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of an image of that size where it is resized, not yet padded."""
        if self.size is not None:
            found = self.size
        elif self.within is not None:
            found = fitted_size(size, self.within)
        elif self.shortest_edge is None and self.longest_edge is None:
            return size
        elif self.multiple is None or self.shortest_edge is None:
            found = target_size(size, self.shortest_edge, self.longest_edge)
        else:
            found = cut_size(size, self.shortest_edge, self.longest_edge)
        return _up(found, self.multiple or 1)

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of a resized image of that size where it is padded.

        Raises:
            ValueError: it does not fit into `pad_size`.
        """
        if self.pad_size is not None:
            if any(side > most for side, most in zip(size, self.pad_size)):
                raise ValueError(
                    f"pad_size must be at least an image's size, {tuple(size)}, "
                    f"got {self.pad_size}"
                )
            return self.pad_size
        return _up(size, self.divisor if self.multiple is None else 1)


def _up(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Sides rounded up to multiples."""
    return tuple(-(-side // multiple) * multiple for side in size)


@dataclass(frozen=True)
class Views:
    """From where a model looks at an image: for models that give class logits of pixels.

    Attributes:
        window: side in pixels of the windows; None takes the model's.
        stride: pixels from one window to the next; None takes the model's.
        scales: sizes of the image to average over; 1 is the model's.
        flip: average over the mirror images, too.

    Raises:
        TypeError: window or stride is no integer.
        ValueError: out of range.
    """

    window: int | None = None
    stride: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self):
        object.__setattr__(self, "scales", tuple(self.scales))
        for name in ("window", "stride"):
            if getattr(self, name) is not None:
                expect_integer(f"segment: {name}", getattr(self, name))
        if not self.scales or not all(s > 0 for s in self.scales):
            raise ValueError(f"segment: scales must be positive, got {self.scales}")

    def of(self, model: InputConfig) -> tuple[int | None, int | None]:
        """Window and stride in pixels, the model's where none is given, its stride no further
        than the window; (None, None) looks at whole images.

        Raises:
            ValueError: the stride is larger than the window.
        """
        window = model.window if self.window is None else self.window
        if window is None:
            if self.stride is not None:
                raise ValueError("segment: stride needs a window, and the model has none")
            return None, None
        stride = self.stride
        if stride is None:
            stride = window if model.stride is None else min(model.stride, window)
        if stride > window:
            raise ValueError(f"segment: stride must be <= window ({window}), got {stride}")
        return window, stride


@dataclass(frozen=True)
class Options:
    """What a result holds, as `ops.segment_map` makes it. What a task does not read is refused.

    Attributes:
        threshold: in [0, 1]. Panoptic: queries must score more than this; None is 0.8. Instance:
            masks must score at least this; None takes all.
        overlap_threshold: panoptic: a query must win this share of its own mask, in [0, 1]; None
            is 0.8.
        top_k: instance: pairs of query and class to return; None is 100.
        resize: "masks" takes the mask logits to the output size; "scores", semantic only, takes
            the summed class scores there, as the original does where it does semantic alone.
        return_scores: semantic: the class scores of every pixel, too: K H W floats.
    """

    threshold: float | None = None
    overlap_threshold: float | None = None
    top_k: int | None = None
    resize: str = "masks"
    return_scores: bool = False

    def over(self, others: "Options | None") -> "Options":
        """These, and those of `others` where None stands here."""
        if others is None:
            return self
        own = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(others, **own)

    def of(self, task: str) -> dict:
        """Those that the task reads, by name."""
        return {name: value for name, value in asdict(self).items() if task in USED[name]}


def one_of(name: str, whole, loose):
    """An object given whole, or else filled from single settings.

    Raises:
        ValueError: both are given.
    """
    if whole is None:
        return loose
    if loose != type(loose)():
        raise ValueError(f"{name}: give {type(loose).__name__} or its settings, not both")
    return whole
