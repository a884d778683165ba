"""segkern: a custom-kernel segmentation engine for PyTorch."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from . import _moved
from . import _waiting as _waiting  # before torch is imported
from . import ops as ops  # registers torch.ops.segkern; all else comes when it is first asked for

if TYPE_CHECKING:  # the same as `_HOME`, for editors
    from . import data as data
    from . import models as models
    from . import recipes as recipes
    from .deploy.export import export as export
    from .deploy.prune import prune as prune
    from .deploy.quantize import quantize as quantize
    from .evaluation.evaluate import evaluate as evaluate
    from .inference.postprocess import postprocess as postprocess
    from .inference.segment import segment as segment
    from .integrations.accelerate import accelerate as accelerate
    from .integrations.accelerate import restore as restore
    from .integrations.pipeline import pipeline as pipeline
    from .integrations.processor import Processor as Processor
    from .models import EoMT as EoMT
    from .models import EoMTConfig as EoMTConfig
    from .models import Mask2Former as Mask2Former
    from .models import Mask2FormerConfig as Mask2FormerConfig
    from .models import MaskFormer as MaskFormer
    from .models import MaskFormerConfig as MaskFormerConfig
    from .models import OneFormer as OneFormer
    from .models import OneFormerConfig as OneFormerConfig
    from .models import SegFormer as SegFormer
    from .models import SegFormerConfig as SegFormerConfig
    from .models import Segmenter as Segmenter
    from .models import SegmenterConfig as SegmenterConfig
    from .models import Seq2Seg as Seq2Seg
    from .models import Seq2SegConfig as Seq2SegConfig
    from .models import UNet as UNet
    from .models import UNetConfig as UNetConfig
    from .models import open_model as open_model
    from .models.convert import convert as convert
    from .runtime.cuda_graphs import Replay as Replay
    from .structures.segmentation import Segmentation as Segmentation
    from .structures.settings import Options as Options
    from .structures.settings import Views as Views
    from .training.config import TrainConfig as TrainConfig
    from .training.loop import train as train

# name to the module that it is in, or to "" if it is a module itself: models bring timm and
# torchvision, which take as long to import as torch
_HOME = {
    "data": "",
    "models": "",
    "recipes": "",
    "export": "deploy.export",
    "prune": "deploy.prune",
    "quantize": "deploy.quantize",
    "evaluate": "evaluation.evaluate",
    "postprocess": "inference.postprocess",
    "segment": "inference.segment",
    "pipeline": "integrations.pipeline",
    "Processor": "integrations.processor",
    "accelerate": "integrations.accelerate",
    "restore": "integrations.accelerate",
    "EoMT": "models",
    "EoMTConfig": "models",
    "Mask2Former": "models",
    "Mask2FormerConfig": "models",
    "MaskFormer": "models",
    "MaskFormerConfig": "models",
    "OneFormer": "models",
    "OneFormerConfig": "models",
    "SegFormer": "models",
    "SegFormerConfig": "models",
    "Segmenter": "models",
    "SegmenterConfig": "models",
    "Seq2Seg": "models",
    "Seq2SegConfig": "models",
    "UNet": "models",
    "UNetConfig": "models",
    "open_model": "models",
    "convert": "models.convert",
    "Replay": "runtime.cuda_graphs",
    "Segmentation": "structures.segmentation",
    "Options": "structures.settings",
    "Views": "structures.settings",
    "TrainConfig": "training.config",
    "train": "training.loop",
}
_ROOMS = (
    *("deploy", "evaluation", "inference", "integrations", "io", "nn", "runtime", "structures"),
    *("training", "weights"),
)
__all__ = ["ops", *_HOME]
sys.meta_path.insert(0, _moved.Finder())


def __getattr__(name: str):
    if name in _HOME or name in _ROOMS:
        home = _HOME.get(name, "")
        module = import_module(f"segkern.{home or name}")
        globals()[name] = getattr(module, name) if home else module
        return globals()[name]
    if name in _moved.HOME:
        raise AttributeError(_moved.message(f"segkern.{name}"))
    raise AttributeError(f"module 'segkern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
