"""collate: what becomes of pixels that nobody labelled, and of crowds."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segkern.data import IdMaps, InstanceViews, ViewConfig, collate
from segkern.ops import unpack_bits


def sample(size=(32, 48), **more):
    """A segment above, one below."""
    masks = np.zeros((2, *size), np.uint8)
    masks[0, :10], masks[1, 10:20] = 1, 1
    base = {"pixel_values": torch.zeros(3, *size), "masks": masks, "labels": np.array([1, 2])}
    return base | {"id": 7} | more


def unlabelled(size=(32, 48)):
    semantic = np.zeros(size, np.uint8)
    semantic[20:, 5:] = 255
    return semantic


SAMPLES = {  # what a sample has, rows and columns of its void
    "crowd": ({"crowd": np.array([False, True])}, [np.s_[10:20, :48]]),
    "no crowd": ({"crowd": np.array([False, False])}, []),
    "unlabelled": ({"semantic": unlabelled()}, [np.s_[20:32, 5:48]]),
    "both": (
        {"crowd": np.array([False, True]), "semantic": unlabelled()},
        [np.s_[10:20, :48], np.s_[20:32, 5:48]],
    ),
    "neither": ({}, []),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_void(case):
    more, places = SAMPLES[case]
    assert collate([sample(**more)], 4).targets.void is None
    void = unpack_bits(collate([sample(**more)], 4, void="ignore").targets.void, 64)[0]
    want = torch.zeros(32, 64, dtype=torch.bool)  # padding is background
    for place in places:
        want[place] = True
    assert torch.equal(void, want)


def test_void_of_tensors_and_of_samples_without_segments():
    none = torch.zeros(0, 32, 40, dtype=torch.uint8)
    empty = sample((32, 40), masks=none, labels=torch.zeros(0, dtype=torch.int64))
    empty["semantic"] = torch.full((32, 40), 255, dtype=torch.uint8)
    other = sample(semantic=torch.from_numpy(unlabelled()))
    void = unpack_bits(collate([empty, other], 4, void="ignore").targets.void, 64)
    assert void.sum((1, 2)).tolist() == [32 * 40, 12 * 43]


def test_bad_void():
    with pytest.raises(ValueError, match="void must be background or ignore, got 'skip'"):
        collate([sample()], 4, void="skip")


def _told(samples):
    """A batch, and whether its large tensors were made where other processes see them."""
    batch = collate(samples, 4)
    return [batch.pixel_values.is_shared(), batch.targets.masks.is_shared()], batch


def test_a_worker_makes_its_batch_in_shared_memory():
    """PyTorch would copy it there; alone in a process it lies in plain memory."""
    samples = [sample(pixel_values=torch.full((3, 32, 48), 1.5)) for _ in range(3)]
    own, batch = _told(samples)
    there, other = next(iter(DataLoader(samples, 3, collate_fn=_told, num_workers=1)))
    assert (own, there) == ([False, False], [True, True])
    assert torch.equal(batch.pixel_values, other.pixel_values)
    assert all(torch.equal(x, y) for x, y in zip(batch.targets[:4], other.targets[:4]))


@pytest.mark.parametrize("std", [0.5, float("nan")])
def test_pixels_of_views_are_known_to_be_finite(std):
    """Unless the numbers that they are normalised by are not."""
    view = InstanceViews(ViewConfig((8, 8)), [0.5] * 3, [std] * 3)
    masks = IdMaps.of_arrays([np.ones((6, 7))], (6, 7))
    whole = {"image": np.ones((6, 7, 3), np.uint8), "masks": masks, "id": 1}
    whole |= {"labels": np.array([1]), "crowd": np.array([False])}
    seen = view(whole, torch.Generator().manual_seed(0))
    assert seen["finite"] == bool(seen["pixel_values"].isfinite().all())
    if not seen["finite"]:
        with pytest.raises(ValueError, match="pixels of sample 1 must be finite"):
            collate([seen], 4)
