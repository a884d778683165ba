"""Swin: a hierarchical transformer whose attention stays in windows, every other block shifted.

    y = x + proj(attention(norm(x)))        in windows of W x W tokens of the padded, rolled map
    z = y + mlp(norm(y))
    attention = softmax(q k^T / sqrt(D) + bias[offset of key to query] + mask) v

Letters: B image, H head, D channels a head, C channels, h w map size, N window, W window's side,
S = W W tokens of a window, T tokens of all images.

Padding, shift, partition into windows and split into heads are one gather of rows of D channels,
after the projection to q, k and v, so that no padded token is projected: they all are the one
zero row behind the tokens. The gradient of a gather is the gather back. Attention is two plain
products: on windows of 49 tokens PyTorch's fused one takes 1.4 times as long on a CPU.
Source: Swin Transformer (Liu et al., ICCV 2021). As in the published segmentation checkpoints
(detectron2's and transformers' alike, and unlike timm) maps are padded first and rolled then,
and odd blocks are shifted even where one window covers the whole map.
"""

import math
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import feed_forward

VARIANTS = {
    "swin_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "swin_small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
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
BLOCKED = -100.0  # added where two tokens of a window are no neighbours on the map


class Windows(NamedTuple):
    """Where the T tokens of B maps of h x w go when they are cut into windows.

    Attributes:
        token: [B N S] the token at each place of the windows; T, the zero row, at padding.
        place: [B N S] the place of each token, then those of the padding.
        count: T.
        into: [3 B N H S] rows of q, k, v [T (+ 1), 3, H, D] in the order [3, B N, H, S].
        back: [T H] rows of windows [B N, H, S, D] in the order [T, H].
        grid: images, rows and columns of windows.
    """

    token: Tensor
    place: Tensor
    count: int
    into: Tensor
    back: Tensor
    grid: tuple[int, int, int]


def cut(
    b: int, h: int, w: int, side: int, shift: int, heads: int, device: torch.device
) -> Windows:
    """The windows of maps that are padded at the right and below, then rolled by `shift`."""
    rows, columns, count = -(-h // side), -(-w // side), b * h * w
    image = torch.arange(b, device=device)[:, None, None]
    y = torch.arange(rows * side, device=device)[:, None]
    x = torch.arange(columns * side, device=device)

    from_y, from_x = (y + shift) % (rows * side), (x + shift) % (columns * side)
    inside = (from_y < h) & (from_x < w)
    token = torch.where(inside, (image * h + from_y) * w + from_x, count)
    token = token.view(b, rows, side, columns, side).transpose(2, 3).flatten()

    to_y, to_x = (y - shift) % (rows * side), (x - shift) % (columns * side)
    place = (image * rows + to_y // side) * columns + to_x // side
    place = (place * side + to_y % side) * side + to_x % side
    parts = place[:, :h, :w], place[:, h:], place[:, :h, w:]
    place = torch.cat([part.flatten() for part in parts])
    into = window_rows(token, side, 3, heads)
    back = token_rows(place[:count], b * rows * columns, side, 1, heads)
    return Windows(token, place, count, into, back, (b, rows, columns))


def window_rows(token: Tensor, side: int, groups: int, heads: int) -> Tensor:
    """Rows of [T, groups, H, D] in the order [groups, B N, H, S]; token [B N S]."""
    inner = torch.arange(groups * heads, device=token.device).view(groups, 1, heads, 1)
    return (token.view(-1, 1, side * side) * (groups * heads) + inner).flatten()


def token_rows(place: Tensor, windows: int, side: int, groups: int, heads: int) -> Tensor:
    """Rows of [groups, B N, H, S, D] in the order [T, groups, H]; place [T]."""
    size = side * side
    start = (place // size * heads * size + place % size)[:, None]
    inner = torch.arange(groups * heads, device=place.device)
    inner = inner // heads * (windows * heads * size) + inner % heads * size
    return (start + inner).flatten()


class _ToWindows(torch.autograd.Function):
    """Tokens [T (+ 1), 3 H D] to windows [3, B N, H, S, D]."""

    @staticmethod
    def forward(ctx, tokens, into, place, side, heads):
        ctx.save_for_backward(place)
        ctx.sizes = tokens.shape[0], side, heads
        d = tokens.shape[1] // (3 * heads)
        return tokens.view(-1, d).index_select(0, into).view(3, -1, heads, side * side, d)

    @staticmethod
    def backward(ctx, grad):
        (place,), (count, side, heads) = ctx.saved_tensors, ctx.sizes
        rows = token_rows(place, grad.shape[1], side, 3, heads)
        out = grad.reshape(-1, grad.shape[-1]).index_select(0, rows).view(place.numel(), -1)
        # without padding this is the last token itself; with it, the zero row shared by all
        out[count - 1] = out[count - 1 :].sum(0)
        return out[:count], None, None, None, None


class _ToTokens(torch.autograd.Function):
    """Windows [B N, H, S, D] to tokens [T, H D]; what lies at padding is dropped."""

    @staticmethod
    def forward(ctx, windows, back, token, count):
        ctx.save_for_backward(token)
        ctx.shape = windows.shape
        d = windows.shape[-1]
        return windows.view(-1, d).index_select(0, back).view(count, -1)

    @staticmethod
    def backward(ctx, grad):
        (token,), (_, heads, size, d) = ctx.saved_tensors, ctx.shape
        if token.numel() > grad.shape[0]:
            grad = F.pad(grad, (0, 0, 0, 1))
        rows = window_rows(token, math.isqrt(size), 1, heads)
        return grad.reshape(-1, d).index_select(0, rows).view(ctx.shape), None, None, None


class WindowAttention(nn.Module):
    """Self-attention in windows, with a learned bias for each offset of key to query.

    Args:
        channels: C = H D.
        heads: H.
        window: W.
    """

    def __init__(self, channels: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.scale = (channels // heads) ** -0.5
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(
        self,
        x: Tensor,  # [T, C]
        windows: Windows,
        offsets: Tensor,  # [S, S] rows of the bias table
        edges: Tensor | None,  # [2, S, S] what to add in the last row and column of windows
    ) -> Tensor:  # [T, C]
        token, place, count, into, back, grid = windows
        padded = token.numel() > count
        qkv = self.qkv(F.pad(x, (0, 0, 0, 1)) if padded else x)
        q, k, v = _ToWindows.apply(qkv, into, place, self.window, self.heads)
        bias = F.embedding(offsets, self.relative_position_bias_table).permute(2, 0, 1)
        scores = torch.add(bias.contiguous(), q @ k.transpose(-1, -2), alpha=self.scale)
        if edges is not None:
            last = scores.view(*grid, *scores.shape[1:])
            last[:, -1] += edges[0]
            last[:, :, -1] += edges[1]
        out = scores.softmax(-1).to(v.dtype) @ v
        return self.proj(_ToTokens.apply(out, back, token, count))


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
        self.shifted, self.drop_path = shifted, drop_path
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(channels, 4 * channels), "fc2": nn.Linear(4 * channels, channels)}
        )

    def forward(
        self, x: Tensor, windows: Windows, offsets: Tensor, edges: Tensor | None
    ) -> Tensor:  # [T, C]
        images = windows.grid[0]
        x = x + self._drop(self.attn(self.norm1(x), windows, offsets, edges), images)
        fc1, fc2 = self.mlp["fc1"], self.mlp["fc2"]
        hidden = feed_forward(self.norm2(x), fc1.weight, fc1.bias, fc2.weight, fc2.bias, "gelu")
        return x + self._drop(hidden, images)

    def _drop(self, x: Tensor, images: int) -> Tensor:
        """Stochastic depth (Huang et al., ECCV 2016) of a branch [T, C]."""
        if not self.training or self.drop_path == 0:
            return x
        keep = torch.rand(images, 1, 1, device=x.device) >= self.drop_path
        return (
            x.view(images, -1, x.shape[1]) * (keep / (1 - self.drop_path)).to(x.dtype)
        ).view_as(x)


class Downsample(nn.Module):
    """Joins each 2 x 2 tokens to one of twice the channels.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, h, w, C] -> [B, ceil(h/2), ceil(w/2), 2 C]
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
        self.heads, self.window = heads, window
        self.blocks = nn.ModuleList(
            Block(channels, heads, window, i % 2 == 1, rate) for i, rate in enumerate(drop_path)
        )
        self.downsample = None if last else Downsample(channels)

    def forward(self, x: Tensor, offsets: Tensor, edges: Tensor) -> Tensor:  # [B, h, w, C]
        shape, x = x.shape, x.flatten(0, 2)
        cuts = [
            cut(*shape[:3], self.window, shift, self.heads, x.device)
            for shift in (0, self.window // 2)[: len(self.blocks)]
        ]
        for block in self.blocks:
            windows = cuts[block.shifted]
            x = block(x, windows, offsets, edges if block.shifted else None)
        return x.view(shape)


class Swin(nn.Module):
    """Four maps of an image, at strides 4, 8, 16 and 32.

    Args:
        embed_dim: channels of the finest map; each next one has twice as many.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        window_size: W.
        drop_path_rate: of the last block, in [0, 1); the first has 0, those between rise evenly.

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
        for channels, heads in zip(self.channels, num_heads):
            if channels % heads:
                raise ValueError(
                    f"Swin: num_heads must divide the channels {self.channels}, got {num_heads}"
                )
        self.window = window_size
        self.patch_embed = nn.ModuleDict(
            {
                "proj": nn.Conv2d(3, embed_dim, PATCH, stride=PATCH),
                "norm": nn.LayerNorm(embed_dim),
            }
        )
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
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
            x: [B, 3, H, W] floating, normalised; any size, zero-padded to a multiple of 4.

        Returns:
            maps [B, C_i, ceil(H / s_i), ceil(W / s_i)], finest first, channels last in memory.
        """
        # the size is a constant of a compiled graph: symbols in the cuts take minutes to compile
        h, w = operator.index(x.shape[2]), operator.index(x.shape[3])
        if h % PATCH or w % PATCH:
            x = F.pad(x, (0, -w % PATCH, 0, -h % PATCH))
        x = self.patch_embed["proj"](x).permute(0, 2, 3, 1)
        x = self.patch_embed["norm"](x)
        offsets, edges = self._offsets(x.device), self._edges(x.device, x.dtype)
        maps = []
        for stage, norm in zip(self.layers, self.norms):
            x = stage(x, offsets, edges)
            maps.append(norm(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def _offsets(self, device: torch.device) -> Tensor:
        """[S, S] row of the bias table for a query (first) and a key."""
        side = torch.arange(self.window, device=device)
        axis = side[:, None] - side + self.window - 1  # [W, W] of one axis
        both = axis[:, None, :, None] * (2 * self.window - 1) + axis[None, :, None, :]
        return both.reshape(self.window**2, self.window**2)

    def _edges(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[2, S, S]: in the last row, and column, of shifted windows tokens from the two ends of
        the map meet; where both differ the sum blocks as well."""
        place = torch.arange(self.window**2, device=device)
        wrapped = torch.stack((place // self.window, place % self.window)) >= (
            self.window - self.window // 2
        )
        differ = wrapped[:, :, None] != wrapped[:, None, :]
        return differ.to(dtype) * BLOCKED
