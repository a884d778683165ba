"""timm's Swin weights under the names of our `Swin`.

The same network with other names: timm keeps the way to a stage at its start, we at the end of the
one before, and its last norm and classifier have no place here. Results are equal where every
level divides into windows and is larger than one: elsewhere timm rolls before it pads, and does
not shift (see swin.py). The norms of the four maps, which no classifier has, start anew.
"""

import re

from torch import Tensor

from ...weights.state_dicts import misfits
from ...weights.timm_names import pretrained_model
from .swin import Swin

# of each variant the weights that the segmentation papers start from; of the two larger ones those
# of ImageNet-22k
PRETRAINED = {
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base": "swin_base_patch4_window12_384.ms_in22k",
    "swin_large": "swin_large_patch4_window12_384.ms_in22k",
}
_UNUSED = re.compile(r"(norm|head)\.|.*(attn_mask|relative_position_index)$")


def from_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a Swin classifier of timm under our names, without what has no place."""
    place = re.compile(r"layers\.(\d+)\.downsample\.")
    return {
        place.sub(lambda found: f"layers.{int(found[1]) - 1}.downsample.", name): value
        for name, value in weights.items()
        if not _UNUSED.match(name)
    }


def load_timm(model: Swin, weights: dict[str, Tensor]) -> None:
    """Loads a state dict of a Swin classifier of timm; the norms of the four maps stay.

    Raises:
        ValueError: the weights are of a Swin of other sizes; names the keys, and loads nothing.
    """
    own = model.state_dict()
    norms = {name: value for name, value in own.items() if name.startswith("norms.")}
    found = from_timm(weights) | norms
    if faults := misfits(found, own):
        raise ValueError(f"Swin: the weights do not fit the backbone; {'; '.join(faults)}")
    model.load_state_dict(found)


def load_pretrained(model: Swin, name: str) -> None:
    """Loads timm's ImageNet weights of a variant, which are downloaded if they are not kept here.

    Raises:
        ValueError: they cannot be had, or `backbone_options` made a Swin of other sizes.
    """
    channels = model.patch_embed["proj"].in_channels
    load_timm(model, pretrained_model(PRETRAINED[name], in_chans=channels).state_dict())
