"""Tensors of more than 2^31 elements: places are counted in 64 bits where they must be."""

import gc

import pytest
import torch

from segkern.ops.mask_bits import pack_bits
from support.gpu import DEVICE, OPS, assert_equal, everything, tensors
from support.inputs import matching_cost_inputs, point_mask_loss_inputs

pytestmark = pytest.mark.gpu


SIDE = 2060  # 2 images x 256 channels x SIDE^2 pixels are more than 2^31 elements


def of_large(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def near_the_end(*shape):
    return 1 - 0.01 * torch.rand(*shape, device=DEVICE)


def large_ms_deform_attn():
    places = near_the_end(2, 64, 1, 2), torch.randn(2, 64, 8, 1, 4, 2, device=DEVICE)
    return [of_large(2, SIDE**2, 8, 32), ((SIDE, SIDE),), *places, of_large(2, 64, 8, 1, 4)]


def large_mask_bits():
    return [of_large(2, 5, 256), of_large(2, 256, SIDE**2)]


def large_masked_attn():
    opened = torch.rand(2, 5, SIDE**2, device=DEVICE) < 0.5
    keys = [of_large(2, SIDE**2, 8, 32) for _ in range(2)]
    return [of_large(2, 5, 8, 32), *keys, *pack_bits(opened)]


def large_point_sample():
    return [of_large(2, 256, SIDE, SIDE), near_the_end(2, 300, 2)]


def large_matching_cost():
    values = matching_cost_inputs(R=1, C=256, P=100, T=2, dtype=torch.bfloat16, device=DEVICE)
    values[2], values[5] = of_large(2, 256, SIDE, SIDE), near_the_end(2, 1, 100, 2)
    return values


def large_point_mask_loss():
    values = point_mask_loss_inputs(R=8, T=32, h=1, w=1, device=DEVICE)
    values[0] = of_large(2, 8, 32, SIDE, SIDE)
    return [*values, 500]


def large_linear_assignment():
    cost = torch.rand(2, 110_000, 100, 100, device=DEVICE, dtype=torch.float16)
    counts = torch.zeros(2, 110_000, dtype=torch.int64, device=DEVICE)
    counts[:, -10:] = 100
    return [cost, counts]


def large_segment_map():
    return [of_large(2, 256, 20), of_large(2, 256, SIDE, SIDE)]


LARGE = {
    "ms_deform_attn": large_ms_deform_attn,
    "mask_bits": large_mask_bits,
    "masked_attn": large_masked_attn,
    "point_sample": large_point_sample,
    "matching_cost": large_matching_cost,
    "point_mask_loss": large_point_mask_loss,
    "linear_assignment": large_linear_assignment,
    "segment_map": large_segment_map,
}


@pytest.mark.parametrize("op", LARGE)
def test_more_than_2_to_31_elements(op, same_bits):
    """The second image gives alone what it gives behind the first."""
    gc.collect()
    torch.cuda.empty_cache()
    # 4.3 GB of inputs; with gradients also these in float32, and all of it twice
    need = 60 if OPS[op][3] else 20
    if torch.cuda.mem_get_info()[0] < need * 2**30:
        pytest.skip(f"needs {need} GB of free memory")
    values = LARGE[op]()
    assert max(t.numel() for t in tensors(values)) > 2**31
    for i in OPS[op][3]:
        values[i].requires_grad_()
    got = everything(op, values)
    second = [
        v[1:].detach().requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor) and v.shape[0] == 2
        else v
        for v in values
    ]
    want = everything(op, second)
    assert_equal([t[1:] for t in got], want)
