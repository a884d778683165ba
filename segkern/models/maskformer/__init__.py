"""MaskFormer: its settings, its model, its checkpoints."""

from ..query_output import QueryOutput as MaskFormerOutput
from .config import MaskFormerConfig as MaskFormerConfig
from .model import MaskFormer as MaskFormer

__all__ = ["MaskFormer", "MaskFormerConfig", "MaskFormerOutput"]
