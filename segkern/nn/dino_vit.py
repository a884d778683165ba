"""Vision Transformer of DINOv2 and DINOv3: tokens of patches, of the image and of nothing.

Letters: B image, H W image size, h w size in patches, N = h w patch, P class token and registers,
T token, D channels, A attention heads, F hidden channels of a feed-forward network.

    x = [class token, registers, patches(image) + positions]                        DINOv2
    x = [class token, registers, patches(image)], q and k of patches turned by      DINOv3
        angles that their place gives
    x = x + s1 * attention(norm(x));  x = x + s2 * mlp(norm(x))                     a block
    mlp(x) = W2 gelu(W1 x), or W2 (silu(Wg x) * Wu x) where it is gated

Tokens that are no patches stay before or behind the patches: rows of queries may be appended to x.
The scales s multiply the last weights of their branch, D^2 numbers, and not its result, B T D.
Source: DINOv2 (Oquab et al., 2023), registers (Darcet et al., ICLR 2024), DINOv3 (Simeoni et al.,
2025). Weights have timm's names where DINOv2 and DINOv3 have one there.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import attention, feed_forward, linear, masked_attn
from ..runtime.constants import constant
from .drop_path import left_out
from .linear import Linear
from .vit import initialise


class Mask(NamedTuple):
    """What the last rows of x may attend to; the others attend to all.

    Attributes:
        bits: [B, Q, ceil(T / 32)] int32, of `ops.mask_bits`, of the last Q rows.
        open: [B, Q] int32.
    """

    bits: Tensor
    open: Tensor


class Rotary(NamedTuple):
    """Positions that turn q and k of patches.

    Attributes:
        theta: longest wavelength, in units that cross half the image.
        shift: in training positions move by up to this, in (-1, 1); None for not at all.
        jitter: in training each axis is stretched by a factor in [1 / jitter, jitter].
        rescale: in training both axes are, by one factor.
    """

    theta: float = 100.0
    shift: float | None = None
    jitter: float | None = None
    rescale: float | None = 2.0


class Attention(nn.Module):
    """Self-attention without its last product, which `Block` scales.

    Args:
        dim: D.
        heads: A.
        key_bias: of k, too; without it only q and v have one.
    """

    def __init__(self, dim: int, heads: int, key_bias: bool):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv = Linear(dim, 3 * dim, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None = None, mask: Mask | None = None
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]; `turn` is cosine and sine [>= T, 1, D / A / 2] of tokens."""
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = linear(x, self.qkv.weight, bias).unflatten(2, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.unbind(2)  # [B, T, A, D / A]
        if turn is not None:
            rows = [part[: x.shape[1]] for part in turn]
            q, k = _turned(q, *rows), _turned(k, *rows)
        free = x.shape[1] if mask is None else x.shape[1] - mask.bits.shape[1]
        out = attention(q[:, :free], k, v)
        if mask is None:
            return out
        return torch.cat((out, masked_attn(q[:, free:], k, v, *mask)), 1)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Pairs of channels of x [B, T, A, d], d / 2 apart, turned by the angles of their token."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)


class Block(nn.Module):
    """A pre-norm block with scaled branches.

    Args:
        dim: D.
        heads: A.
        hidden: F.
        gated: the feed-forward network is gated.
        key_bias: of the attention.
        scale: that the branches start with.
        eps: of the norms.
        drop_path: share of samples that skip a branch in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        gated: bool,
        key_bias: bool,
        scale: float,
        eps: float,
        drop_path: float,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = Attention(dim, heads, key_bias)
        self.ls1 = nn.Parameter(torch.full((dim,), float(scale)))
        self.norm2 = nn.LayerNorm(dim, eps)
        # of a gated one the gate's rows come first
        self.mlp = nn.ModuleDict(
            {"fc1": Linear(dim, 2 * hidden if gated else hidden), "fc2": Linear(hidden, dim)}
        )
        self.ls2 = nn.Parameter(torch.full((dim,), float(scale)))
        self.gated, self.drop_path = gated, drop_path

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor] | None = None, mask: Mask | None = None
    ) -> Tensor:
        """x [B, T, D] to [B, T, D]."""
        dropping = self.training and self.drop_path > 0
        attended = self.attn(self.norm1(x), turn, mask)
        last = _scaled(self.attn.proj, self.ls1)
        if dropping:
            x = x + left_out(linear(attended, *last), self.drop_path)
        else:
            x = linear(attended, *last, residual=x)
        if dropping:
            return x + left_out(self._feed_forward(x, None), self.drop_path)
        return self._feed_forward(x, x)

    def _feed_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        first, last = self.mlp["fc1"], _scaled(self.mlp["fc2"], self.ls2)
        norm = self.norm2.weight, self.norm2.bias, self.norm2.eps
        if not self.gated:
            weights = first.weight, first.bias, *last
            return feed_forward(x, *weights, norm=norm, residual=residual)
        gate, up = first(self.norm2(x)).chunk(2, -1)
        return linear(F.silu(gate) * up, *last, residual=residual)


def _scaled(layer: nn.Linear, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer whose result is scaled by channel."""
    return layer.weight * scale[:, None], layer.bias * scale


class DinoViT(nn.Module):
    """Image to tokens.

    Args:
        image_size: side of the images that position embeddings are stored for.
        patch_size: side of a patch in pixels.
        dim: D.
        depth: number of blocks.
        heads: A.
        hidden: F.
        registers: tokens of nothing, after the class token.
        rotary: DINOv3's positions; None for DINOv2's.
        gated: feed-forward networks are gated.
        key_bias: keys have a bias.
        scale: that branches start with.
        eps: of the norms.
        drop_path: share of samples that skip a branch in training.
        in_chans: channels of the images.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        registers: int = 4,
        rotary: Rotary | None = None,
        gated: bool = False,
        key_bias: bool = True,
        scale: float = 1.0,
        eps: float = 1e-6,
        drop_path: float = 0.0,
        in_chans: int = 3,
    ):
        super().__init__()
        self.patch_size, self.rotary = patch_size, rotary
        self.grid = (image_size // patch_size,) * 2
        self.tokens = 1 + registers
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)}
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, dim))
        if rotary is None:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            Block(dim, heads, hidden, gated, key_bias, scale, eps, drop_path) for _ in range(depth)
        )
        self.levels = tuple(f"blocks.{i}" for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.reg_token, std=0.02)
        self.apply(initialise)
        self.checkpointing = False  # keep the blocks' inputs alone, compute the rest again

    def embed(self, image: Tensor) -> Tensor:
        """The tokens before the first block.

        Args:
            image: [B, in_chans, H, W], sides multiples of the patch size; with DINOv2's positions
                as many patches as are stored.

        Returns:
            [B, P + N, D], the patches row by row after the other tokens.
        """
        patches = self.patch_embed["proj"](image).flatten(2).mT
        if self.rotary is None:
            patches = patches + self.pos_embed
        others = [
            token.expand(image.shape[0], -1, -1) for token in (self.cls_token, self.reg_token)
        ]
        return torch.cat((*others, patches), 1)

    def turn(self, image: Tensor, queries: int = 0) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine [P + N + queries, 1, D / A / 2] that q and k are turned by: of an image
        [B, in_chans, H, W], of whose tokens only the patches turn, and of rows after them. Drawn
        anew in training; None with DINOv2's positions."""
        if self.rotary is None:
            return None
        h, w = (side // self.patch_size for side in image.shape[2:])
        exact = torch.promote_types(image.dtype, torch.float32)
        places = _places(h, w, image.device)
        if self.training:
            places = self._drawn(places)
        rates = _rates(self.blocks[0].attn.head_dim, float(self.rotary.theta), image.device)
        # places and rates are rounded to float32, as in the published code
        angles = (2 * math.pi * places)[:, :, None] * rates.to(exact)
        angles = F.pad(angles.flatten(1), (0, 0, self.tokens, queries))[:, None]
        return angles.cos().to(image.dtype), angles.sin().to(image.dtype)

    def _drawn(self, places: Tensor) -> Tensor:
        """Places [N, 2] moved and stretched at random."""

        def factor(most: float, axes: int) -> Tensor:
            return places.new_empty(axes).uniform_(-math.log(most), math.log(most)).exp()

        shift, jitter, rescale = self.rotary[1:]
        if shift is not None:
            places = places + places.new_empty(2).uniform_(-shift, shift)
        if jitter is not None:
            places = places * factor(jitter, 2)
        return places if rescale is None else places * factor(rescale, 1)

    def run(
        self,
        block: Block,
        x: Tensor,
        turn: tuple[Tensor, Tensor] | None,
        mask: Mask | None = None,
    ) -> Tensor:
        """A block of this encoder over tokens [B, T, D], by `checkpointing` twice."""
        if self.checkpointing and self.training:
            return checkpoint(block, x, turn, mask, use_reentrant=False)
        return block(x, turn, mask)

    def forward(self, image: Tensor) -> Tensor:
        """Tokens [B, P + N, D] after all blocks and the norm, of an image as `embed` takes it."""
        x, turn = self.embed(image), self.turn(image)
        for block in self.blocks:
            x = self.run(block, x, turn)
        return self.norm(x)


@constant
def _places(h: int, w: int, device: torch.device) -> Tensor:
    """[h w, 2] float32: row and column of the patches' centres, the image from -1 to 1."""
    rows, columns = (torch.arange(0.5, n, dtype=torch.float32, device=device) / n for n in (h, w))
    return 2 * torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1) - 1


@constant
def _rates(channels: int, theta: float, device: torch.device) -> Tensor:
    """[channels / 4] float32."""
    powers = torch.arange(0, 1, 4 / channels, dtype=torch.float32, device=device)
    return 1 / theta**powers
