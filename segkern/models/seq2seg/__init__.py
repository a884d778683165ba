"""Seq2Seg: its settings and its model."""

from .config import Seq2SegConfig as Seq2SegConfig
from .model import Seq2Seg as Seq2Seg
