"""Void: the cells of void pixels, and the points that are cut out."""

import pytest
import torch

from segkern.ops import unpack_bits
from segkern.ops._void import counted, cut_void, void_cells
from support.void import counts_by_hand, random_void

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("W", [1, 31, 32, 33, 64])
def test_a_cell_has_the_pixels_around_it(W, share):
    void = random_void(H=5, W=W, share=share)
    pixels = torch.nn.functional.pad(unpack_bits(void, W), (1, 1, 1, 1))
    want = pixels[:, 1:, 1:] | pixels[:, 1:, :-1] | pixels[:, :-1, 1:] | pixels[:, :-1, :-1]
    assert torch.equal(unpack_bits(void_cells(void, W), W + 1), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("H", "W"), [(7, 41), (3, 32), (1, 1)])
def test_a_point_counts_unless_a_pixel_around_it_is_void(H, W, dtype):
    void = random_void(H=H, W=W)
    points = torch.rand(2, 3, 40, 2, dtype=dtype) * 1.6 - 0.3
    edges = [[0.0, 0.0], [1.0, 1.0], [NAN, 0.5], [0.5, NAN], [INF, 0.5], [0.5, -INF], [1e30, 0.0]]
    points[:, 1, : len(edges)] = torch.tensor(edges, dtype=dtype)
    found = counted(points, void, H, W)
    assert torch.equal(found.flatten(1), counts_by_hand(points.flatten(1, 2), void, W))
    cut, number = cut_void(points, void, H, W)
    assert torch.equal(number, found.sum(-1))
    for got, own, keep in zip(*(v.flatten(0, 1) for v in (cut, points, found))):
        want = torch.cat((own[keep], own[~keep]))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_without_void_all_count():
    assert counted(torch.rand(2, 3, 4, 2), None, 5, 6).all()
