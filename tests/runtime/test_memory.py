"""Work on ever new sizes: what is kept, and what is given back."""

import gc

import numpy as np
import pytest
import torch

import segkern
from segkern.runtime import memory


@pytest.fixture
def trims(monkeypatch) -> list:
    calls = []
    monkeypatch.setattr(memory, "_trim", calls.append)
    monkeypatch.setattr(memory, "_recent", {})
    return calls


def test_new_sizes_give_back(trims):
    for side in range(40):
        memory.note_size((side, side))
    assert trims == [0] * 40


def test_sizes_that_come_again_do_not(trims):
    for i in range(200):
        memory.note_size(i % 8)
    assert len(trims) == 8


def test_a_system_without_the_call(trims, monkeypatch):
    monkeypatch.setattr(memory, "_trim", None)
    for side in range(40):
        memory.note_size(side)


def test_a_stream_of_sizes_keeps_few_tensors(trims):
    """Constants of a size are kept for the last few sizes, and nothing else grows."""
    torch.manual_seed(0)
    model = segkern.Mask2Former(segkern.Mask2FormerConfig.tiny(3)).eval()

    def kept(sides) -> int:
        for side in sides:
            model.config.shortest_edge = model.config.longest_edge = side
            segkern.segment(model, np.zeros((side, side, 3), np.uint8))
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum(x.untyped_storage().nbytes() for x in tensors)

    largest = kept(range(96, 96 + 9 * 32, 32))
    assert kept([s for s in range(32, 384, 32)] * 2) <= largest
    assert len(trims) > 20
