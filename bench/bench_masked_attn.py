"""masked_attn against attention by matrix products, as transformers runs it, and against SDPA.

The open keys of a row form a disc that covers the given share of the map, as a mask of an object.
"""

import torch
import torch.nn.functional as F
from _rows import main, measure

from segkern.ops import masked_attn
from segkern.ops.mask_bits import unpack_bits
from segkern.testing import masked_attn_inputs

CASES = [(1, S, share) for S in (256, 1024, 4096, 16384) for share in (0.01, 0.05, 0.2, 1.0)]
CASES += [(2, 1024, 0.05), (2, 4096, 0.05)]


def products(q, k, v, closed):
    """nn.MultiheadAttention with weights: baddbmm, softmax, bmm; closed [B*H, Q, S] bool."""
    B, Q, H, D = q.shape
    q, k, v = (t.transpose(1, 2).reshape(B * H, -1, D) for t in (q, k, v))
    bias = torch.zeros_like(closed, dtype=q.dtype).masked_fill_(closed, -torch.inf)
    weights = torch.baddbmm(bias, q * D**-0.5, k.mT).softmax(-1)
    return (weights @ v).view(B, H, Q, D).transpose(1, 2).flatten(2)


def sdpa(q, k, v, opened):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, opened).transpose(1, 2).flatten(2)


def run(runs: int) -> list[dict]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for B, S, share in CASES:
            q, k, v, bits, count = masked_attn_inputs(B, 100, S, 8, 32, share, dtype=dtype)
            opened = (unpack_bits(bits, S) | (count == 0).unsqueeze(-1)).unsqueeze(1)
            closed = ~opened.expand(-1, 8, -1, -1).flatten(0, 1)
            impls = {
                "segkern": lambda q, k, v, b=bits, o=count: masked_attn(q, k, v, b, o),
                "products": lambda q, k, v, c=closed: products(q, k, v, c),
                "SDPA, bool mask": lambda q, k, v, o=opened: sdpa(q, k, v, o),
            }
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]

            def step(function, leaves=leaves):
                torch.autograd.grad(function(*leaves).sum(), leaves)

            case, name = f"B={B} S={S} open={share:.0%}", str(dtype).removeprefix("torch.")
            forward = {n: lambda f=f, i=(q, k, v): f(*i) for n, f in impls.items()}
            rows += measure("masked_attn", case, name, forward, runs)
            both = {n: lambda f=f, s=step: s(f) for n, f in impls.items()}
            rows += measure("masked_attn", case + " forward+backward", name, both, runs)
    return rows


if __name__ == "__main__":
    main(run, __doc__)
