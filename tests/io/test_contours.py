"""The outline of a mask: filled again by other tools it is the mask's largest piece."""

import numpy as np
import pytest
import scipy
import supervision
from PIL import Image, ImageDraw

from segkern.io.contours import outline

WITH_CORNERS, BY_SIDES = np.ones((3, 3)), None


def blobs(seed):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(rng.integers(1, 40, 2))
    return scipy.ndimage.gaussian_filter(noise, rng.uniform(0, 3)) > rng.uniform(-0.3, 0.3)


def largest(mask):
    """The largest piece without holes."""
    pieces, _ = scipy.ndimage.label(mask, WITH_CORNERS)
    piece = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    return scipy.ndimage.binary_fill_holes(piece, BY_SIDES)


@pytest.mark.parametrize("seed", range(0, 200, 20))
def test_filled_it_is_the_largest_piece(seed):
    for mask in map(blobs, range(seed, seed + 20)):
        points = outline(mask)
        if not mask.any():
            assert points.shape == (0, 2)
            continue
        drawn = Image.new("1", mask.shape[::-1])
        corners = [tuple(p) for p in points.tolist()]
        ImageDraw.Draw(drawn).polygon(corners + corners[:1] * 2, fill=1, outline=1)
        np.testing.assert_array_equal(np.asarray(drawn), largest(mask))
        if len(points) > 2:  # supervision knows no polygons of fewer
            filled = supervision.polygon_to_mask(points.astype(np.int32), mask.shape[::-1])
            np.testing.assert_array_equal(filled.astype(bool), largest(mask))


def test_points_lie_where_it_turns():
    mask = np.zeros((7, 9), bool)
    mask[1:4, 2:8] = True
    assert outline(mask).tolist() == [[2, 1], [7, 1], [7, 3], [2, 3]]
    mask[2, 4] = False  # a hole
    mask[6, 0] = True  # a smaller piece
    assert outline(mask).tolist() == [[2, 1], [7, 1], [7, 3], [2, 3]]
    assert outline(mask[6:]).tolist() == [[0, 0]]
