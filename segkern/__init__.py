"""segkern: a custom-kernel segmentation engine for PyTorch."""

from . import ops as ops
from .inference.postprocess import postprocess as postprocess
from .inference.segment import Segmentation as Segmentation
from .inference.segment import segment as segment
from .models import Mask2Former as Mask2Former
from .models import Mask2FormerConfig as Mask2FormerConfig
from .models import Segmenter as Segmenter
from .models import SegmenterConfig as SegmenterConfig
from .runtime.cuda_graphs import Replay as Replay
