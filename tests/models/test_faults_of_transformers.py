"""What is wrong or fails in transformers' models and processors of masks, and the test that shows
that it is not so here."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from test_opening import queries, tokens
from transformers import Mask2FormerImageProcessor

ROOT = Path(__file__).parents[1]
POST, LABELS = "inference/test_postprocess.py", "models/test_mask_labels.py"
FAULTS = {
    "mask logits are resized to 384 x 384 first": (
        POST,
        "test_fault_384_detour_loses_thin_things",
    ),
    "padding is stretched into the result": (POST, "test_fault_padding_stretched_into_the_result"),
    "ids of segments collide behind merged stuff": (
        POST,
        "test_fault_segment_ids_collide_after_merged_stuff",
    ),
    "areas are counted on scores": (POST, "test_fault_area_counted_on_scores_instead_of_masks"),
    "a segment reaches beyond its mask": (POST, "test_fault_segment_reaches_beyond_its_mask"),
    "an empty result is of another kind": (POST, "test_fault_empty_result_of_another_kind"),
    "instances overwrite each other": (POST, "test_fault_instances_overwrite_each_other"),
    "masks of instances are cut before they are resized": (
        POST,
        "test_fault_instance_masks_thresholded_before_they_are_resized",
    ),
    "255 is a value of masks": (LABELS, "test_255_has_no_weight"),
    "bool masks fail": (LABELS, "test_masks_of_any_dtype"),
    "a tuple with a loss fails": (
        "models/test_outputs.py",
        "test_a_tuple_is_what_is_not_none",
    ),
    "bfloat16 weights do not train": (
        "models/test_faults_of_transformers.py",
        "test_half_precision_weights_have_a_loss_and_gradients",
    ),
    "255 of an image processor": (
        "models/test_faults_of_transformers.py",
        "test_what_an_image_processor_pads_has_no_weight",
    ),
}


@pytest.mark.parametrize(("file", "test"), FAULTS.values(), ids=FAULTS)
def test_a_test_shows_that_it_is_not_so_here(file, test):
    tree = ast.parse((ROOT / file).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("build", [queries, tokens])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_have_a_loss_and_gradients(build, dtype):
    model = build().to(dtype).train()
    masks = torch.zeros(2, 2, 32, 32)
    masks[:, 0, :16], masks[:, 1, 16:] = 1, 1
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    out = model(x, mask_labels=masks, class_labels=torch.tensor([[0, 1], [1, 2]]))
    out.loss.backward()
    assert out.loss.isfinite()
    assert out.masks_queries_logits.dtype == dtype
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_what_an_image_processor_pads_has_no_weight():
    """Two sizes, and `ignore_index`: it pads masks with 255, which transformers' loss takes for
    what a pixel of the mask is."""
    processor = Mask2FormerImageProcessor(
        ignore_index=255, do_resize=False, do_reduce_labels=False, size_divisor=32
    )
    maps = [np.zeros(size, np.uint8) for size in ((64, 64), (32, 64))]
    maps[0][:30], maps[1][:, :20] = 1, 1
    pictures = [np.full((*m.shape, 3), 100, np.uint8) for m in maps]
    batch = processor(pictures, maps, return_tensors="pt")
    masks, labels = batch["mask_labels"], batch["class_labels"]
    assert {v.item() for m in masks for v in m.unique()} == {0, 1, 255}
    model = queries().eval()
    x = batch["pixel_values"]
    loss = model(x, mask_labels=masks, class_labels=labels).loss
    assert loss < 100
    with torch.no_grad():  # nothing of the padding counts: other masks there, the same loss
        for m in masks:
            m[1:].masked_fill_(m[1:] == 255, 0)
        again = model(x, mask_labels=masks, class_labels=labels).loss
    torch.testing.assert_close(again, loss.detach(), rtol=0, atol=0)
