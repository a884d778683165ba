"""MiT, the encoder of SegFormer: a pyramid whose attention reads fewer keys than it has queries.

    x = norm(conv(map before))                         patches that overlap: p x p, stride s < p
    x = x + proj(attention(q(n), kv(norm(sr(n)))))     n = norm(x)
    x = x + fc2(gelu(dwconv(fc1(norm(x)))))            both: a block
    map = norm(x)                                      ends a stage, and begins the next one

`sr`, a convolution whose stride is its side r, makes one token of r x r: as nothing overlaps it is
a product of tokens that are laid side by side. There are no positions: the 3 x 3 depthwise
convolution between the feed-forward layers sees the zeros around the map. All is channels last, so
that a token is a row of every product.
Letters: B image, C channels, H head, h w map size, N = h w tokens, M keys, r reduction.
Source: SegFormer (Xie et al., NeurIPS 2021), section 3.1. Weights start as in the original code.
"""

from itertools import accumulate
from operator import mul

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...ops import attention, dwconv3x3_gelu, linear
from .. import drop_path
from ..linear import Linear
from ..maps import keep_channels_last


class Attention(nn.Module):
    """Self-attention to keys and values of a map that is r times smaller.

    Args:
        channels: C.
        heads: H.
        reduction: r.
    """

    def __init__(self, channels: int, heads: int, reduction: int):
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q = Linear(channels, channels)
        self.kv = Linear(channels, 2 * channels)
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = nn.LayerNorm(channels)
        self.proj = Linear(channels, channels)

    def reduced(self, x: Tensor) -> Tensor:  # [B, h, w, C] -> [B, M, C]
        """The tokens that keys and values are made of; rows and columns beyond the last whole r
        are left out."""
        r = self.reduction
        if r == 1:
            return x.flatten(1, 2)
        b, h, w, c = x.shape
        x = x[:, : h // r * r, : w // r * r].view(b, h // r, r, w // r, r, c)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(b, -1, r * r * c)
        # a view where the weight is channels-last in memory
        weight = self.sr.weight.permute(0, 2, 3, 1).reshape(c, -1)
        return self.norm(linear(x, weight, self.sr.bias))

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:  # [B, h, w, C] -> [B N, C]
        q = self.q(x).flatten(1, 2).unflatten(2, (self.heads, -1))
        kv = self.kv(self.reduced(x)).unflatten(2, (2, self.heads, -1))
        return self.proj(attention(q, *kv.unbind(2)).flatten(0, 1), residual)


class Block(nn.Module):
    """Attention and a feed-forward network, each normalised before and added after.

    Args:
        channels: C.
        heads: H.
        reduction: r.
        mlp_ratio: width of the feed-forward network over C.
        drop_path: probability, for each image, that a branch is left out in training.
        eps: of the norms.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        reduction: int,
        mlp_ratio: int,
        drop_path: float,
        eps: float,
    ):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(channels, eps)
        self.attn = Attention(channels, heads, reduction)
        self.norm2 = nn.LayerNorm(channels, eps)
        hidden = mlp_ratio * channels
        self.mlp = nn.ModuleDict(
            {
                "fc1": Linear(channels, hidden),
                "dwconv": nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden),
                "fc2": Linear(hidden, channels),
            }
        )

    def forward(self, x: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
        """x [B, h, w, C] to [B, h, w, C]; `first` and `second` [B, 1, 1, 1] as `draw` gives."""
        x = drop_path.add(x, lambda flat: self.attn(self.norm1(x), flat), first)
        return drop_path.add(x, lambda flat: self._feed_forward(self.norm2(x), flat), second)

    def _feed_forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        conv = self.mlp["dwconv"]
        hidden = dwconv3x3_gelu(self.mlp["fc1"](x), conv.weight, conv.bias)
        return self.mlp["fc2"](hidden.flatten(0, 2), residual)


class Stage(nn.Module):
    """Patches of the map before, blocks, and a norm.

    Args:
        before: channels of the map before.
        channels: C.
        patch: side of a patch, odd.
        stride: from one patch to the next.
        heads: H.
        reduction: r.
        mlp_ratio: of the blocks.
        drop_path: of each block.
        eps: of the norms but those of the patches and of the keys.
    """

    def __init__(
        self,
        before: int,
        channels: int,
        patch: int,
        stride: int,
        heads: int,
        reduction: int,
        mlp_ratio: int,
        drop_path: list[float],
        eps: float,
    ):
        super().__init__()
        self.patch_embed = nn.ModuleDict(
            {
                "proj": nn.Conv2d(before, channels, patch, stride, patch // 2),
                "norm": nn.LayerNorm(channels),
            }
        )
        self.blocks = nn.ModuleList(
            Block(channels, heads, reduction, mlp_ratio, rate, eps) for rate in drop_path
        )
        self.norm = nn.LayerNorm(channels, eps)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:  # [B, before, H, W] -> [B, C, h, w]
        x = self.patch_embed["proj"](x).permute(0, 2, 3, 1)
        x = self.patch_embed["norm"](x)
        for block in self.blocks:
            inputs = (x, *drop_path.draw(block.drop_path, x.shape[0], x.device, block.training))
            if self.checkpointing and self.training:
                # nothing random is inside: a generator's state cannot be read in a CUDA graph
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        return self.norm(x).permute(0, 3, 1, 2)


class MiT(nn.Module):
    """Four maps of an image.

    Args:
        channels: of the maps.
        depths: blocks of each stage.
        heads: of each stage.
        reductions: r of each stage.
        mlp_ratios: width of the feed-forward networks of each stage over its channels.
        patches: sides of the patches of each stage, odd.
        steps: strides of each stage's patches.
        drop_path_rate: of the last block, in [0, 1); the first has 0, those between rise evenly.
        eps: of the norms of blocks and maps; those of patches and keys have PyTorch's 1e-5.
        in_chans: channels of the images.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (32, 64, 160, 256),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        heads: tuple[int, ...] = (1, 2, 5, 8),
        reductions: tuple[int, ...] = (8, 4, 2, 1),
        mlp_ratios: tuple[int, ...] = (4, 4, 4, 4),
        patches: tuple[int, ...] = (7, 3, 3, 3),
        steps: tuple[int, ...] = (4, 2, 2, 2),
        drop_path_rate: float = 0.0,
        eps: float = 1e-5,
        in_chans: int = 3,
    ):
        super().__init__()
        self.channels = tuple(channels)
        self.strides = tuple(accumulate(steps, mul))
        self.levels = tuple(f"stages.{i}" for i in range(len(channels)))
        rates = drop_path.rates(drop_path_rate, sum(depths))
        self.stages = nn.ModuleList(
            Stage(*sizes, [rates.pop(0) for _ in range(depth)], eps)
            for depth, *sizes in zip(
                *(depths, (in_chans, *channels), channels, patches, steps),
                *(heads, reductions, mlp_ratios),
            )
        )
        for module in self.modules():
            _initialise(module)
        keep_channels_last(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Runs the network.

        Args:
            x: [B, in_chans, H, W] floating, normalised; any size of which every stage leaves at
                least r rows and columns.

        Returns:
            maps [B, C_i, ceil(H / s_i), ceil(W / s_i)], finest first, channels last in memory.
        """
        x, maps = x.contiguous(memory_format=torch.channels_last), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the blocks' inputs alone for backward and compute the rest again there."""
        for stage in self.stages:
            stage.checkpointing = enable


def _initialise(module: nn.Module) -> None:
    """Linear weights from a normal of sigma 0.02 cut at 2, convolutions for an even variance of
    what leaves them, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.zeros_(module.bias)
