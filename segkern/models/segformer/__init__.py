"""SegFormer: its settings, its model, its checkpoints."""

from .config import SegFormerConfig as SegFormerConfig
from .model import SegFormer as SegFormer
from .model import SegFormerOutput as SegFormerOutput
