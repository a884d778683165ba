"""Recipes: functions that return a `TrainConfig` tried out on its data, or a paper's settings."""

from .eomt import digits_eomt as digits_eomt
from .eomt import eomt as eomt
from .mask2former import DIGITS_THRESHOLD as DIGITS_THRESHOLD
from .mask2former import digits as digits
from .mask2former import mask2former as mask2former
from .segmenter import digits_segmenter as digits_segmenter
from .segmenter import segmenter as segmenter

# what `segkern train --recipe` knows
RECIPES = {
    "digits": digits,
    "digits-segmenter": digits_segmenter,
    "mask2former": mask2former,
    "segmenter": segmenter,
    "eomt": eomt,
    "digits-eomt": digits_eomt,
}
