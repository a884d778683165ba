"""ms_deform_attn against transformers' grid_sample path, in the encoder of Mask2Former.

One query a pixel of the three levels, 8 heads of 32 channels, 4 points; offsets of a standard
deviation of 2 pixels. Both start from raw offsets and logits.
"""

import torch
from _rows import main, measure

from segkern.ops import ms_deform_attn
from segkern.testing import ms_deform_attn_inputs

SIDES = {"512x512": 512, "1024x1024": 1024}


def grid_sample_path(value, shapes, reference, offsets, logits):
    from transformers.models.mask2former.modeling_mask2former import (
        multi_scale_deformable_attention,
    )

    sides = torch.tensor([(w, h) for h, w in shapes], device=value.device)[:, None]
    locations = reference[:, :, None, :, None] + offsets / sides
    weights = logits.flatten(3).softmax(3).view_as(logits)
    return multi_scale_deformable_attention(value, shapes, locations, weights)


def run(runs: int) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name, side in SIDES.items():
        inputs = ms_deform_attn_inputs(
            B=1,
            H=8,
            D=32,
            P=4,
            shapes=[(side // stride, side // stride) for stride in (32, 16, 8)],
            Q=None,
            spread=2.0,
            device=device,
        )
        leaves = [inputs[i].requires_grad_() for i in (0, 3, 4)]
        grad = torch.randn_like(ms_deform_attn(*inputs))

        def forward(function, inputs=inputs):
            with torch.no_grad():
                function(*inputs)

        def step(function, inputs=inputs, leaves=leaves, grad=grad):
            torch.autograd.grad(function(*inputs), leaves, grad)

        for case, time in {name: forward, name + " forward+backward": step}.items():
            impls = {
                "segkern": lambda time=time: time(ms_deform_attn),
                "transformers": lambda time=time: time(grid_sample_path),
            }
            rows += measure("ms_deform_attn", case, "float32", impls, runs)
    return rows


if __name__ == "__main__":
    main(run, __doc__)
