"""BERT's encoder for the patches of an image, with learned tokens in front of them.

Letters: B image, H W image size (multiples of the patch size), h w patches of its sides, N = h w,
Q token, D channels, F hidden channels.

    x_0 = norm(tokens, patches(image) + positions)                  [B, Q + N, D]
    y   = norm(x + attention(x));   x_i = norm(y + W2 gelu(W1 y))   a block: norms after the sums

Source: BERT (Devlin et al., NAACL 2019), whose words are patches here, as in ViT (Dosovitskiy et
al., ICLR 2021); its epsilon of the norms, 1e-12.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import attention, feed_forward
from .linear import Linear
from .vit import ResizedPositions, initialise

EPS = 1e-12


class Attention(nn.Module):
    """Self attention, with what it is added to.

    Args:
        dim: D.
        heads: number of heads.
        dropout: probability in the attention weights and in the result.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.dropout = dropout
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        """x + attention(x)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim))
        if not (self.training and self.dropout):
            return self.proj(attention(*qkv.unbind(2)), x)
        heads_first = qkv.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(*heads_first, dropout_p=self.dropout)
        return x + F.dropout(self.proj(found.transpose(1, 2).flatten(2)), self.dropout)


class FeedForward(nn.Module):
    """Two layers with a gelu between them, with what they are added to.

    Args:
        dim: D.
        hidden: F.
        dropout: probability in the result.
    """

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        """x + feed_forward(x)."""
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        if self.training and self.dropout:
            return x + F.dropout(feed_forward(x, *weights), self.dropout)
        return feed_forward(x, *weights, residual=x)


class Block(nn.Module):
    """Attention and a feed-forward network, a norm after each.

    Args:
        dim: D.
        heads: number of heads.
        hidden: F.
        dropout: probability in both.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.attn = Attention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.mlp = FeedForward(dim, hidden, dropout)
        self.norm2 = nn.LayerNorm(dim, EPS)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        return self.norm2(self.mlp(self.norm1(self.attn(x))))


class Bert(nn.Module):
    """Image to the hidden states of its patches.

    Args:
        image_size: (H, W) that positions are stored for, multiples of patch_size; for others they
            are resized bilinearly.
        patch_size: side of a patch in pixels.
        dim: D, a multiple of heads.
        depth: number of blocks.
        heads: of attention.
        hidden: F.
        dropout: probability after the first norm and in the blocks.
        in_chans: channels of the images.
    """

    tokens = 0  # that have positions: those in front are learned whole

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        dropout: float = 0.0,
        in_chans: int = 3,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)}
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
        self.norm = nn.LayerNorm(dim, EPS)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, dropout) for _ in range(depth))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(initialise)
        self.checkpointing = False  # keep the blocks' inputs alone, compute the rest again
        self._resized = ResizedPositions()

    def positions(self, h: int, w: int) -> Tensor:
        """Position embeddings [1, h w, D] of a grid of h x w patches."""
        if (h, w) == self.grid:
            return self.pos_embed
        return self._resized(self.pos_embed, 0, self.grid, (h, w))

    def forward(self, image: Tensor, tokens: Tensor | None = None) -> list[Tensor]:
        """The states before the first block and after each.

        Args:
            image: [B, in_chans, H, W], sides multiples of the patch size.
            tokens: [Q, D] to put in front.

        Returns:
            depth + 1 times [B, Q + N, D], the patches row by row after the tokens.
        """
        x = self.patch_embed["proj"](image)
        h, w = x.shape[2:]
        x = x.flatten(2).mT + self.positions(h, w)
        if tokens is not None:
            x = torch.cat((tokens.expand(x.shape[0], -1, -1), x), 1)
        states = [self.dropout(self.norm(x))]
        for block in self.blocks:
            x, keeping = states[-1], not (self.checkpointing and self.training)
            states.append(block(x) if keeping else checkpoint(block, x, use_reentrant=False))
        return states


class Unpatch(nn.ConvTranspose2d):
    """A transposed convolution whose kernels do not overlap, of patches that are rows of a matrix:
    one product.

    Args:
        dim: D.
        channels: of the result.
        size: side that a patch becomes, in pixels.
    """

    def __init__(self, dim: int, channels: int, size: int):
        super().__init__(dim, channels, size, size)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h w, D] to [B, channels, size h, size w]."""
        (h, w), n = grid, self.kernel_size[0]
        x = x @ self.weight.flatten(1)
        x = x.unflatten(2, (-1, n, n)).unflatten(1, (h, w)).permute(0, 3, 1, 4, 2, 5)
        return x.flatten(4).flatten(2, 3) + self.bias[:, None, None]
