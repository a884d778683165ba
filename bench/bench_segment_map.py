"""segment_map against transformers' post-processing, which works at 384 x 384, at 1024 x 2048.

"original" is what the original code does: all maps at the size of the output.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from _rows import main, measure
from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

from segkern.ops import segment_map
from segkern.testing import segment_map_inputs

SIZE = (1024, 2048)


def run(runs: int) -> list[dict]:
    rows, peer = [], Mask2FormerImageProcessor()
    for kind in ("shapes", "noise"):
        classes, masks = segment_map_inputs(B=1, Q=100, K=133, h=256, w=512, kind=kind)
        out = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
        least = 0.8 if kind == "shapes" else 0.0  # an untrained model is sure of nothing

        def ours(task, classes=classes, masks=masks, least=least, **options):
            segment_map(classes, masks, task, SIZE, SIZE, SIZE, None, None, least, **options)

        def original(classes=classes, masks=masks):
            """Semantic: the product at the output's size, and its scores."""
            x = F.interpolate(masks, SIZE, mode="bilinear")
            torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :-1], x.sigmoid()).argmax(1)

        theirs = {"target_sizes": [SIZE], "threshold": least}
        tasks = {
            "panoptic": {
                "transformers": lambda o=out, t=theirs: peer.post_process_panoptic_segmentation(
                    o, label_ids_to_fuse=set(), **t
                )
            },
            "instance": {
                "transformers": lambda o=out: peer.post_process_instance_segmentation(
                    o, threshold=0.0, target_sizes=[SIZE], return_binary_maps=True
                )
            },
            "semantic": {
                "transformers": lambda o=out: peer.post_process_semantic_segmentation(o, [SIZE]),
                "original": original,
            },
        }
        for task, peers in tasks.items():
            impls = {"segkern": lambda t=task, f=ours: f(t)} | peers
            case = f"{task} Q=100 K=133 1024x2048 {kind}"
            rows += measure("segment_map", case, "float32", impls, runs)
    return rows


if __name__ == "__main__":
    main(run, __doc__)
