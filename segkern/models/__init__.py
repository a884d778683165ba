"""The models: a config dataclass and one class each."""

from .mask2former import Mask2Former as Mask2Former
from .mask2former import Mask2FormerConfig as Mask2FormerConfig
from .mask2former import Mask2FormerOutput as Mask2FormerOutput
