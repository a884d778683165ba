"""Vision Transformer encoder of patches, and the mask transformer that decodes them.

Letters: B image, H W image size (multiples of the patch size), N patch, D channels, K class.

    x = patches(image) + positions,  after the class token (and DeiT's distillation token)
    x = block(x)                                             of vit_block.py, again and again
    mask decoder:  masks[n, k] = layer_norm_k( (P x_n / |P x_n|) . (C c_k / |C c_k|) )

where x_n and c_k are patch and class embeddings that went through the decoder's blocks together.
Names of weights are those of the original code.
Source: Segmenter (Strudel et al., ICCV 2021), section 3; ViT (Dosovitskiy et al., ICLR 2021).
Differs: normalised embeddings divide by at least 1e-12, so that an embedding of zeros is no NaN.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops._library import is_exported
from ..runtime.constants import is_recording
from .drop_path import rates
from .linear import Linear
from .vit_block import Block


def blocks(dim: int, heads: int, depth: int, dropout: float, drop_path: float) -> nn.ModuleList:
    """`depth` pre-norm blocks with feed-forward networks of 4 x dim.

    Args:
        dropout: probability in attention weights, projections and feed-forward networks.
        drop_path: rate of dropped residual branches of the last block; grows linearly from 0.
    """
    return nn.ModuleList(Block(dim, heads, dropout, rate) for rate in rates(drop_path, depth))


def initialise(module: nn.Module) -> None:
    """Linear weights from a normal of sigma 0.02 cut at 2, biases 0, norms 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class ResizedPositions:
    """Position embeddings of grids of other sizes; what was resized last is kept."""

    def __init__(self):
        self._kept = (None, None, None)  # size and state, stored and resized embeddings

    def __call__(
        self, stored: Tensor, tokens: int, grid: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        """Resizes bilinearly.

        Args:
            stored: [1, tokens + h w, D], those of the tokens first, which stay.
            tokens: how many.
            grid: (h, w) of the stored ones.
            size: (h', w') wanted.

        Returns:
            [1, tokens + h' w', D].
        """
        keeps = not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or is_recording()
            or stored.is_inference()  # it counts no versions
        )
        key = (size, stored._version, stored.dtype, stored.data_ptr()) if keeps else None
        kept, source, found = self._kept  # at once: other threads may write it
        if keeps and kept == key and source is stored:
            return found
        front, maps = stored.split([tokens, grid[0] * grid[1]], 1)
        maps = maps.unflatten(1, grid).permute(0, 3, 1, 2)
        maps = F.interpolate(maps, size=size, mode="bilinear")
        found = torch.cat((front, maps.flatten(2).mT), 1)
        if keeps:
            self._kept = (key, stored, found)
        return found


class ViT(nn.Module):
    """Image to patch embeddings.

    Args:
        image_size: (H, W) that the position embeddings are stored for, multiples of patch_size.
        patch_size: side of a patch in pixels.
        dim: D.
        depth: number of blocks.
        heads: attention heads.
        distilled: with DeiT's distillation token.
        dropout: probability after the position embeddings and in the blocks.
        drop_path_rate: of the last block; grows linearly from 0.
        in_chans: channels of the images.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        distilled: bool = False,
        dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.tokens = 2 if distilled else 1
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)}
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
            nn.init.trunc_normal_(self.dist_token, std=0.02)
        count = self.tokens + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, count, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = blocks(dim, heads, depth, dropout, drop_path_rate)
        self.levels = tuple(f"blocks.{i}" for i in range(depth))
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(initialise)
        self.checkpointing = False  # keep the blocks' inputs alone, compute the rest again
        self._resized = ResizedPositions()

    def positions(self, h: int, w: int) -> Tensor:
        """Position embeddings [1, tokens + h w, D] of a grid of h x w patches.

        Resized bilinearly where the number of patches differs from the stored one; a grid of
        another shape with the same number takes them as they are, as the original does. An
        exported graph for any sides always resizes, which changes nothing at the stored grid.
        """
        any_sides = is_exported() and isinstance(h * w, torch.SymInt)
        if not any_sides and h * w == self.grid[0] * self.grid[1]:
            return self.pos_embed
        return self._resized(self.pos_embed, self.tokens, self.grid, (h, w))

    def forward(self, image: Tensor) -> Tensor:
        """Embeddings of all patches.

        Args:
            image: [B, in_chans, H, W], sides multiples of the patch size.

        Returns:
            [B, tokens + N, D], the patches row by row after the tokens.
        """
        x = self.patch_embed["proj"](image)
        h, w = x.shape[2:]
        tokens = [self.cls_token] + ([self.dist_token] if self.tokens == 2 else [])
        tokens = [token.expand(x.shape[0], -1, -1) for token in tokens]
        x = self.dropout(torch.cat((*tokens, x.flatten(2).mT), 1) + self.positions(h, w))
        for block in self.blocks:
            keeping = not (self.checkpointing and self.training)
            x = block(x) if keeping else checkpoint(block, x, use_reentrant=False)
        return self.norm(x)


@torch.no_grad()
def start_locally(encoder: ViT, gain: float = 1.0) -> None:
    """Weights from which half of the blocks, rounded up, mix patches as 3 x 3 convolutions do, and
    the others look at what is alike and near, for training from scratch.

    Positions are sines and cosines, of wavelengths that have no common period below 15 patches,
    in the first channels, where patches write nothing yet. A head of the first half of the blocks
    asks for one neighbour: its queries are positions turned by the step there, its keys positions
    as they are, so that q . k is largest where key - query is that step. In the other blocks q . k
    is x^T M x with M = 0.7 (Z / sqrt(D) + I), Z normal, by its singular values, as many as a head
    has channels. Values, their projections and the feed-forward networks start from normal weights
    wide enough to pass on what is seen.
    Sources: Structured Initialization for Attention in Vision Transformers (Zheng et al., 2024),
    where q and k are fitted to such maps and here are written down; Mimetic Initialization of
    Self-Attention Layers (Trockman and Kolter, ICML 2023).

    Args:
        encoder: its heads have at least 8 channels.
        gain: of the last layers of attention and feed-forward networks, which are added to the
            states.
    """
    D, n = encoder.pos_embed.shape[2], encoder.blocks[0].attn.head_dim
    rates = _rates(n)
    used = 4 * len(rates)  # channels of positions: sine and cosine of both axes
    positions = encoder.pos_embed[0, -encoder.grid[0] * encoder.grid[1] :]  # those of patches
    at = [torch.arange(n) for n in encoder.grid]
    positions.zero_()[:, :used] = _waves(at, rates).flatten(0, 1)
    encoder.patch_embed["proj"].weight[:used] = 0
    encoder.patch_embed["proj"].bias[:used] = 0
    sharp = (3 * n**0.5) ** 0.5  # of q and of k: turned alike, they meet at 3 times |position|^2
    for i, block in enumerate(encoder.blocks):
        attn = block.attn
        if i < (len(encoder.blocks) + 1) // 2:
            attn.qkv.weight[: 2 * D] = 0
            for head, first in enumerate(range(0, D, n)):
                turn = _turn(rates, _NEIGHBOURS[head % len(_NEIGHBOURS)])
                attn.qkv.weight[first : first + used, :used] = sharp * turn
                attn.qkv.weight[D + first : D + first + used, :used] = sharp * torch.eye(used)
        else:
            for first in range(0, D, n):
                m = 0.7 * (torch.randn(D, D) / D**0.5 + torch.eye(D))
                q, values, k = torch.linalg.svd(m)
                root = values[:n, None].sqrt()
                attn.qkv.weight[first : first + n] = root * q.T[:n]
                attn.qkv.weight[D + first : D + first + n] = root * k[:n]
        _widen(block, gain)


@torch.no_grad()
def start_at_places(queries: Tensor, encoder: ViT) -> None:
    """Queries that start with the positions of places spread evenly over the image, in rows of as
    many columns as rows or a few more, so that those of an encoder that starts locally look there.

    Args:
        queries: [Q, D], changed in place.
        encoder: after `start_locally`.
    """
    rates, count = _rates(encoder.blocks[0].attn.head_dim), len(queries)
    rows = math.isqrt(count)
    shape = rows, -(-count // rows)
    at = [(torch.arange(n) + 0.5) * side / n - 0.5 for n, side in zip(shape, encoder.grid)]
    waves = _waves(at, rates).flatten(0, 1)[:count]
    queries[:, : waves.shape[1]] = waves


def _widen(block: Block, gain: float) -> None:
    """Values, projections and feed-forward weights that pass on what comes, at any width."""
    D = block.attn.qkv.in_features
    nn.init.normal_(block.attn.qkv.weight[2 * D :], std=D**-0.5)
    for layer, by in ((block.attn.proj, gain), (block.mlp.fc1, 1.0), (block.mlp.fc2, gain)):
        nn.init.normal_(layer.weight, std=0.5 * by * layer.in_features**-0.5)


# rows and columns to the patches around one: the nearest first
_NEIGHBOURS = ((0, 1), (1, 0), (0, -1), (-1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))


def _rates(channels: int) -> list[float]:
    """Of the waves that fit into a head's channels."""
    return [2 * math.pi / wavelength for wavelength in (3, 5, 4, 7)[: channels // 4]]


def _waves(at: Sequence[Tensor], rates: list[float]) -> Tensor:
    """[h, w, 4 rates]: for each rate sine and cosine of the row, sine and cosine of the column, at
    rows [h] and columns [w]."""
    h, w = map(len, at)
    rows, columns = (x[:, None] * torch.tensor(rates) for x in at)
    rows, columns = (torch.stack((x.sin(), x.cos()), -1) for x in (rows, columns))
    rows, columns = rows[:, None].expand(h, w, -1, 2), columns.expand(h, w, -1, 2)
    return torch.stack((rows, columns), -2).flatten(2)


def _turn(rates: list[float], step: tuple[int, int]) -> Tensor:
    """[4 rates, 4 rates]: what takes the waves of a place to those of the place a step away."""
    angles = torch.tensor([rate * along for rate in rates for along in step])
    sine, cosine = angles.sin(), angles.cos()
    turns = torch.stack((cosine, sine, -sine, cosine), -1).view(-1, 2, 2)
    return torch.block_diag(*turns)


class LinearDecoder(nn.Module):
    """Class logits of each patch by one linear layer."""

    def __init__(self, dim: int, labels: int):
        super().__init__()
        self.head = Linear(dim, labels)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, K]."""
        return self.head(x)


class MaskTransformer(nn.Module):
    """Class logits of each patch by its similarity to class embeddings.

    Args:
        encoder_dim: channels of the encoder.
        dim: D.
        labels: K.
        depth: number of blocks; they have D // 64 heads, as the original has them.
        dropout: probability in the blocks.
        drop_path_rate: of the last block; grows linearly from 0.
    """

    def __init__(
        self,
        encoder_dim: int,
        dim: int,
        labels: int,
        depth: int = 2,
        dropout: float = 0.1,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.labels = labels
        self.blocks = blocks(dim, dim // 64, depth, dropout, drop_path_rate)
        self.cls_emb = nn.Parameter(torch.randn(1, labels, dim))
        self.proj_dec = Linear(encoder_dim, dim)
        self.proj_patch = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.proj_classes = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.decoder_norm = nn.LayerNorm(dim)
        self.mask_norm = nn.LayerNorm(labels)
        self.apply(initialise)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)

    def embeddings(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings of patches [B, N, D] and classes [B, K, D] from [B, N, encoder_dim]."""
        x = torch.cat((self.proj_dec(x), self.cls_emb.expand(x.shape[0], -1, -1)), 1)
        for block in self.blocks:
            x = block(x)
        patches, classes = self.decoder_norm(x).split([x.shape[1] - self.labels, self.labels], 1)
        patches, classes = patches @ self.proj_patch, classes @ self.proj_classes
        return F.normalize(patches, dim=-1), F.normalize(classes, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, encoder_dim] to [B, N, K]."""
        patches, classes = self.embeddings(x)
        return self.mask_norm(patches @ classes.mT)


@torch.no_grad()
def start_apart(decoder: MaskTransformer) -> None:
    """Weights from which the mask decoder compares patches with classes at right angles, for
    training from scratch.

    Blocks begin as the identity, so that patches stay apart; projections are rotations. From the
    small random embeddings that are usual, classes that are not told apart yet (all but the
    background) take the same steps, which soon are longer than what the embeddings differ by:
    they fall together, and patches with them. Norms take out the lengths of embeddings and
    projections, so starting four times as long only means that they turn more slowly. The last
    norm leaves a logit at most K / sqrt(K - 1) above the others; where that is less than 7, with
    fewer than 48 classes, its weights start larger.

    Args:
        decoder: its classes are at right angles if they are no more than its channels.
    """
    for block in decoder.blocks:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.orthogonal_(decoder.proj_dec.weight, gain=4)
    for projection in (decoder.proj_patch, decoder.proj_classes):
        projection.copy_(4 * torch.eye(len(projection)))
    nn.init.orthogonal_(decoder.cls_emb[0], gain=4 * decoder.cls_emb.shape[2] ** 0.5)
    K = decoder.labels
    lead = K / max(K - 1, 1) ** 0.5  # of one logit over the others, after the norm
    decoder.mask_norm.weight.fill_(max(1, 7 / lead))
