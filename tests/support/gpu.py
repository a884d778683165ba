"""The ops as the tests on a GPU run them: inputs, results and gradients."""

from functools import partial

import torch

from segkern.ops import (
    dwconv3x3_gelu,
    group_norm,
    linear_assignment,
    mask_bits,
    masked_attn,
    matching_cost,
    ms_deform_attn,
    neighborhood_attn,
    point_mask_loss,
    point_sample,
    query_layer,
    random_points,
    resize_argmax,
    resize_sum,
    segment_map,
    window_attn,
)
from segkern.ops.query_layer import Layer, Prediction
from segkern.ops.segment_map import TASKS
from support.inputs import (
    dwconv3x3_gelu_inputs,
    group_norm_inputs,
    linear_assignment_inputs,
    mask_bits_inputs,
    masked_attn_inputs,
    matching_cost_inputs,
    moved,
    ms_deform_attn_inputs,
    neighborhood_attn_inputs,
    point_mask_loss_inputs,
    point_sample_inputs,
    query_layer_inputs,
    resize_argmax_inputs,
    resize_sum_inputs,
    segment_map_inputs,
    window_attn_inputs,
)

DEVICE = "cuda"


def random_points_inputs(N=40, n=101, dtype=None, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2**33, (N, 3), generator=g)
    return [*moved([torch.randint(-(2**63), 2**63 - 1, (1,), generator=g), ids], device), n]


def norm_of_groups(x, weight, bias, up):
    return group_norm(x, 4, weight, bias, up=up)


def sum_of_maps(bias, *maps):
    return resize_sum(maps, bias, relu=True)


def layer_of(*values):
    """In half precision, which its kernel is for."""
    values = [v.bfloat16() for v in values]
    heads = values[0].shape[2] // 16  # of 16 channels in the small case
    with torch.no_grad():
        out = query_layer(*values[:3], Layer(*values[3:23]), Prediction(*values[23:]), heads)
    return tuple(t for t in out if t is not None)


def every_map(classes, masks, tasks=TASKS, size=None):
    """All that segment_map gives, task after task."""
    h, w = masks.shape[2:]
    sizes = (4 * h, 4 * w), (4 * h - 3, 4 * w - 2), size or (3 * h + 1, 5 * w)
    options = {"panoptic": {"threshold": 0.2, "overlap_threshold": 0.3}}
    maps = (segment_map(classes, masks, t, *sizes, **options.get(t, {})) for t in tasks)
    found = [t for one in maps for t in one]
    return tuple(t for t in found if t is not None)


OPS = {  # op, inputs, sizes as in a model but small, places of the inputs that get a gradient
    "ms_deform_attn": (
        ms_deform_attn,
        ms_deform_attn_inputs,
        {"H": 8, "D": 32, "P": 4, "Q": None, "shapes": ((5, 7), (10, 14), (19, 27))},
        (0, 2, 3, 4),
    ),
    "mask_bits": (mask_bits, mask_bits_inputs, {"Q": 100, "C": 256, "S": 700}, ()),
    "masked_attn": (
        masked_attn,
        masked_attn_inputs,
        {"Q": 100, "H": 8, "D": 32, "S": 700},
        (0, 1, 2),
    ),
    "point_sample": (point_sample, point_sample_inputs, {"C": 64, "h": 40, "P": 999}, (0,)),
    "random_points": (random_points, random_points_inputs, {"N": 60, "n": 1000}, ()),
    "matching_cost": (
        matching_cost,
        matching_cost_inputs,
        {"Q": 100, "K": 133, "C": 256, "T": 20, "P": 700},
        (),
    ),
    "point_mask_loss": (
        point_mask_loss,
        point_mask_loss_inputs,
        {"h": 40, "w": 56, "H": 160, "W": 224},
        (0,),
    ),
    "linear_assignment": (
        linear_assignment,
        linear_assignment_inputs,
        {"N": 40, "Q": 100, "T": 20},
        (),
    ),
    "segment_map": (
        every_map,
        segment_map_inputs,
        {"Q": 100, "K": 133, "h": 24, "w": 32, "kind": "shapes"},
        (),
    ),
    "window_attn": (
        window_attn,
        window_attn_inputs,
        {"h": 30, "w": 41, "H": 3, "D": 32, "window": 7, "shift": 3},
        (0, 1, 2),
    ),
    "neighborhood_attn": (
        neighborhood_attn,
        neighborhood_attn_inputs,
        {"h": 30, "w": 41, "H": 3, "D": 32, "kernel": 7, "dilation": 3},
        (0, 1, 2, 3),
    ),
    "group_norm": (
        norm_of_groups,
        partial(group_norm_inputs, up=(9, 12)),
        {"C": 256, "h": 40, "w": 56},
        (0, 1, 2, 3),
    ),
    "resize_argmax": (
        resize_argmax,
        resize_argmax_inputs,
        {"K": 150, "h": 32, "w": 32, "H": 500, "W": 400},
        (),
    ),
    "resize_sum": (
        sum_of_maps,
        resize_sum_inputs,
        {"E": 256, "sizes": ((40, 56), (20, 28), (10, 14), (5, 7))},
        (0, 1, 2, 3, 4),
    ),
    "dwconv3x3_gelu": (
        dwconv3x3_gelu,
        dwconv3x3_gelu_inputs,
        {"C": 128, "h": 40, "w": 56},
        (0, 1, 2),
    ),
    "query_layer": (layer_of, query_layer_inputs, {"Q": 100, "C": 256, "H": 8, "F": 512}, ()),
}


def inputs(op, large=True, dtype=torch.float32, seed=0, device=DEVICE):
    _, make, sizes, grads = OPS[op]
    values = make(**sizes if large else {}, dtype=dtype, seed=seed, device=device)
    return [v.requires_grad_() if i in grads else v for i, v in enumerate(values)]


def everything(op, values):
    """All results of an op and the gradients of its inputs, from the same start for each image."""
    function, _, _, grads = OPS[op]
    out = function(*values)
    out = list(out) if isinstance(out, tuple) else [out]
    if not grads:
        return out
    starts = [
        torch.linspace(-1, 1, o[0].numel(), device=o.device).to(o.dtype).view_as(o[0]).expand_as(o)
        for o in out
    ]
    return out + list(torch.autograd.grad(out, [values[i] for i in grads], starts))


def tensors(values):
    return [v for v in values if isinstance(v, torch.Tensor)]


def assert_equal(got, want):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want)):
        assert torch.equal(a, b), f"result {i}: {(a != b).sum().item()} of {a.numel()} differ"
