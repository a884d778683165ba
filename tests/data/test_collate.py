"""collate: what becomes of pixels that nobody labelled, and of crowds."""

import numpy as np
import pytest
import torch

from segkern.data import collate
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
