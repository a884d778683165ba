"""`segment` takes masks of queries as two factors, and never forms the maps of all of them."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import segkern
from segkern.models import Mask2Former, Mask2FormerConfig
from segkern.models.query_output import mask_logits

WIDE = {  # everything is a segment
    "panoptic": segkern.Options(0.0, 0.0),
    "instance": segkern.Options(top_k=9),
    "semantic": segkern.Options(),
}


class Sizes(TorchDispatchMode):
    """Notes the shape of every result."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor):
                self.seen.add(tuple(x.shape))
        return out


def built():
    torch.manual_seed(0)
    config = Mask2FormerConfig.tiny(5)
    config.num_queries, config.stuff = 7, (3, 4)
    config.shortest_edge, config.longest_edge = 48, 96
    return Mask2Former(config).eval()


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (48, 80, 3), dtype=np.uint8)


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_no_map_of_a_query_is_formed(task):
    model, maps = built(), (7, 24, 40)  # queries, and half of the image
    with Sizes() as whole, torch.no_grad():
        model(torch.randn(1, 3, 48, 80))
    assert (1, *maps) in whole.seen, "the face of Hugging Face's names forms them"
    with Sizes() as sizes:
        segkern.segment(model, picture(), task, options=WIDE[task])
    assert not [s for s in sizes.seen if s[-3:] == maps or s[-2:] == (7, 24 * 40)]


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_results_are_those_of_the_maps(task):
    model = built().double()
    pixels = torch.randn(1, 3, 48, 80, dtype=torch.float64)
    with torch.no_grad():
        out, factors = model(pixels), model.predict(pixels)
    assert torch.equal(out.class_queries_logits, factors.classes)
    product = mask_logits(factors.masks, factors.features)
    assert torch.equal(out.masks_queries_logits, product)
    sizes = (48, 80), [(48, 80)], [(96, 160)]
    options = WIDE[task]
    whole, parts = (
        segkern.postprocess(factors.classes, masks, task, *sizes, (3, 4), options=options)[0]
        for masks in (product, (factors.masks, factors.features))
    )
    assert torch.equal(whole.segmentation, parts.segmentation)
    assert [s[:2] for s in whole.segments] == [s[:2] for s in parts.segments]


def test_options_and_views_come_whole_or_by_their_settings():
    model = built()
    options = segkern.Options(overlap_threshold=0.5)
    whole = segkern.segment(model, picture(), options=options)
    loose = segkern.segment(model, picture(), overlap_threshold=0.5)
    assert torch.equal(whole.segmentation, loose.segmentation)
    with pytest.raises(ValueError, match="segment: give Options or its settings, not both"):
        segkern.segment(model, picture(), threshold=0.3, options=options)
    with pytest.raises(ValueError, match="class logits of pixels, a Mask2Former gives masks"):
        segkern.segment(model, picture(), views=segkern.Views(flip=True))
