"""Recipes: functions that return a `TrainConfig` tried out on its data, or a paper's settings."""

from .mask2former import DIGITS_THRESHOLD as DIGITS_THRESHOLD
from .mask2former import digits as digits
from .mask2former import mask2former as mask2former
from .segmenter import digits_segmenter as digits_segmenter
from .segmenter import segmenter as segmenter
from .streets import streets_segmenter, streets_seq2seg, streets_seq2seg_no_skip, streets_unet

# what `segkern train --recipe` knows
RECIPES = {
    "digits": digits,
    "digits-segmenter": digits_segmenter,
    "mask2former": mask2former,
    "segmenter": segmenter,
    "streets-unet": streets_unet,
    "streets-seq2seg": streets_seq2seg,
    "streets-seq2seg-no-skip": streets_seq2seg_no_skip,
    "streets-segmenter": streets_segmenter,
}
