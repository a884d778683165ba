"""Masks as maps of ids against arrays of them, and what training and evaluation make of them."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco

from segkern.data import collate
from segkern.data.sample import IdMaps
from segkern.evaluation.panoptic import truth_map

SIZE = 24, 33


def rectangles(n, seed=0):
    """[n, H, W] uint8: rectangles that overlap; the second is empty, the third fills the image."""
    rng, masks = np.random.default_rng(seed), np.zeros((n, *SIZE), np.uint8)
    for mask in masks:
        y, x = (rng.integers(0, side - 4) for side in SIZE)
        mask[y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = 1
    masks[1:2], masks[2:3] = 0, 1
    return masks


def coded(masks):
    return coco.encode(np.asfortranarray(masks.transpose(1, 2, 0)))


MAKERS = {
    "codes": lambda masks: IdMaps.of_codes(coded(masks) if len(masks) else [], SIZE),
    "arrays": lambda masks: IdMaps.of_arrays(masks, SIZE),
}


@pytest.mark.parametrize("host", ["built", "missing"])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("n", [0, 1, 7, 300])
def test_masks_are_those_that_came(maker, n, host, monkeypatch):
    if host == "missing":
        for module in ("segkern.data.sample", "segkern.io.rle"):
            monkeypatch.setattr(f"{module}._host", None)
    dense = rectangles(n)
    masks = MAKERS[maker](dense)
    assert masks.shape == dense.shape == np.shape(masks)
    assert np.array_equal(np.asarray(masks), dense)
    assert all(np.array_equal(masks[i], dense[i]) for i in range(-n, n))
    assert np.array_equal(masks.areas(), dense.sum((1, 2)))
    assert masks.maps.dtype == (np.uint8 if n < 256 else np.int32)
    keep = np.arange(n) % 3 != 1
    chosen = masks.chosen(keep)
    assert np.array_equal(np.asarray(chosen), dense[keep])
    assert np.array_equal(chosen.areas(), dense[keep].sum((1, 2)))
    rows, columns = np.array([3, 3, 0, -1]), np.array([-1, 32, 5])
    view = masks.taken(rows, columns)
    taken = np.asarray(view)
    assert np.array_equal(view.areas(), taken.sum((1, 2)))
    assert np.array_equal(taken[:, :3, 1:], dense[:, [3, 3, 0]][:, :, [32, 5]])
    assert not taken[:, 3].any()
    assert not taken[:, :, 0].any()


def test_masks_that_lie_apart_share_a_map():
    dense = np.zeros((20, *SIZE), np.uint8)
    for i, mask in enumerate(dense):
        mask[i] = 1
    assert len(IdMaps.of_codes(coded(dense), SIZE).maps) == 1
    assert len(IdMaps.of_arrays(dense, SIZE).maps) == 1


@pytest.mark.parametrize("ids", [[], [7], [300, 2**24 - 1, 7, 8]], ids=str)
def test_masks_of_a_map(ids):
    values = np.random.default_rng(0).choice([0, 7, 300, 2**24 - 1, 9], SIZE)
    masks = IdMaps.of_map(values, ids)
    assert np.array_equal(np.asarray(masks), [values == i for i in ids] or np.zeros((0, *SIZE)))


def sample(form):
    dense = np.zeros((3, *SIZE), np.uint8)
    dense[0, :9], dense[1, 9:12], dense[2, 12:] = 1, 1, 1
    return {
        "pixel_values": np.zeros((3, *SIZE), np.float32),
        "masks": form(dense),
        "labels": np.array([4, 5, 6]),
        "crowd": np.array([False, True, False]),
        "id": 3,
    }


@pytest.mark.parametrize("form", [np.asarray, torch.as_tensor, MAKERS["arrays"]])
def test_crowds_are_no_targets_and_marked_in_the_truth(form):
    one = sample(form)
    targets = collate([one]).targets
    assert targets.count.tolist() == [2]
    assert targets.labels[0].tolist() == [4, 6]
    assert targets.masks[0].sum((1, 2)).tolist() == [9 * 33, 12 * 33]
    ids, labels, crowd = truth_map(one, ())
    assert (labels.tolist(), crowd.tolist()) == ([4, 5, 6], [False, True, False])
    assert ids[:, 0].tolist() == [1] * 9 + [2] * 3 + [3] * 12


def test_places_outside_are_refused():
    """C++ that takes them would read beyond the maps."""
    masks = IdMaps.of_arrays(rectangles(3), SIZE)
    for rows, columns in (([24], [0]), ([0], [33])):
        with pytest.raises((ValueError, IndexError)):
            masks.taken(np.array(rows), np.array(columns))


@pytest.mark.parametrize("host", ["built", "missing"])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("n", [3, 300])
def test_masks_are_written_into_larger_arrays(n, maker, host, monkeypatch):
    dense = rectangles(n)
    masks = MAKERS[maker](dense)
    if host == "missing":
        monkeypatch.setattr("segkern.data.sample._host", None)
    out = np.zeros((n, 30, 40), np.uint8)
    masks.write(out)
    assert np.array_equal(out[:, : SIZE[0], : SIZE[1]], dense)
    assert not out[:, SIZE[0] :].any()
    assert not out[:, :, SIZE[1] :].any()


def test_ids_below_zero_are_ids_like_others():
    maps = IdMaps.of_map(np.array([[-1, -1, 3], [3, 5, -1]]), [3, 5])
    assert maps.maps[0].tolist() == [[0, 0, 1], [1, 2, 0]]
