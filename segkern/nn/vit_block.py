"""The block of a Vision Transformer: a norm before attention, another before two layers.

Letters: B image, T token, D channels, F = 4 D hidden channels.

    y = x + proj(attention(norm(x)));    x = y + W2 gelu(W1 norm(y))

In training values of the attention weights, of the hidden channels and of both branches are
dropped, and branches of whole images are left out. Names of weights are those of timm's block.
Source: ViT (Dosovitskiy et al., ICLR 2021), with the LayerNorm of PyTorch (eps 1e-5, where timm's
ViT has 1e-6).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import attention, feed_forward
from .drop_path import left_out
from .linear import Linear


class Attention(nn.Module):
    """Self-attention.

    Args:
        dim: D.
        heads: number of heads.
        dropout: probability in the attention weights.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.dropout = dropout
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, T, D] to [B, T, D], plus `residual` [B, T, D] if any."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)
        if self.training and self.dropout:
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(*heads_first, dropout_p=self.dropout)
            out = out.transpose(1, 2).flatten(2)
        else:
            out = attention(q, k, v)
        return self.proj(out, residual)


class Block(nn.Module):
    """Attention and a feed-forward network, added to what they are of.

    Args:
        dim: D.
        heads: number of heads.
        dropout: probability in both branches.
        drop_path: probability that an image leaves a branch out in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": Linear(dim, 4 * dim), "fc2": Linear(4 * dim, dim)})
        self.dropout, self.drop_path = dropout, drop_path

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        if self.training and (self.dropout or self.drop_path):
            x = x + left_out(self._dropped(self.attn(self.norm1(x))), self.drop_path)
            return x + left_out(self._feed_forward(x, None), self.drop_path)
        x = self.attn(self.norm1(x), x)
        return self._feed_forward(x, x)

    def _feed_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        first, last = self.mlp["fc1"], self.mlp["fc2"]
        if self.training and self.dropout:
            hidden = self._dropped(F.gelu(first(self.norm2(x))))
            return self._dropped(last(hidden))
        norm = self.norm2.weight, self.norm2.bias, self.norm2.eps
        weights = first.weight, first.bias, last.weight, last.bias
        return feed_forward(x, *weights, norm=norm, residual=residual)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
