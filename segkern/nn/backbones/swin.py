"""Swin: a hierarchical transformer whose attention stays in windows, every other block shifted.

    y = x + proj(attention(norm(x)))        in windows of W x W tokens (`ops.window_attn`)
    z = y + mlp(norm(y))
    attention = softmax(q k^T / sqrt(D) + bias[offset of key to query] + mask) v

Letters: B image, H head, D channels a head, C channels, h w map size, W window's side,
S = W W tokens of a window.

A padded token is zero before the projection to q, k and v, and so that projection's bias after it:
none is projected. The attention adds that bias as it reads.
Source: Swin Transformer (Liu et al., ICCV 2021). As in the published segmentation checkpoints
(detectron2's and transformers' alike, and unlike timm) maps are padded first and rolled then,
and odd blocks are shifted even where one window covers the whole map.
"""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...ops import feed_forward, linear, window_attn
from ...ops._library import is_exported
from .. import drop_path
from ..linear import Linear
from ..recompute import recomputed

VARIANTS = {
    "swin_tiny": {
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
        "window_size": 7,
    },
    "swin_small": {
        "embed_dim": 96,
        "depths": (2, 2, 18, 2),
        "num_heads": (3, 6, 12, 24),
        "window_size": 7,
    },
    "swin_base": {
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "window_size": 12,
    },
    "swin_large": {
        "embed_dim": 192,
        "depths": (2, 2, 18, 2),
        "num_heads": (6, 12, 24, 48),
        "window_size": 12,
    },
}
PATCH = 4  # side of the patches that become tokens
WIDE = 384  # channels: to form q, k and v again takes C / 2 operations a byte that is not kept


class WindowAttention(nn.Module):
    """Self-attention in windows, with a learned bias for each offset of key to query.

    Args:
        channels: C = H D.
        heads: H.
        window: W.
        shift: how far the windows lie off.
    """

    def __init__(self, channels: int, heads: int, window: int, shift: int):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(
        self,
        x: Tensor,  # [B, h, w, C]
        norm: nn.LayerNorm,  # of x
        offsets: Tensor,  # [S, S] rows of the bias table
        residual: Tensor | None,  # [B h w, C], added
    ) -> Tensor:  # [B h w, C]
        if x.shape[3] < WIDE:
            out = recomputed(self._attend, x, norm, offsets)
        else:
            out = self._attention(recomputed(self._project, x, norm), offsets)
        return self.proj(out.flatten(0, 2), residual)

    def _attend(self, x: Tensor, norm: nn.LayerNorm, offsets: Tensor) -> Tensor:
        return self._attention(self._project(x, norm), offsets)

    def _project(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:  # [B, h, w, 3 C]
        return linear(norm(x), self.qkv.weight)

    def _attention(self, qkv: Tensor, offsets: Tensor) -> Tensor:  # [B, h, w, C]
        qkv, added = (t.unflatten(-1, (3, self.heads, -1)) for t in (qkv, self.qkv.bias))
        bias = F.embedding(offsets, self.relative_position_bias_table).permute(2, 0, 1)
        return window_attn(qkv, added, bias, self.window, self.shift)


class Block(nn.Module):
    """Attention in windows and a feed-forward network, each normalised before and added after.

    Args:
        channels: C.
        heads: H.
        window: W.
        shifted: whether the windows lie half a window off.
        drop_path: probability, for each image, that a branch is left out in training.
    """

    def __init__(self, channels: int, heads: int, window: int, shifted: bool, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window, window // 2 if shifted else 0)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.ModuleDict(
            {"fc1": Linear(channels, 4 * channels), "fc2": Linear(4 * channels, channels)}
        )

    def forward(
        self,
        x: Tensor,  # [B, h, w, C]
        offsets: Tensor,  # [S, S]
        first: Tensor | None,  # [B, 1, 1, 1]
        second: Tensor | None,  # [B, 1, 1, 1]
    ) -> Tensor:  # [B, h, w, C]
        x = drop_path.add(x, lambda flat: self.attn(x, self.norm1, offsets, flat), first)
        weights = [p for name in ("fc1", "fc2") for p in self.mlp[name].parameters()]
        norm = (self.norm2.weight, self.norm2.bias, self.norm2.eps)
        rows = x.flatten(0, 2)
        mlp = functools.partial(feed_forward, rows, *weights, "gelu", norm=norm)
        return drop_path.add(x, lambda flat: mlp(residual=flat), second)


class Downsample(nn.Module):
    """Joins each 2 x 2 tokens to one of twice the channels.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, h, w, C] -> [B, ceil(h/2), ceil(w/2), 2 C]
        return recomputed(self._reduce, x)

    def _reduce(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        if h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        x = x.view(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.flatten(3)))


class Stage(nn.Module):
    """Blocks of one resolution, every other one shifted, and the way to the next.

    Args:
        channels: C.
        heads: H.
        window: W.
        drop_path: of each block.
        last: whether there is no next stage.
    """

    def __init__(self, channels: int, heads: int, window: int, drop_path: list[float], last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(channels, heads, window, i % 2 == 1, rate) for i, rate in enumerate(drop_path)
        )
        self.downsample = None if last else Downsample(channels)
        self.checkpointing = False

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # [B, h, w, C]
        for block in self.blocks:
            drawn = drop_path.draw(block.drop_path, x.shape[0], x.device, block.training)
            inputs = (x, offsets, *drawn)
            if self.checkpointing and self.training:
                # nothing random is inside: a generator's state cannot be read in a CUDA graph
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        return x


class Swin(nn.Module):
    """Four maps of an image, at strides 4, 8, 16 and 32.

    Args:
        embed_dim: channels of the finest map; each next one has twice as many.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        window_size: W.
        drop_path_rate: of the last block, in [0, 1); the first has 0, those between rise evenly.
        in_chans: channels of the images.

    Raises:
        ValueError: not four stages, channels that the heads do not divide, or a rate of 1.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: tuple[int, int, int, int] = (2, 2, 6, 2),
        num_heads: tuple[int, int, int, int] = (3, 6, 12, 24),
        window_size: int = 7,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
    ):
        super().__init__()
        if len(depths) != 4 or len(num_heads) != 4:
            raise ValueError(
                f"Swin: depths and num_heads must have four entries, got {depths}, {num_heads}"
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"Swin: drop_path_rate must be in [0, 1), got {drop_path_rate}")
        self.channels = tuple(embed_dim * 2**i for i in range(4))
        self.strides = (4, 8, 16, 32)
        self.levels = tuple(f"layers.{i}" for i in range(4))
        for channels, heads in zip(self.channels, num_heads):
            if channels % heads:
                raise ValueError(
                    f"Swin: num_heads must divide the channels {self.channels}, got {num_heads}"
                )
        self.window = window_size
        self.patch_embed = nn.ModuleDict(
            {
                "proj": nn.Conv2d(in_chans, embed_dim, PATCH, stride=PATCH),
                "norm": nn.LayerNorm(embed_dim),
            }
        )
        rates = drop_path.rates(drop_path_rate, sum(depths))
        self.layers = nn.ModuleList(
            Stage(c, heads, window_size, [rates.pop(0) for _ in range(depth)], i == 3)
            for i, (c, heads, depth) in enumerate(zip(self.channels, num_heads, depths))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Runs the network.

        Args:
            x: [B, in_chans, H, W] floating, normalised; any size, zero-padded to a multiple of 4.

        Returns:
            maps [B, C_i, ceil(H / s_i), ceil(W / s_i)], finest first, channels last in memory.
        """
        h, w = x.shape[2:]
        if not is_exported():
            # the size is a constant of a compiled graph: symbols halved four times take minutes
            h, w = operator.index(h), operator.index(w)
        if h % PATCH or w % PATCH:
            x = F.pad(x, (0, -w % PATCH, 0, -h % PATCH))
        x = self.patch_embed["proj"](x).permute(0, 2, 3, 1)
        x = self.patch_embed["norm"](x)
        offsets = bias_rows(self.window, x.device)
        maps = []
        for stage, norm in zip(self.layers, self.norms):
            x = stage(x, offsets)
            maps.append(norm(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the blocks' inputs alone for backward and compute the rest again there."""
        for stage in self.layers:
            stage.checkpointing = enable


def bias_rows(window: int, device: torch.device) -> Tensor:
    """[S, S] row of the bias table for a query (first) and a key of a window, S = window^2."""
    side = torch.arange(window, device=device)
    axis = side[:, None] - side + window - 1  # [W, W] of one axis
    both = axis[:, None, :, None] * (2 * window - 1) + axis[None, :, None, :]
    return both.reshape(window**2, window**2)
