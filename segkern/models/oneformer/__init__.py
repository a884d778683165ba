"""OneFormer: its settings, its model, its checkpoints."""

from ..query_output import QueryOutput as OneFormerOutput
from .config import OneFormerConfig as OneFormerConfig
from .model import OneFormer as OneFormer

__all__ = ["OneFormer", "OneFormerConfig", "OneFormerOutput"]
