"""EoMT: its settings, its model, its checkpoints."""

from .config import EoMTConfig as EoMTConfig
from .model import EoMT as EoMT
from .output import EoMTOutput as EoMTOutput
