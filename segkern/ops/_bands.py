"""Maps too large to be held whole are made by bands of rows: how many rows at a time."""

from torch import Tensor

# values held at once: 8 MB in float32, which a CPU's cache holds; elsewhere 512 MB, few launches
ON_CPU, ELSEWHERE = 2**21, 2**27


def rows_at_once(like: Tensor, values: int) -> int:
    """How many rows a band has, at least 1.

    Args:
        like: on the device of the band.
        values: of a row, of all images and classes.
    """
    most = ON_CPU if like.device.type == "cpu" else ELSEWHERE
    return max(1, most // max(1, values))
