"""What Hugging Face's image processors may do with a picture beyond a model's own settings."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Real

from ..ops._checks import expect_integer
from .settings import InputConfig

RESAMPLES = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Processing:
    """The fields of a preprocessor_config.json, with Hugging Face's names and defaults, except
    mean, std, edges and divisor, which are settings of a model's config.

    Attributes:
        size: (height, width) to which every picture is resized, whatever its shape; the config's
            edges must be None then.
        max_size: (max_height, max_width) in which every picture becomes as large as it can,
            likewise.
        do_resize: False takes pictures at their own size.
        resample: how they are resized: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic.
        do_rescale: values of 8 bits are multiplied by rescale_factor; False leaves them.
        rescale_factor: above 0.
        do_normalize: the mean is subtracted, and what is left divided by the deviation.
        do_pad: of EoMT: its processor pads pictures to the size of its squares. The model takes
            nothing else, so that here they are padded in any case, but by `segkern.Processor`.
        pad_size: (height, width) that pictures are padded to.
        do_reduce_labels: maps of labels begin with 1, and 0 stands for what nobody labelled.
        ignore_index: label of what nobody labelled.
        multiple: sides are computed as Hugging Face's processors do it: cut to whole pixels, then
            up to multiples of this. None rounds them and leaves it to padding to reach multiples
            of size_divisor, as the papers' code does.

    Raises:
        TypeError, ValueError: of another type, out of range, or a resampling that Hugging Face's
            processors do not have either (names the field).
    """

    size: tuple[int, int] | None = None
    max_size: tuple[int, int] | None = None
    do_resize: bool = True
    resample: int = 2
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    do_pad: bool | None = None
    pad_size: tuple[int, int] | None = None
    do_reduce_labels: bool = False
    ignore_index: int | None = None
    multiple: int | None = None

    def __post_init__(self):
        for name in ("size", "max_size", "pad_size"):
            pair = getattr(self, name)
            if pair is None:
                continue
            if not isinstance(pair, Iterable) or len(pair := tuple(pair)) != 2:
                raise ValueError(f"{name} must be height and width, got {getattr(self, name)!r}")
            for side in pair:
                expect_integer(name, side)
            object.__setattr__(self, name, pair)
        for name in ("do_resize", "do_rescale", "do_normalize", "do_reduce_labels"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.resample not in RESAMPLES:
            known = ", ".join(f"{number} ({name})" for number, name in RESAMPLES.items())
            raise ValueError(f"resample must be one of {known}, got {self.resample!r}")
        factor = self.rescale_factor
        if not isinstance(factor, Real) or not factor > 0:
            raise ValueError(f"rescale_factor must be a number above 0, got {factor!r}")
        for name, least in (("ignore_index", None), ("multiple", 1)):
            value = getattr(self, name)
            if value is not None:
                expect_integer(name, value, value if least is None else least)

    @classmethod
    def of(cls, value: "Processing | dict") -> "Processing":
        """Itself, or that of plain fields, as a saved config holds it."""
        return value if isinstance(value, Processing) else cls(**value)

    def input(self, plain: InputConfig) -> InputConfig:
        """How images are taken: `plain`, which the config's other settings give, with these.

        Scale and normalisation become one mean and deviation of pixels in [0, 1].

        Raises:
            ValueError: edges beside a fixed size.
        """
        for name in ("size", "max_size"):
            edges = {"shortest_edge": plain.shortest_edge, "longest_edge": plain.longest_edge}
            given = {edge: value for edge, value in edges.items() if value is not None}
            if getattr(self, name) is not None and given:
                edge, value = next(iter(given.items()))
                raise ValueError(
                    f"{edge} must be None where processing.{name} is {getattr(self, name)}, "
                    f"got {value}"
                )
        mean, std = plain.mean, plain.std
        if not self.do_normalize:
            mean, std = (0.0,) * len(mean), (1.0,) * len(std)
        scale = 255 * self.rescale_factor if self.do_rescale else 255.0
        if scale != 1:
            mean, std = (tuple(x / scale for x in values) for values in (mean, std))
        sizes = {"size": self.size, "within": self.max_size}
        if not self.do_resize:
            sizes = dict.fromkeys(("size", "within", "shortest_edge", "longest_edge"))
        return replace(
            plain,
            mean=tuple(mean),
            std=tuple(std),
            multiple=self.multiple,
            resample=RESAMPLES[self.resample],
            pad_size=self.pad_size or plain.pad_size,
            **sizes,
        )
