r"""The keys that each query may attend to, packed 32 to a word.

    bit j of bits[b, q, w] = sum_c queries[b, q, c] features[b, c, 32 w + j] >= threshold
    open[b, q]             = number of bits set in row q

Letters: B image, Q query, C channel, S key (pixel of one level), W = ceil(S / 32) words.

The mask logits of a level are the product of the mask embeddings with that level's features; only
their sign against the threshold is kept, at 1/32 of a byte mask that all heads share. The kernel
multiplies, compares and packs a panel of keys at a time, so that no product is stored.
A product that is NaN closes its key; bits beyond S are 0. A row without one open key is left so:
`masked_attn` lets it attend to every key.
Bytes: (Q C + C S) values read, Q S / 8 written; FLOPs: 2 Q C S.
Source: Masked-attention Mask Transformer (Cheng et al., CVPR 2022), section 3.2.1.
Differs: compares the logit with 0 and not its sigmoid with 1/2; resizes the features and not the
logits, which is the same (both are linear).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._checks import alike, exact_dtype, expect, got


def pack_bits(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Packs a mask as `mask_bits` does.

    Args:
        mask: [..., S] bool, true where attention is allowed.

    Returns:
        bits [..., ceil(S / 32)] int32 and open [...] int32.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim == 0:
        raise TypeError(f"pack_bits: mask must be [..., S] bool, got {got(mask)}")
    places = F.pad(mask, (0, -mask.shape[-1] % 32)).unflatten(-1, (-1, 8)).byte()
    octets = (places << _places(mask)).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int32), mask.sum(-1, dtype=torch.int32)


def unpack_bits(bits: Tensor, S: int) -> Tensor:
    """The mask of packed bits.

    Args:
        bits: [..., ceil(S / 32)] int32.
        S: length of the mask.

    Returns:
        [..., S] bool.

    Raises:
        TypeError, ValueError: wrong dtype or shape.
    """
    if not isinstance(bits, Tensor) or bits.dtype != torch.int32 or bits.ndim == 0:
        raise TypeError(f"unpack_bits: bits must be [..., ceil(S / 32)] int32, got {got(bits)}")
    if bits.shape[-1] != -(-S // 32):
        raise ValueError(
            f"unpack_bits: bits must be [..., ceil(S / 32)] int32 with S = {S}, got {got(bits)}"
        )
    octets = bits.contiguous().view(torch.uint8)[..., : -(-S // 8)]
    # a byte a bit, and no wider: masks of large pictures come through here
    mask = (octets.unsqueeze(-1) >> _places(bits)).bitwise_and_(1).flatten(-2).view(torch.bool)
    return mask if S % 8 == 0 else mask[..., :S].contiguous()


def _places(like: Tensor) -> Tensor:
    """0 to 7: the bits of a byte; those of a word follow one another from the lowest byte on."""
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def as_features(maps: Tensor) -> Tensor:
    """Maps as the features that several calls read.

    Args:
        maps: [B, C, h, w], dense.

    Returns:
        [B, C, h * w]; a GPU's kernel reads maps as they lie, the channels of a key side by side or
        the keys of a channel: a view. The CPU's reads the keys of a channel side by side, and each
        call would order them anew: here they are, once, where they are not so yet.
    """
    if maps.device.type != "cpu" or maps.is_contiguous():
        return maps.flatten(2)
    if _library.is_exported():
        return maps.flatten(2).contiguous()
    # a CPU transposes a matrix by blocks, a stack of them value by value
    return torch.stack([image.flatten(1).contiguous() for image in maps])


def mask_bits_reference(
    queries: Tensor, features: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch; arguments as `mask_bits`."""
    exact = exact_dtype(queries)
    with torch.autocast(queries.device.type, enabled=False):
        return pack_bits(queries.to(exact) @ features.to(exact) >= threshold)


def _fake(queries: Tensor, features: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    (B, Q, _), S = queries.shape, features.shape[2]
    words = queries.new_empty((B, Q, (S + 31) // 32), dtype=torch.int32)
    return words, queries.new_empty((B, Q), dtype=torch.int32)


_forward = _library.define(
    "mask_bits(Tensor queries, Tensor features, float threshold) -> (Tensor, Tensor)",
    _fake,
    triton="mask_bits",
)


def mask_bits(
    queries: Tensor, features: Tensor, threshold: float = 0.0, impl: str = "kernel"
) -> tuple[Tensor, Tensor]:
    """The keys that each query may attend to.

    Args:
        queries: [B, Q, C] floating: mask embeddings.
        features: [B, C, S] in the queries' dtype: mask features at the resolution of the keys.
            Read in place where the keys of a channel lie side by side, and on a GPU also where the
            channels of a key do (`as_features`). Under autocast the dtypes may differ, and then
            both are cast to its dtype.
        threshold: a key is open where the product is at least this; 0 is a probability of 1/2.
            Compared with the product in float32 (float64 where the inputs are float64).
        impl: "kernel", or "reference" for plain PyTorch.

    Returns:
        bits [B, Q, ceil(S / 32)] int32 and open [B, Q] int32, without gradient.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    sizes = {}
    expect("mask_bits", "queries", queries, "B Q C", "float", sizes)
    expect("mask_bits", "features", features, "B C S", "float", sizes)
    queries, features = alike("mask_bits", queries=queries.detach(), features=features.detach())
    if _library.use_kernel("mask_bits", impl, queries):
        return _forward(queries, features, threshold)
    return mask_bits_reference(queries, features, threshold)
