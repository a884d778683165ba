"""Segmenter: its settings, its model, its checkpoints."""

from .config import SegmenterConfig as SegmenterConfig
from .model import Segmenter as Segmenter
from .model import SegmenterOutput as SegmenterOutput
