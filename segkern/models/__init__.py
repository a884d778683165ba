"""The models: a config dataclass and one class each."""

from dataclasses import replace
from pathlib import Path

from .mask2former import Mask2Former as Mask2Former
from .mask2former import Mask2FormerConfig as Mask2FormerConfig
from .mask2former import Mask2FormerOutput as Mask2FormerOutput
from .segmenter import Segmenter as Segmenter
from .segmenter import SegmenterConfig as SegmenterConfig
from .segmenter import SegmenterOutput as SegmenterOutput
from .segmenter.original import is_segmenter

Config = Mask2FormerConfig | SegmenterConfig
Model = Mask2Former | Segmenter
CLASSES = {
    "mask2former": (Mask2FormerConfig, Mask2Former),
    "segmenter": (SegmenterConfig, Segmenter),
}


def kind_of(config: Config) -> str:
    """The name of the config's model, a key of `CLASSES`.

    Raises:
        TypeError: no model has such a config.
    """
    for kind, (known, _) in CLASSES.items():
        if isinstance(config, known):
            return kind
    raise TypeError(f"segkern has no model for a {type(config).__name__}")


def build_model(config: Config, pretrained: bool = True) -> Model:
    """A model with random weights.

    Args:
        config: what to build.
        pretrained: False leaves out the backbone's weights that the config asks for, where those
            of a checkpoint will be loaded over them.
    """
    wanted = config if pretrained else replace(config, backbone_pretrained=False)
    model = CLASSES[kind_of(config)][1](wanted)
    model.config = config
    return model


def open_model(name: str | Path) -> Model:
    """Opens a checkpoint of any model, in eval mode.

    Args:
        name: a folder that a model's `save_pretrained` or the original Segmenter wrote, or a name
            on the Hugging Face hub.

    Raises:
        ValueError: see each model's `from_pretrained`.
    """
    kind = "segmenter" if is_segmenter(name) else "mask2former"
    return CLASSES[kind][1].from_pretrained(name)
