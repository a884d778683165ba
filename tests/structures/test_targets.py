"""Targets: packing, buckets, messages."""

import warnings

import pytest
import torch

from segkern.ops import unpack_bits
from segkern.structures import targets
from segkern.structures.targets import Targets, bucket
from support.inputs import random_targets


def lists():
    return random_targets((3, 0, 1), 5, 12, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8, torch.float64], ids=str)
def test_packs_what_it_was_given(dtype):
    masks, labels = lists()
    targets = Targets.from_lists([m.to(dtype) for m in masks], labels, num_labels=5)
    assert targets.masks.dtype == torch.uint8
    assert targets.masks.shape == (3, 4, 12, 16)
    assert targets.count.tolist() == [3, 0, 1]
    assert targets.ids.tolist() == [0, 1, 2]
    for b, (mask, label) in enumerate(zip(masks, labels)):
        n = len(label)
        assert torch.equal(targets.masks[b, :n].float(), mask)
        assert torch.equal(targets.labels[b, :n], label)
        assert (targets.masks[b, n:] == 0).all()
        assert (targets.labels[b, n:] == 0).all()


def test_buckets_are_few_and_never_too_small():
    sizes = [bucket(n) for n in range(400)]
    assert all(size >= max(n, 1) for n, size in enumerate(sizes))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 16


def test_moves_to_another_device():
    targets = Targets.from_lists(*lists(), ids=[7, 8, 9]).to("meta")
    assert {v.device.type for v in targets if v is not None} == {"meta"}
    assert targets.semantic is None


def with_label(value):
    masks, labels = lists()
    labels[2][0] = value
    return masks, labels


BAD = {
    "label too large": (
        lambda: with_label(5),
        ValueError,
        r"labels of image 2 must be in \[0, 5\), got 5",
    ),
    "label negative": (lambda: with_label(-1), ValueError, r"must be in \[0, 5\), got -1"),
    "the ignored 255": (lambda: with_label(255), ValueError, r"must be in \[0, 5\), got 255"),
    "mask of another size": (
        lambda: ([*lists()[0][:2], torch.zeros(1, 12, 15)], lists()[1]),
        ValueError,
        r"masks of image 2 must be \[n, 12, 16\], .* got \[1, 12, 15\] float32",
    ),
    "fewer labels": (
        lambda: (lists()[0], [lists()[1][0][:2], *lists()[1][1:]]),
        ValueError,
        r"image 0 must have one label for each of its 3 masks, got \[2\]",
    ),
    "labels float": (
        lambda: (lists()[0], [x.float() for x in lists()[1]]),
        TypeError,
        "labels of image 0 must be integers, got .* float32",
    ),
    "masks complex": (
        lambda: ([x.cfloat() for x in lists()[0]], lists()[1]),
        TypeError,
        "masks of image 0 must be numbers or bool, got .* complex64",
    ),
    "uint8 masks of 255": (
        lambda: ([255 * x.byte() for x in lists()[0]], lists()[1]),
        ValueError,
        "masks of image 0 must be 1 inside and 0 outside, got 255",
    ),
    "soft masks": (
        lambda: ([0.3 * x for x in lists()[0]], lists()[1]),
        ValueError,
        "masks of image 0 must be 1 inside and 0 outside, got 0.3",
    ),
    "NaN": (
        lambda: ([x / x for x in lists()[0]], lists()[1]),
        ValueError,
        "masks of image 0 must be 1 inside and 0 outside, got nan",
    ),
    "fewer images": (lambda: (lists()[0], lists()[1][:2]), ValueError, "got 3 and 2"),
    "no image": (lambda: ([], []), ValueError, "got 0 and 0"),
    "no tensor": (lambda: ([[1]], [torch.ones(1).long()]), TypeError, "got list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        Targets.from_lists(*make(), num_labels=5)


@pytest.fixture
def unsaid():
    """Warnings that are given once are given again."""
    targets._said.clear()


def test_a_target_without_pixels_is_left_out_and_that_is_said_once(unsaid):
    masks, labels = lists()
    full = Targets.from_lists(masks, labels)
    masks[0] = torch.cat((masks[0][:1], torch.zeros(1, 12, 16), masks[0][1:]))
    labels[0] = torch.cat((labels[0][:1], torch.tensor([4]), labels[0][1:]))
    with pytest.warns(UserWarning, match="a mask without a pixel inside is left out"):
        found = Targets.from_lists(masks, labels)
    for a, b in zip(full[:4], found[:4]):
        assert torch.equal(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Targets.from_lists(masks, labels)


def test_more_targets_than_queries_are_said(unsaid):
    message = "an image has 3 targets, the model 2 queries: 1 of the 4 targets of a batch cannot"
    with pytest.warns(UserWarning, match=message):
        found = Targets.from_lists(*lists(), num_queries=2)
    assert found.count.tolist() == [3, 0, 1]  # the paper's code counts them, too
    with warnings.catch_warnings():  # once, however many there are in another batch
        warnings.simplefilter("error")
        Targets.from_lists(*lists(), num_queries=1)


def test_one_id_for_each_image():
    with pytest.raises(
        ValueError, match=r"ids must be one integer for each of 3 images, got \[2\]"
    ):
        Targets.from_lists(*lists(), ids=[1, 2])


def test_void_is_packed():
    void = torch.rand(3, 12, 16) > 0.5
    targets = Targets.from_lists(*lists(), void=list(void))
    assert torch.equal(unpack_bits(targets.void, 16), void)
    assert Targets.from_lists(*lists()).void is None


@pytest.mark.parametrize(
    ("void", "message"),
    [
        ([torch.zeros(12, 16).bool()], "void must have one map for each of 3 images, got 1"),
        ([torch.zeros(12, 16)] * 3, r"void of image 0 must be \[12, 16\] bool, got .* float32"),
        ([torch.zeros(12, 15).bool()] * 3, r"must be \[12, 16\] bool, got \[12, 15\] bool"),
    ],
    ids=["fewer", "dtype", "size"],
)
def test_bad_void(void, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Targets.from_lists(*lists(), void=void)
