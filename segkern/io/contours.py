"""The outline of a mask as a polygon.

Letters: H W size of the mask.
"""

import numpy as np
import scipy

# right, down, left, up: steps along the edges of pixels, the mask on the right-hand side
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def outline(mask: np.ndarray) -> np.ndarray:
    """The outer contour of the largest piece of a mask, through the centres of its pixels.

    Pixels that touch at a corner are of one piece; holes are left out. Drawn and filled with its
    own pixels, the polygon is that piece without holes.

    Args:
        mask: [H, W] bool.

    Returns:
        [n, 2] int64: x and y, clockwise, without points on a straight line; [0, 2] where the mask
        is empty.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros((0, 2), np.int64)
    y0, x0 = rows[0], columns[0]
    piece, count = scipy.ndimage.label(
        mask[y0 : rows[-1] + 1, x0 : columns[-1] + 1], np.ones((3, 3))
    )
    if count > 1:
        piece = piece == 1 + np.bincount(piece.ravel())[1:].argmax()
    pixels = _walk(np.pad(piece.astype(bool), 1)) - 1
    return _corners(pixels) + (x0, y0)


def _walk(inside: np.ndarray) -> np.ndarray:
    """The pixels [n, 2] along the outer edge of one piece, in a frame of False."""
    width = inside.shape[1]
    flat = inside.ravel().tolist()
    at = flat.index(True)  # the first of the topmost row: its upper edge is the piece's
    heading, start, found = 0, (at, 0), []
    steps = [dx + dy * width for dx, dy in _STEPS]
    while True:
        found.append(at)
        ahead = at + steps[heading]
        left = ahead + steps[heading - 1]
        if flat[left]:  # the edge turns to the left
            at, heading = left, (heading - 1) % 4
        elif flat[ahead]:
            at = ahead
        else:  # around the corner of this pixel
            heading = (heading + 1) % 4
        if (at, heading) == start:
            break
    found = np.array(found)
    found = found[np.append(True, found[1:] != found[:-1])]
    return np.stack((found % width, found // width), 1)


def _corners(points: np.ndarray) -> np.ndarray:
    """A closed walk without the points between two equal steps."""
    if len(points) > 1 and (points[0] == points[-1]).all():
        points = points[:-1]
    if len(points) < 3:
        return points
    step = np.roll(points, -1, 0) - points
    return points[(step != np.roll(step, 1, 0)).any(1)]
