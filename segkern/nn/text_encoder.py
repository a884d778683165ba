"""Text queries: what the words of a sentence say, as vectors that queries are compared with.

Letters: N text, L token, V vocabulary, E width, B image, Q query, C channels.

    x = embedding(tokens) + positions
    y = x + attention(norm(x)), of each token to itself and those before it;  x = y + mlp(norm(y))
    text = projector(norm(x at the end token))       the end token is that with the largest number

A token sees nothing that comes after it, so what follows the last end token of all texts is never
computed: sentences of a few words take a few tokens and not the 77 of a context.
Source: CLIP (Radford et al., ICML 2021), as in OneFormer (Jain et al., CVPR 2023), section 3.3.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextBlock(nn.Module):
    """Causal self attention and a feed-forward network, each after a norm and added.

    Args:
        width: E, a multiple of heads.
        heads: of attention.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [N, L, E] -> [N, L, E]
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.proj(found.transpose(1, 2).flatten(2))
        hidden = self.fc1(self.norm2(x))
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class TextEncoder(nn.Module):
    """Texts to vectors.

    Args:
        vocabulary: V.
        context: the most tokens of a text.
        width: E, a multiple of 64, the channels of a head.
        layers: number of blocks.
        channels: C.
        projector_layers: of the projector, with a ReLU between two.
        learned: number of text queries [E] that no text has, which need E = C.
    """

    def __init__(
        self,
        vocabulary: int = 49408,
        context: int = 77,
        width: int = 256,
        layers: int = 6,
        channels: int = 256,
        projector_layers: int = 2,
        learned: int = 16,
    ):
        super().__init__()
        self.token_embed = nn.Embedding(vocabulary, width)
        self.position_embed = nn.Parameter(torch.empty(context, width))
        self.layers = nn.ModuleList(TextBlock(width, width // 64) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        widths = [width] + projector_layers * [channels]
        self.projector = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.learned = nn.Embedding(learned, width) if learned else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """As CLIP starts: what is added to x begins smaller the more layers there are."""
        width, depth = self.position_embed.shape[1], len(self.layers)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.position_embed, std=0.01)
        added = width**-0.5 * (2 * max(depth, 1)) ** -0.5
        for block in self.layers:
            nn.init.normal_(block.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.proj.weight, std=added)
            nn.init.normal_(block.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.fc2.weight, std=added)
            for bias in (block.qkv.bias, block.proj.bias):
                nn.init.zeros_(bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors of texts.

        Args:
            tokens: [N, L] int64 in [0, V), L at most `context`; 0 after the end token.

        Returns:
            [N, C].
        """
        x = self.token_embed(tokens) + self.position_embed[: tokens.shape[1]]
        for block in self.layers:
            x = block(x)
        x = self.norm(x[torch.arange(len(x), device=x.device), tokens.argmax(1)])
        *hidden, end = self.projector
        for part in hidden:
            x = F.relu(part(x))
        return end(x)

    def queries(self, texts: Tensor) -> Tensor:
        """Text queries [B, Q, C] of an image's texts [B, n, C], those that are learned last."""
        if self.learned is None:
            return texts
        more = self.learned.weight.to(texts.dtype).expand(len(texts), -1, -1)
        return torch.cat((texts, more), 1)
