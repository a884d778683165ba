"""A written file as a model that can be evaluated: what it gives is what the file computes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.protocol import ModelConfig
from ..structures.logits import PixelLogits, QueryLogits
from .compare import Run, torch_run
from .formats import openers
from .load import load


class FileModel(nn.Module):
    """The model protocol, as far as inference and evaluation ask for it, over a file of logits.

    Args:
        config: of the model that the file was made of.
        run: pixels to logits.
        stride: of the maps of a model of pixels; unread for others.
    """

    def __init__(self, config: ModelConfig, run: Run, stride: int = 1):
        super().__init__()
        self.config, self.run, self.stride = config, run, stride
        self.kind = nn.Parameter(torch.zeros(0), requires_grad=False)  # float32 on the CPU
        self.eval()

    def inputs(self, task: str, batch: int) -> tuple[Tensor, ...]:
        """None: a task is part of the file."""
        return ()

    def predict(self, pixel_values: Tensor) -> QueryLogits | PixelLogits:
        """The logits of [B, C, H, W] float32."""
        found = [torch.as_tensor(x) for x in self.run(pixel_values.contiguous().numpy())]
        if self.config.logits is PixelLogits:
            return PixelLogits(found[0], self.stride)
        return QueryLogits(*found)


def open_file(path: Path, config: ModelConfig, stride: int = 1) -> FileModel:
    """Opens a file of logits, .onnx or .pt2 of torch.export, in its runtime on the CPU."""
    run = torch_run(load(path).run) if path.suffix == ".pt2" else openers(path)
    return FileModel(config, run, stride)
