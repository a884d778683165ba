"""segkern: a custom-kernel segmentation engine for PyTorch."""

from . import ops as ops
