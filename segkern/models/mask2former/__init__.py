"""Mask2Former: its settings, its model, its checkpoints."""

from .config import Mask2FormerConfig as Mask2FormerConfig
from .model import Mask2Former as Mask2Former
from .model import Mask2FormerOutput as Mask2FormerOutput
