"""SegFormer of transformers and ours, on the same random weights, for the benchmarks.

Run as a script it is the process of its own that `peak_memory` starts.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path

import _models
import torch
import torch.nn.functional as F

from segkern.models.segformer.config import SegFormerConfig

LABELS = 150
TINY = {"hidden_sizes": [8, 16, 40, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 24}
_kept = []


@functools.cache
def weights(name: str) -> Path:
    """A folder of random weights, as transformers initialises and stores them, that lasts as long
    as the process.

    Args:
        name: "b0" to "b5" or "tiny".
    """
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = TINY
    if name != "tiny":
        preset = SegFormerConfig.preset(name)
        sizes = {field: getattr(preset, field) for field in TINY}
    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=LABELS, **sizes))
    model.save_pretrained(folder.name)
    return Path(folder.name)


def open_model(impl: str, folder: Path, device: str = "cpu") -> torch.nn.Module:
    """The model of "segkern" or "transformers", in eval mode."""
    if impl == "segkern":
        from segkern.models import SegFormer as Model
    else:
        from transformers import SegformerForSemanticSegmentation as Model
    return Model.from_pretrained(folder).eval().to(device)


def build(impl, folder, kind, size, batch, dtype="float32", device="cpu", compiled=False):
    """The function to time: images to label maps, or a training step with AdamW.

    transformers' logits go to the image's size before the argmax, as its processor does it.

    Args:
        impl: "segkern" or "transformers".
        folder: of `weights`.
        kind: "inference" or "training step".
        dtype: "float32", or "bfloat16" for autocast.
    """
    torch.manual_seed(0)
    model = open_model(impl, Path(folder), device)
    x = torch.randn(batch, 3, size, size, device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    call = torch.compile(model) if compiled else model
    if kind == "inference":

        @torch.inference_mode()
        def run():
            with autocast:
                if impl == "segkern":
                    return model.label_map(x)
                return label_map(call(x).logits, size)

        return run
    labels = torch.randint(0, LABELS, (batch, size, size), device=device)
    model.train()
    options = {"fused": True, "capturable": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, **options)

    def step():
        optimizer.zero_grad()
        with autocast:
            loss = call(x, labels=labels).loss
        loss.backward()
        optimizer.step()

    return step


def label_map(logits, size: int):
    """What transformers' processor makes of a model's logits, an array or a tensor."""
    logits = torch.as_tensor(logits)
    return F.interpolate(logits, size=(size, size), mode="bilinear").argmax(1)


def peak_memory(*arguments) -> float:
    """Megabytes that a fresh process needs for two runs on the CPU, above the imports.

    Args:
        arguments: of `build`, in their order.
    """
    return _models.peak_memory(*arguments, script=__file__)


if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    if case[0] == "segkern":
        import segkern.models  # noqa: F401
    else:
        import transformers.models.segformer.modeling_segformer  # noqa: F401
    _models.print_peak(lambda: build(*case))
