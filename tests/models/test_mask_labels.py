"""Masks as users have them: of any dtype, of another size than the images, stacked, and with 255
where an image processor was told to ignore what it pads."""

import pytest
import torch
from test_opening import convolutions, pyramid, queries, sequence, tokens

from segkern.structures.targets import Targets
from support.inputs import random_targets

SIDE = 32
KINDS = {
    "Mask2Former": queries,
    "MaskFormer": pyramid,
    "EoMT": tokens,
    "Seq2Seg": lambda: sequence(head="instance"),
    "U-Net": lambda: convolutions(head="instance"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def asked(kind):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    masks, labels = random_targets((2, 2), 3, SIDE, SIDE)
    return model, torch.randn(2, 3, SIDE, SIDE), [m.float() for m in masks], labels


def loss(model, x, masks, labels):
    torch.manual_seed(0)  # EoMT draws which queries have a mask
    return model(x, mask_labels=masks, class_labels=labels).loss.item()


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_of_any_dtype(kind, dtype):
    model, x, masks, labels = asked(kind)
    assert loss(model, x, [m.to(dtype) for m in masks], labels) == loss(model, x, masks, labels)


@kinds
def test_labels_of_any_integer_and_stacked_tensors(kind):
    model, x, masks, labels = asked(kind)
    want = loss(model, x, masks, labels)
    assert loss(model, x, torch.stack(masks), torch.stack(labels)) == want
    assert loss(model, x, tuple(masks), [k.to(torch.int32) for k in labels]) == want


@pytest.mark.parametrize("kind", ["Mask2Former", "EoMT"])
@pytest.mark.parametrize("factor", [2, 4])
def test_masks_of_another_size_are_seen_at_the_same_places(kind, factor):
    """At points where both sizes have the same value: blocks whose insides are wide."""
    model, x, _, labels = asked(kind)
    small = torch.zeros(2, SIDE // 4, SIDE // 4)
    small[0, :, :4], small[1, 4:] = 1, 1
    large = [small.repeat_interleave(4, 1).repeat_interleave(4, 2)] * 2
    other = [m[:, ::factor, ::factor] for m in large]
    assert loss(model, x, other, labels) == pytest.approx(loss(model, x, large, labels), rel=0.05)


def test_masks_of_another_size_as_transformers_takes_them(tmp_path):
    """MaskFormer's loss is on the masks' own pixels, whatever the images' size."""
    from transformers import DetrConfig, MaskFormerConfig, SwinConfig
    from transformers import MaskFormerForInstanceSegmentation as Reference

    from segkern.models import MaskFormer

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=24, depths=[1] * 4, num_heads=[1] * 4, out_features=stages)
    detr = DetrConfig(decoder_layers=1, num_queries=5, dropout=0.0).to_dict()
    reference = Reference(
        MaskFormerConfig(backbone_config=swin, decoder_config=detr, num_labels=3)
    ).eval()
    reference.save_pretrained(tmp_path)
    ours, reference = MaskFormer.from_pretrained(tmp_path).double(), reference.double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for side in (16, 32, 48, 64):
        masks, labels = random_targets((2, 1), 3, side, side)
        given = {"mask_labels": [m.double() for m in masks], "class_labels": labels}
        want = reference(x, **given).loss.item()
        assert ours(x, **given).loss.item() == pytest.approx(want, rel=1e-8), side


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64], ids=str)
def test_255_has_no_weight(kind, dtype):
    """As `Targets.void`: what the masks hold there changes nothing."""
    model, x, masks, labels = asked(kind)
    void = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    void[20:] = True
    masks = [m.masked_fill(void, 0) for m in masks]
    kept = [m.flatten(1).any(1) for m in masks]
    masks, labels = ([t[k] for t, k in zip(ts, kept)] for ts in (masks, labels))
    given = [m.to(dtype).masked_fill(void, 255) for m in masks]
    targets = Targets.from_lists(masks, labels, num_labels=3, void=[void, void])
    torch.manual_seed(0)
    want = model(x, targets=targets).loss.item()
    assert loss(model, x, given, labels) == want
    assert want != loss(model, x, masks, labels)


BAD = {
    "0 and 255": (lambda m: 255 * m, ValueError, "of image 0 must be 1 inside, .*255 and no 1"),
    "ids": (lambda m: 7 * m, ValueError, "of image 0 must be 1 inside and 0 outside, got 7"),
    "scores": (
        lambda m: m * 0.5,
        ValueError,
        "of image 0 must be 1 inside and 0 outside, got 0.5",
    ),
    "no queries": (lambda m: m[0], TypeError, r"of image 0 must be a tensor \[T, H, W\]"),
    "complex": (lambda m: m.cfloat(), TypeError, "of image 0 must be numbers or bool"),
    "no tensor": (lambda m: m.numpy(), TypeError, "must be a tensor .*, got ndarray"),
}


@kinds
@pytest.mark.parametrize(("spoil", "error", "message"), BAD.values(), ids=BAD)
def test_other_values_are_refused_by_name(kind, spoil, error, message):
    model, x, masks, labels = asked(kind)
    with pytest.raises(error, match=message):
        model(x, mask_labels=[spoil(m) for m in masks], class_labels=labels)


@kinds
def test_sizes_and_numbers_that_do_not_agree(kind):
    model, x, masks, labels = asked(kind)
    with pytest.raises(ValueError, match=r"masks of image 1 must be \[n, 32, 32\]"):
        model(x, mask_labels=[masks[0], masks[1][:, ::2]], class_labels=labels)
    with pytest.raises(ValueError, match="mask_labels must be of 2 images, got 1"):
        model(x, mask_labels=masks[:1], class_labels=labels[:1])
    with pytest.raises(ValueError, match="together"):
        model(x, mask_labels=masks)
