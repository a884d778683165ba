"""masked_attn against attention by matrix products, as transformers runs it, SDPA, FlexAttention.

The open keys of a row form a disc that covers the given share of the map, as a mask of an object.
With its mask: from mask embeddings and features, as a decoder layer starts; FlexAttention then
builds its block mask too. Else everybody's mask is given in the form that it likes best.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from _measure import DEVICE, OPTIONS, PASSES, Work, pick, repeated, short, step

from segkern.ops import mask_bits, masked_attn
from segkern.ops.mask_bits import unpack_bits
from support.inputs import masked_attn_inputs

Q, H, D, C = pick((4, 2, 8, 16), *[(100, 8, 32, 256)] * 2)
IMPLS = ("segkern", "products", "SDPA, bool mask", "FlexAttention")
SHARES = (0.01, 0.05, 0.2, 1.0)
ONE, HALF = torch.float32, torch.bfloat16
CASES = pick(  # B, S, share, dtype
    [(1, 40, 0.2, ONE)],
    [(1, S, share, t) for t in (ONE, HALF) for S in (256, 1024, 4096, 16384) for share in SHARES]
    + [(2, S, 0.05, t) for t in (ONE, HALF) for S in (1024, 4096)],
    [(16, S, share, HALF) for S in (1024, 4096, 16384) for share in SHARES]
    + [(1, 1024, 0.05, HALF), (1, 16384, 0.05, HALF), (2, 4096, 0.05, HALF), (8, 4096, 0.05, HALF)]
    + [(B, 4096, 0.05, ONE) for B in (1, 16)],
)
MASKS = pick(["given", "with its mask"], ["given"], ["with its mask", "given"])
FLEX_BATCH = 16  # of which FlexAttention is compiled: each shape takes it many seconds


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


def with_heads(closed):
    """As transformers makes it: a row without an open key is opened; one mask a head."""
    closed = closed.unsqueeze(1).repeat(1, H, 1, 1).flatten(0, 1)
    return closed & (closed.sum(-1) != closed.shape[-1]).unsqueeze(-1)


@functools.cache
def flex():
    """FlexAttention and its block mask of a mask [B, Q, S], both compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 64  # beyond it shapes would run uncompiled
    attention = torch.compile(flex_attention, dynamic=False)
    blocks = torch.compile(create_block_mask, dynamic=False)

    def block_mask(opened):
        def inside(b, h, q, k):
            return opened[b, q, k]

        return blocks(inside, len(opened), None, *opened.shape[1:], device=opened.device)

    def attend(q, k, v, block):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attention(q, k, v, block_mask=block).transpose(1, 2).flatten(2)

    return attend, block_mask


@functools.lru_cache(maxsize=1)
def one_image(S, share, dtype):
    return masked_attn_inputs(1, Q, S, H, D, share, dtype=dtype)


def build(B, S, share, dtype, backward, with_mask):
    q, k, v, bits, count = repeated(one_image(S, share, dtype), B)
    opened = unpack_bits(bits, S) | (count == 0).unsqueeze(-1)  # [B, Q, S]
    impls = {}
    if with_mask:
        # features whose product with any embeddings is 1 at open keys and -1 at the others
        embed = torch.randn(Q, C)
        sign = 2.0 * opened[0].cpu() - 1
        features = repeated([(torch.linalg.pinv(embed) @ sign).to(dtype)[None]], B)[0]
        embed = repeated([embed.to(dtype)[None]], B)[0]

        def mask():
            inside = embed @ features >= 0
            return inside | ~inside.any(-1, keepdim=True)

        def transformers_mask():
            return with_heads((embed @ features).sigmoid() < 0.5)

        impls["segkern"] = lambda q, k, v: masked_attn(q, k, v, *mask_bits(embed, features))
        impls["products"] = lambda q, k, v: products(q, k, v, transformers_mask())
        impls["SDPA, bool mask"] = lambda q, k, v: sdpa(q, k, v, mask().unsqueeze(1))
    else:
        closed = with_heads(~opened)
        impls["segkern"] = lambda q, k, v: masked_attn(q, k, v, bits, count)
        impls["products"] = lambda q, k, v: products(q, k, v, closed)
        impls["SDPA, bool mask"] = lambda q, k, v: sdpa(q, k, v, opened.unsqueeze(1))
    why_not = without_flex(B)
    if not why_not:
        attend, block_mask = flex()
        given = functools.cache(lambda: block_mask(opened))
        block = (lambda: block_mask(mask())) if with_mask else given
        impls["FlexAttention"] = lambda q, k, v: attend(q, k, v, block())
    if backward:
        impls = {name: step(f, [q, k, v]) for name, f in impls.items()}
    else:
        impls = {name: lambda f=f: f(q, k, v) for name, f in impls.items()}
    if why_not:
        impls["FlexAttention"] = why_not
    size, pairs = q.element_size(), H * opened.sum().item()
    moved = (2 * q.numel() + 2 * k.numel()) * size * (3 if backward else 1) + bits.numel() * 4
    flops = pairs * D * (14 if backward else 4)
    if with_mask:
        moved += (embed.numel() + features.numel()) * size
        flops += 2 * B * Q * C * S
    return Work(impls, moved, flops, dtype)


def without_flex(B):
    if DEVICE == "cpu":
        return "timed on a GPU only"
    if B != FLEX_BATCH and not OPTIONS.compiled:
        return f"compiled for B={FLEX_BATCH} only (--compiled for all)"
    return ""


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sizes", CASES, ids=lambda s: f"B={s[0]} S={s[1]} {s[2]} {short(s[3])}")
def test_masked_attn(sizes, mask, direction, impl, measured):
    B, S, share, dtype = sizes
    case = f"B={B} S={S} open={share:.0%}{'' if mask == 'given' else f' {mask}'}"

    def work():
        return build(*sizes, direction != "forward", mask != "given")

    measured("masked_attn", case + PASSES[direction], short(dtype), impl, work)
