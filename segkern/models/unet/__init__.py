"""U-Net: its settings and its model."""

from .config import UNetConfig as UNetConfig
from .model import UNet as UNet
