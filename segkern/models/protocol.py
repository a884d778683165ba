"""The protocol of a model and its settings: what inference, evaluation and training ask of them.

Typing only: nobody inherits from these classes. A model is an nn.Module with the methods of
`SegmentationModel` and, under `config`, a dataclass with the attributes of `ModelConfig`.

Letters: B image, H W image size.
"""

from typing import ClassVar, Protocol, Self

from torch import Tensor

from ..structures.labels import Labels
from ..structures.logits import PixelLogits, QueryLogits
from ..structures.roles import Role
from ..structures.settings import InputConfig
from ..structures.targets import Targets


class ModelConfig(Protocol):
    """Settings of a model.

    Attributes:
        kind: its key in `models.MODELS`.
        tasks: what the model can do, of "panoptic", "instance", "semantic"; the first is what it
            does when not told. "semantic" alone may be scored on maps of labels without masks.
        logits: what its `predict` returns: `QueryLogits`, trained on masks, or `PixelLogits`,
            trained on maps of labels.
        num_labels: K.
        labels: names, and which are stuff.
        input: how images are resized, normalised, padded or cut into windows.
        backbone_pretrained: the model starts from pretrained weights that it downloads.
    """

    kind: str
    tasks: tuple[str, ...]
    logits: type
    num_labels: int
    backbone_pretrained: bool

    @property
    def labels(self) -> Labels:
        """Names, and which are stuff."""

    @property
    def input(self) -> InputConfig:
        """How images are made what the model takes."""


class SegmentationModel(Protocol):
    """A model.

    `predict` is pure: it depends on its arguments, the weights and the mode alone, and reads no
    value on the host, so that a CUDA graph or an export may stand for it. `loss` is what training
    calls; it divides by `targets.normalizer` and talks to no other process. A model whose loss
    changes in the course of training has `anneal(progress)`, too, which training calls before each
    step with the share of the steps that are done.
    """

    config: ModelConfig
    class_head: ClassVar[tuple[str, ...]]  # names of the weights whose shape has K in it

    def inputs(self, task: str, batch: int) -> tuple[Tensor, ...]:
        """What `predict` takes besides pixels for a task; () where all tasks share one run."""

    def predict(self, pixel_values: Tensor, *inputs: Tensor) -> QueryLogits | PixelLogits:
        """The last prediction for [B, C, H, W] floating, normalised, zero-padded to the right and
        below."""

    def loss(self, pixel_values: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum [] to minimise, and its unweighted parts by name, [R] each, the last
        prediction at the end."""

    def parameter_roles(self) -> dict[str, Role]:
        """The role of every parameter, by name, in the order of `named_parameters`."""

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Keeps less for backward and computes the rest again."""

    @classmethod
    def from_pretrained(cls, source) -> Self:
        """Opens a checkpoint, in eval mode."""

    def save_pretrained(self, folder) -> None:
        """Writes what `from_pretrained` opens."""
