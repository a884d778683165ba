"""Recipes: functions that return a `TrainConfig` tried out on its data, or a paper's settings."""

from .eomt import digits_eomt as digits_eomt
from .eomt import eomt as eomt
from .mask2former import DIGITS_THRESHOLD as DIGITS_THRESHOLD
from .mask2former import digits as digits
from .mask2former import mask2former as mask2former
from .maskformer import maskformer as maskformer
from .oneformer import digits_oneformer as digits_oneformer
from .oneformer import oneformer as oneformer
from .segformer import digits_segformer as digits_segformer
from .segformer import segformer as segformer
from .segmenter import digits_segmenter as digits_segmenter
from .segmenter import segmenter as segmenter
from .seq2seg import digits_seq2seg as digits_seq2seg
from .seq2seg import digits_seq2seg_semantic as digits_seq2seg_semantic
from .seq2seg import seq2seg as seq2seg
from .streets import streets_segmenter, streets_seq2seg, streets_seq2seg_no_skip, streets_unet
from .unet import digits_unet as digits_unet
from .unet import digits_unet_semantic as digits_unet_semantic
from .unet import unet as unet

# what `segkern train --recipe` knows
RECIPES = {
    "digits": digits,
    "digits-segmenter": digits_segmenter,
    "mask2former": mask2former,
    "segmenter": segmenter,
    "maskformer": maskformer,
    "segformer": segformer,
    "digits-segformer": digits_segformer,
    "digits-seq2seg": digits_seq2seg,
    "digits-seq2seg-semantic": digits_seq2seg_semantic,
    "digits-unet": digits_unet,
    "digits-unet-semantic": digits_unet_semantic,
    "seq2seg": seq2seg,
    "unet": unet,
    "streets-unet": streets_unet,
    "streets-seq2seg": streets_seq2seg,
    "streets-seq2seg-no-skip": streets_seq2seg_no_skip,
    "streets-segmenter": streets_segmenter,
    "eomt": eomt,
    "digits-eomt": digits_eomt,
    "oneformer": oneformer,
    "digits-oneformer": digits_oneformer,
}
