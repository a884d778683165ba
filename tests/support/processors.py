"""transformers' image processors, with every field that ours must obey."""

import numpy as np
from transformers import (
    EomtImageProcessor,
    Mask2FormerImageProcessor,
    MaskFormerImageProcessor,
    OneFormerImageProcessor,
    SegformerImageProcessor,
)

SIDE = 64
KINDS = {
    "mask2former": Mask2FormerImageProcessor,
    "maskformer": MaskFormerImageProcessor,
    "oneformer": OneFormerImageProcessor,
    "segformer": SegformerImageProcessor,
    "eomt": EomtImageProcessor,
}
MASKS = ("mask2former", "maskformer", "oneformer")
EDGES = {"shortest_edge": 48, "longest_edge": 80}
FIXED = {"height": 37, "width": 96}
# field, its value, and the processors that have it
FLAGS = {
    "as it is": ({}, KINDS),
    "edges": ({"size": EDGES}, (*MASKS, "segformer")),
    "square": ({"size": {"height": 64, "width": 64}, "do_pad": False}, KINDS),
    "squashed": ({"size": FIXED}, (*MASKS, "segformer")),
    "fitted": (
        {"size": {"max_height": 70, "max_width": 90}},
        ("mask2former", "maskformer", "segformer"),
    ),
    "short edge": ({"size": {"shortest_edge": 45}}, ("segformer",)),
    "number": ({"size": 61}, ("segformer",)),
    "own size": ({"do_resize": False}, (*MASKS, "segformer")),
    "divisor": ({"size": EDGES, "size_divisor": 7}, ("mask2former", "maskformer")),
    "no divisor": ({"size": EDGES, "size_divisor": 0}, ("mask2former", "maskformer")),
    "pad size": ({"pad_size": {"height": 130, "width": 300}}, ("mask2former", "maskformer")),
    "nearest": ({"resample": 0}, KINDS),
    "lanczos": ({"resample": 1}, KINDS),
    "bicubic": ({"resample": 3}, KINDS),
    "unscaled": ({"do_rescale": False}, KINDS),
    "other scale": ({"rescale_factor": 1 / 127.5}, KINDS),
    "not normal": ({"do_normalize": False}, KINDS),
    "raw": ({"do_normalize": False, "do_rescale": False}, KINDS),
    "mean": ({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}, KINDS),
    "reduced": ({"do_reduce_labels": True, "ignore_index": 255}, (*MASKS, "segformer")),
    "ignored": ({"ignore_index": 255}, (*MASKS, "eomt")),
    "windows": (
        {"do_split_image": True, "do_pad": False, "size": {"shortest_edge": SIDE}},
        ("eomt",),
    ),
}
CASES = [(flag, kind) for flag, (_, kinds) in FLAGS.items() for kind in kinds]
SIZES = [(61, 93), (97, 50), (33, 150), (64, 64)]


def theirs(kind, flag):
    """transformers' processor; small, where the flag says nothing of the size."""
    base = (
        {}
        if kind in ("segformer", "eomt")
        else {"size": {"shortest_edge": 60, "longest_edge": 90}}
    )
    if kind == "segformer":
        base = {"size": {"height": 51, "width": 40}}
    if kind == "eomt":
        base = {"size": {"shortest_edge": SIDE, "longest_edge": SIDE}, "do_pad": True}
    return KINDS[kind](**base | FLAGS[flag][0])


def picture(h, w):
    return np.random.default_rng(h).integers(0, 256, (h, w, 3), np.uint8)
