"""Mask2Former: its settings, its model, its checkpoints."""

from ..query_output import QueryOutput as Mask2FormerOutput
from .config import Mask2FormerConfig as Mask2FormerConfig
from .model import Mask2Former as Mask2Former

__all__ = ["Mask2Former", "Mask2FormerConfig", "Mask2FormerOutput"]
