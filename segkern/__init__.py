"""segkern: a custom-kernel segmentation engine for PyTorch."""

from . import ops as ops
from .graphs import Replay as Replay
from .infer import Segmentation as Segmentation
from .infer import postprocess as postprocess
from .infer import segment as segment
from .models.mask2former import Mask2Former as Mask2Former
from .models.mask2former import Mask2FormerConfig as Mask2FormerConfig
from .models.segmenter import Segmenter as Segmenter
from .models.segmenter import SegmenterConfig as SegmenterConfig
