"""DiNAT: a hierarchical transformer whose pixels attend to their neighbours, near and far in turn.

    y = x + gamma1 proj(attention(norm(x)))     of K x K pixels, t apart (`ops.neighborhood_attn`)
    z = y + gamma2 mlp(norm(y))

Letters: B image, H head, C channels, h w map size, K kernel, t dilation.

A map with fewer than K t rows or columns is padded with zeros, at the right and below, after the
norm and before the projection to q, k and v: there a padded pixel is that projection's bias, and
attends and is attended to as others are; what comes of it is cut off.
Source: Dilated Neighborhood Attention Transformer (Hassani and Shi, 2022), and for segmentation
its Mask2Former and OneFormer. transformers' DiNAT gives its attention the axes in another order
than that asks for, and cannot run today; a test compares with it where that is put right.
"""

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...ops import feed_forward, linear, neighborhood_attn
from .. import drop_path
from ..linear import Linear
from ..recompute import recomputed
from .swin import WIDE

VARIANTS = {
    "dinat_mini": {
        "embed_dim": 64,
        "depths": (3, 4, 6, 5),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratio": 3.0,
    },
    "dinat_tiny": {
        "embed_dim": 64,
        "depths": (3, 4, 18, 5),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratio": 3.0,
    },
    "dinat_small": {
        "embed_dim": 96,
        "depths": (3, 4, 18, 5),
        "num_heads": (3, 6, 12, 24),
        "mlp_ratio": 2.0,
    },
    "dinat_base": {
        "embed_dim": 128,
        "depths": (3, 4, 18, 5),
        "num_heads": (4, 8, 16, 32),
        "mlp_ratio": 2.0,
        "layer_scale": 1e-5,
    },
    "dinat_large": {
        "embed_dim": 192,
        "depths": (3, 4, 18, 5),
        "num_heads": (6, 12, 24, 48),
        "mlp_ratio": 2.0,
    },
}
FAR = (8, 4, 2, 1)  # dilations of every other block of the four stages, for images of 224 x 224


def usual_dilations(depths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Those of the paper's classifiers: 1 and the stage's largest in turn."""
    return tuple(
        tuple(far if i % 2 else 1 for i in range(depth)) for far, depth in zip(FAR, depths)
    )


def _listed(value):
    """Lists for tuples, as JSON has them."""
    return [_listed(v) for v in value] if isinstance(value, (tuple, list)) else value


def arguments(name: str, options: dict) -> dict:
    """The arguments of `Dinat` for a variant with options, none left open."""
    usual = {"kernel_size": 7, "dilations": None, "layer_scale": 0.0}
    found = usual | VARIANTS[name] | options
    if found["dilations"] is None:
        found["dilations"] = usual_dilations(found["depths"])
    return {key: _listed(value) for key, value in found.items()}


def settings(found: dict) -> dict:
    """backbone and backbone_options of a model's config, for arguments of `Dinat`."""
    found = {key: _listed(value) for key, value in found.items()}
    for name in VARIANTS:
        own = arguments(name, {})
        options = {key: v for key, v in arguments(name, found).items() if v != own[key]}
        if not options.keys() - {"kernel_size", "dilations"}:
            return {"backbone": name, "backbone_options": options}
    return {"backbone": "dinat_tiny", "backbone_options": found}


def _scaled(layer: nn.Module, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer whose result is multiplied with gamma [C], if any."""
    if gamma is None:
        return layer.weight, layer.bias
    return gamma[:, None] * layer.weight, gamma * layer.bias


class NeighborhoodAttention(nn.Module):
    """Self-attention of each pixel to those around it, with a learned bias for each offset.

    Args:
        channels: C.
        heads: H.
        kernel: K.
        dilation: t.
    """

    def __init__(self, channels: int, heads: int, kernel: int, dilation: int):
        super().__init__()
        self.heads, self.kernel, self.dilation = heads, kernel, dilation
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel - 1, 2 * kernel - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(
        self,
        x: Tensor,  # [B, h, w, C]
        norm: nn.LayerNorm,  # of x
        gamma: Tensor | None,  # [C]
        residual: Tensor | None,  # [B h w, C], added
    ) -> Tensor:  # [B h w, C]
        if x.shape[3] < WIDE:
            out = recomputed(self._attend, x, norm)
        else:
            out = self._attention(recomputed(self._project, x, norm))
        out = out[:, : x.shape[1], : x.shape[2]]
        return linear(out.flatten(0, 2).flatten(1), *_scaled(self.proj, gamma), residual=residual)

    def _attend(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        return self._attention(self._project(x, norm))

    def _project(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """[B, h, w, C] to [B, h, w, 3 C], h and w at least K t."""
        least = self.kernel * self.dilation
        below, right = (torch.sym_max(0, least - side) for side in x.shape[1:3])
        x = norm(x)
        # in a graph for any sides they are expressions, of which nothing is asked
        if not (isinstance(below, int) and isinstance(right, int)) or below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        return self.qkv(x)

    def _attention(self, qkv: Tensor) -> Tensor:  # [B, h, w, 3 C] to [B, h, w, H, C / H]
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(3)
        return neighborhood_attn(q, k, v, self.rpb, self.kernel, self.dilation)


class Block(nn.Module):
    """Attention to neighbours and a feed-forward network, each normalised before and added after.

    Args:
        channels: C.
        heads: H.
        kernel: K.
        dilation: t.
        hidden: channels of the feed-forward network's hidden layer.
        layer_scale: what gamma1 and gamma2 start from; 0 for none.
        drop_path: probability, for each image, that a branch is left out in training.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        kernel: int,
        dilation: int,
        hidden: int,
        layer_scale: float,
        drop_path: float,
    ):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(channels)
        self.attn = NeighborhoodAttention(channels, heads, kernel, dilation)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.ModuleDict(
            {"fc1": Linear(channels, hidden), "fc2": Linear(hidden, channels)}
        )
        for name in ("gamma1", "gamma2"):
            start = nn.Parameter(torch.full((channels,), layer_scale)) if layer_scale else None
            self.register_parameter(name, start)

    def forward(
        self,
        x: Tensor,  # [B, h, w, C]
        first: Tensor | None,  # [B, 1, 1, 1]
        second: Tensor | None,  # [B, 1, 1, 1]
    ) -> Tensor:  # [B, h, w, C]
        x = drop_path.add(x, lambda flat: self.attn(x, self.norm1, self.gamma1, flat), first)
        weights = *_scaled(self.mlp["fc1"], None), *_scaled(self.mlp["fc2"], self.gamma2)
        norm = (self.norm2.weight, self.norm2.bias, self.norm2.eps)
        mlp = functools.partial(feed_forward, x.flatten(0, 2), *weights, "gelu", norm=norm)
        return drop_path.add(x, lambda flat: mlp(residual=flat), second)


class Downsample(nn.Module):
    """A 3 x 3 convolution with stride 2, to twice the channels, and its norm.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.reduction = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, h, w, C] -> [B, ceil(h/2), ceil(w/2), 2 C]
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks of one resolution, and the way to the next.

    Args:
        channels: C.
        heads: H.
        kernel: K.
        dilations: t of each block.
        hidden: channels of the feed-forward networks' hidden layers.
        layer_scale: of the blocks.
        drop_path: of each block.
        last: whether there is no next stage.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        kernel: int,
        dilations: tuple[int, ...],
        hidden: int,
        layer_scale: float,
        drop_path: list[float],
        last: bool,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(channels, heads, kernel, dilation, hidden, layer_scale, rate)
            for dilation, rate in zip(dilations, drop_path, strict=True)
        )
        self.downsample = None if last else Downsample(channels)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:  # [B, h, w, C]
        for block in self.blocks:
            drawn = drop_path.draw(block.drop_path, x.shape[0], x.device, block.training)
            if self.checkpointing and self.training:
                # nothing random is inside: a generator's state cannot be read in a CUDA graph
                x = checkpoint(block, x, *drawn, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *drawn)
        return x


class Dinat(nn.Module):
    """Four maps of an image, at strides 4, 8, 16 and 32.

    Args:
        embed_dim: channels of the finest map; each next one has twice as many.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        kernel_size: K, odd.
        dilations: for each stage those of its blocks; None for `usual_dilations`. A map that they
            exceed, with K, is padded.
        mlp_ratio: hidden channels of the feed-forward networks, times C.
        layer_scale: what a weight of each channel of both branches starts from; 0 for none.
        drop_path_rate: of the last block, in [0, 1); the first has 0, those between rise evenly.
        in_chans: channels of the images.

    Raises:
        ValueError: not four stages, channels that the heads do not divide, an even kernel,
            dilations of another number of blocks, or a rate of 1.
    """

    def __init__(
        self,
        embed_dim: int = 64,
        depths: tuple[int, int, int, int] = (3, 4, 18, 5),
        num_heads: tuple[int, int, int, int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: tuple[tuple[int, ...], ...] | None = None,
        mlp_ratio: float = 3.0,
        layer_scale: float = 0.0,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
    ):
        super().__init__()
        if len(depths) != 4 or len(num_heads) != 4:
            raise ValueError(
                f"Dinat: depths and num_heads must have four entries, got {depths}, {num_heads}"
            )
        dilations = usual_dilations(depths) if dilations is None else dilations
        if [len(stage) for stage in dilations] != list(depths):
            raise ValueError(
                f"Dinat: dilations must have one entry a block, {depths}, got {dilations}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"Dinat: kernel_size must be odd, got {kernel_size}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"Dinat: drop_path_rate must be in [0, 1), got {drop_path_rate}")
        self.channels = tuple(embed_dim * 2**i for i in range(4))
        self.strides = (4, 8, 16, 32)
        self.levels = tuple(f"layers.{i}" for i in range(4))
        for channels, heads in zip(self.channels, num_heads):
            if channels % heads:
                raise ValueError(
                    f"Dinat: num_heads must divide the channels {self.channels}, got {num_heads}"
                )
        stem = (
            nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1),
        )
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Sequential(*stem), "norm": nn.LayerNorm(embed_dim)}
        )
        rates = drop_path.rates(drop_path_rate, sum(depths))
        self.layers = nn.ModuleList(
            Stage(
                *(c, heads, kernel_size, stage, int(mlp_ratio * c), layer_scale),
                [rates.pop(0) for _ in stage],
                i == 3,
            )
            for i, (c, heads, stage) in enumerate(zip(self.channels, num_heads, dilations))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.to(memory_format=torch.channels_last)  # as the maps are

    def forward(self, x: Tensor) -> list[Tensor]:
        """Runs the network.

        Args:
            x: [B, in_chans, H, W] floating, normalised; any size.

        Returns:
            maps [B, C_i, ceil(H / s_i), ceil(W / s_i)], finest first, channels last in memory.
        """
        # the size is a constant of a compiled graph, as of Swin's
        for side in x.shape[2:]:
            operator.index(side)
        x = self.patch_embed["proj"](x.contiguous(memory_format=torch.channels_last))
        x = self.patch_embed["norm"](x.permute(0, 2, 3, 1))
        maps = []
        for stage, norm in zip(self.layers, self.norms):
            x = stage(x)
            maps.append(norm(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the blocks' inputs alone for backward and compute the rest again there."""
        for stage in self.layers:
            stage.checkpointing = enable
