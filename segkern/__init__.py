"""segkern: a custom-kernel segmentation engine for PyTorch."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from . import _moved
from . import ops as ops
from .inference.postprocess import postprocess as postprocess
from .inference.segment import segment as segment
from .models import Mask2Former as Mask2Former
from .models import Mask2FormerConfig as Mask2FormerConfig
from .models import Segmenter as Segmenter
from .models import SegmenterConfig as SegmenterConfig
from .models import open_model as open_model
from .runtime.cuda_graphs import Replay as Replay
from .structures.segmentation import Segmentation as Segmentation
from .structures.settings import Options as Options
from .structures.settings import Views as Views

if TYPE_CHECKING:  # for editors: see `_LATER`
    from . import data as data
    from . import recipes as recipes
    from .evaluation.evaluate import evaluate as evaluate
    from .training.config import TrainConfig as TrainConfig
    from .training.loop import train as train

# imported when they are first asked for: what trains and measures takes as long again
_LATER = {
    "train": ("training.loop", "train"),
    "TrainConfig": ("training.config", "TrainConfig"),
    "evaluate": ("evaluation.evaluate", "evaluate"),
    "data": ("data", None),
    "recipes": ("recipes", None),
}
sys.meta_path.insert(0, _moved.Finder())


def __getattr__(name: str):
    if name in _LATER:
        module, attribute = _LATER[name]
        found = import_module(f"segkern.{module}")
        globals()[name] = found if attribute is None else getattr(found, attribute)
        return globals()[name]
    if name in _moved.HOME:
        raise AttributeError(_moved.message(f"segkern.{name}"))
    raise AttributeError(f"module 'segkern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
