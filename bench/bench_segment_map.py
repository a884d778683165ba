"""segment_map against transformers' post-processing, which works at 384 x 384, at 1024 x 2048.

"original" is what the original code does for semantic results: the product at the output's size.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from _measure import Work, pick, repeated

from segkern.ops import segment_map
from support.inputs import segment_map_inputs

IMPLS = ("segkern", "transformers", "original")
KINDS = pick(["shapes"], ["shapes", "noise"], ["shapes", "noise"])
Q, K, SIZE = pick((5, 4, (32, 64)), (100, 133, (1024, 2048)), (100, 133, (1024, 2048)))


def build(task, kind):
    inputs = segment_map_inputs(B=1, Q=Q, K=K, h=SIZE[0] // 4, w=SIZE[1] // 4, kind=kind)
    classes, masks = repeated(inputs, 1)
    out = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    least = 0.8 if kind == "shapes" else 0.0  # an untrained model is sure of nothing
    option = {"threshold": least} if task == "panoptic" else {}
    impls = {"segkern": lambda: segment_map(classes, masks, task, SIZE, SIZE, SIZE, **option)}
    try:
        from transformers.models.mask2former.image_processing_mask2former import (
            Mask2FormerImageProcessor,
        )
    except ImportError as error:
        impls["transformers"] = str(error)
    else:
        peer = Mask2FormerImageProcessor()
        impls["transformers"] = {
            "panoptic": lambda: peer.post_process_panoptic_segmentation(
                out, label_ids_to_fuse=set(), threshold=least, target_sizes=[SIZE]
            ),
            "instance": lambda: peer.post_process_instance_segmentation(
                out, threshold=0.0, target_sizes=[SIZE], return_binary_maps=True
            ),
            "semantic": lambda: peer.post_process_semantic_segmentation(out, [SIZE]),
        }[task]

    def original():
        x = F.interpolate(masks, SIZE, mode="bilinear").sigmoid()
        torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :-1], x).argmax(1)

    impls["original"] = original if task == "semantic" else "semantic results only"
    pixels = SIZE[0] * SIZE[1]
    product = 2 * Q * K * pixels if task == "semantic" else 0
    return Work(impls, masks.numel() * 4 + 4 * pixels, 8 * Q * pixels + product)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_segment_map(task, kind, impl, measured):
    case = f"{task} Q={Q} K={K} {SIZE[0]}x{SIZE[1]} {kind}"
    measured("segment_map", case, "float32", impl, lambda: build(task, kind))
