"""DiNAT as a backbone against the same network in plain PyTorch, with the same weights.

There is no other to compare with: transformers' needs functions that NATTEN has given up.
"""

import pytest
import torch
import torch.nn.functional as F
from _measure import DEVICE, Work, pick

from segkern.nn.backbones.dinat import VARIANTS, Dinat
from segkern.ops.neighborhood_attn import neighborhood_attn_reference

IMPLS = ("segkern", "plain PyTorch")
TINY = {"depths": (1, 2, 1, 1), "num_heads": (1, 1, 1, 1), "embed_dim": 16, "kernel_size": 3}
CASES = pick(  # name, options, height, width, B, dtype
    [("tiny", TINY, 64, 96, 1, "float32")],
    [("dinat_tiny", {}, 512, 512, 1, dtype) for dtype in ("float32", "bfloat16")],
    [("dinat_tiny", {}, 512, 512, 8, "bfloat16"), ("dinat_large", {}, 640, 640, 1, "bfloat16")],
)


def plain(model, x):
    """Four maps of x [B, C, H, W]."""
    x, maps = model.patch_embed["proj"](x).permute(0, 2, 3, 1), []
    x = model.patch_embed["norm"](x)
    for stage, norm in zip(model.layers, model.norms):
        for block in stage.blocks:
            x = x + attended(block.attn, block.norm1(x))
            hidden = F.gelu(F.linear(block.norm2(x), *block.mlp["fc1"].parameters()))
            x = x + F.linear(hidden, *block.mlp["fc2"].parameters())
        maps.append(norm(x).permute(0, 3, 1, 2))
        x = x if stage.downsample is None else stage.downsample(x)
    return maps


def attended(attn, x):
    h, w = x.shape[1:3]
    least = attn.kernel * attn.dilation
    x = F.pad(x, (0, 0, 0, max(0, least - w), 0, max(0, least - h)))
    qkv = F.linear(x, *attn.qkv.parameters()).unflatten(-1, (3, attn.heads, -1))
    out = neighborhood_attn_reference(*qkv.unbind(3), attn.rpb, attn.kernel, attn.dilation)
    return F.linear(out[:, :h, :w].flatten(3), *attn.proj.parameters())


def build(name, options, height, width, B, dtype):
    model = Dinat(**VARIANTS.get(name, {}) | options).to(DEVICE).eval()
    x = torch.randn(B, 3, height, width, device=DEVICE)

    def run(function):
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=dtype != "float32"):
            return tuple(function(x))

    functions = model, lambda x: plain(model, x)
    return Work({impl: lambda f=f: run(f) for impl, f in zip(IMPLS, functions)})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[2]}x{c[3]} B={c[4]} {c[5]}")
def test_dinat(case, impl, measured):
    name, _, height, width, B, dtype = case
    measured(f"{name} backbone", f"{height}x{width} B={B}", dtype, impl, lambda: build(*case))
