"""Models of transformers as they are and accelerated, on the same random weights.

Run as a script it is the process of its own that `peak_memory` starts.
"""

import json
import sys
from collections.abc import Callable

import _models
import torch

import segkern

sys.path.insert(0, str(_models.Path(__file__).parent.parent / "tests"))  # support

from support.inputs import moved, random_targets

TASK_TOKENS = 77  # of OneFormer


def open_model(name: str) -> torch.nn.Module:
    """A model of transformers by its name here, in eval mode.

    Args:
        name: "mask2former", "maskformer", "oneformer", "segformer", "eomt" or "deformable_detr" in
            their smallest published size, or with " tiny" after it one that runs in a moment.
    """
    import transformers as T

    from support import transformers_models as small

    torch.manual_seed(0)
    kind, _, tiny = name.partition(" ")
    if tiny:
        return getattr(small, kind)().eval()
    body = T.SwinConfig(drop_path_rate=0.3, out_features=_models.STAGES)
    labels = {"num_labels": _models.LABELS}
    if kind == "mask2former":
        config = T.Mask2FormerConfig(backbone_config=body, **labels)
        model = T.Mask2FormerForUniversalSegmentation(config)
    elif kind == "maskformer":
        config = T.MaskFormerConfig(backbone_config=body, **labels)
        model = T.MaskFormerForInstanceSegmentation(config)
    elif kind == "oneformer":
        config = T.OneFormerConfig(backbone_config=body, is_training=False, **labels)
        model = T.OneFormerForUniversalSegmentation(config)
    elif kind == "segformer":
        model = T.SegformerForSemanticSegmentation(T.SegformerConfig(**labels))
    elif kind == "eomt":
        sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
        config = T.EomtConfig(**sizes, image_size=512, patch_size=16, num_blocks=3, **labels)
        model = T.EomtForUniversalSegmentation(config)
        model.attn_mask_probs.zero_()  # at the end of its training
    else:
        config = T.DeformableDetrConfig(
            backbone_config=T.ResNetConfig(out_features=_models.STAGES[1:]), **labels
        )
        model = T.DeformableDetrForObjectDetection(config)
    return model.eval()


def build(impl: str, name: str, kind: str, size: int, batch: int, device: str = "cpu") -> Callable:
    """The function to time: an inference, or a training step with its optimizer.

    Args:
        impl: "segkern" for the accelerated model, or "transformers".
        name: of `open_model`.
        kind: "inference" or "training step".
        size: side of the images.
    """
    model = open_model(name).to(device)
    if impl == "segkern":
        segkern.accelerate(model)
    given = {"pixel_values": torch.randn(batch, 3, size, size, device=device)}
    if name.startswith("oneformer"):
        tokens = 8 if "tiny" in name else TASK_TOKENS
        given["task_inputs"] = torch.ones(batch, tokens, device=device)
    if kind == "inference":

        @torch.inference_mode()
        def run():
            model(**given)

        return run
    labels = _models.TINY["num_labels"]  # every model has as many
    masks, classes = random_targets([_models.TARGETS], labels, size, size)
    given["mask_labels"], given["class_labels"] = moved((masks * batch, classes * batch), device)
    model.train()
    options = {"fused": True, "capturable": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05, **options)

    def step():
        optimizer.zero_grad()
        model(**given).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()

    return step


def peak_memory(*arguments) -> float:
    """Megabytes that a fresh process needs for two runs on the CPU; arguments of `build`."""
    return _models.peak_memory(*arguments, script=__file__)


if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    open_model(case[1])  # its imports do not count
    segkern.accelerate(open_model("mask2former tiny"))
    _models.print_peak(lambda: build(*case))
