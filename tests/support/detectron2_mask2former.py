"""Mask2Former as its original code computes it on detectron2: plain PyTorch, slow, with the names
of the published checkpoints, so that a state dict of one loads strictly into the other.

Written from the papers' equations (Mask2Former, Deformable DETR, Swin, ResNet) and from what the
published checkpoints hold. What the papers leave open is as in the original: pictures are
zero-padded and padding is never masked; Swin pads a map to whole windows, rolls then, and keeps
odd blocks shifted and masked (-100) also where one window covers the whole map; the pixel decoder
has 4 points a level and a width of 1024 unless told otherwise; a query whose mask is closed
everywhere attends everywhere.
Letters: B picture, C channels, h w map, Q query, H head, D channels a head, P point, L level.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# --- backbones --------------------------------------------------------------------------------


class FrozenNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0)):
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        parts = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (t[:, None, None] for t in parts)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias


class ConvNorm(nn.Conv2d):
    """A convolution that has its norm inside."""

    def __init__(self, *sizes, norm, bias=False, **options):
        super().__init__(*sizes, bias=bias, **options)
        self.norm = norm

    def forward(self, x):
        return self.norm(super().forward(x))


class Bottleneck(nn.Module):
    def __init__(self, before, inner, after, stride):
        super().__init__()

        def conv(a, b, size, step=1):
            return ConvNorm(a, b, size, step, size // 2, norm=FrozenNorm(b))

        if before != after:
            self.shortcut = conv(before, after, 1, stride)
        self.conv1, self.conv3 = conv(before, inner, 1), conv(inner, after, 1)
        self.conv2 = conv(inner, inner, 3, stride)  # the stride is not in the first

    def forward(self, x):
        y = self.conv3(self.conv2(self.conv1(x).relu()).relu())
        return (y + (self.shortcut(x) if hasattr(self, "shortcut") else x)).relu()


class ResNet(nn.Module):
    def __init__(self, depths=(3, 4, 6, 3)):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = ConvNorm(3, 64, 7, 2, 3, norm=FrozenNorm(64))
        before, self.channels = 64, (256, 512, 1024, 2048)
        for i, (depth, after) in enumerate(zip(depths, self.channels)):
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(before, after // 4, after, 2 if i and not j else 1))
                before = after
            setattr(self, f"res{i + 2}", nn.Sequential(*blocks))

    def forward(self, x):
        x, maps = F.max_pool2d(self.stem.conv1(x).relu(), 3, 2, 1), []
        for i in range(2, 6):
            x = getattr(self, f"res{i}")(x)
            maps.append(x)
        return maps


def windows(x, W):
    """[B, h, w, C] to [windows, W W, C]."""
    B, h, w, C = x.shape
    return x.view(B, h // W, W, w // W, W, C).transpose(2, 3).reshape(-1, W * W, C)


class WindowAttention(nn.Module):
    def __init__(self, C, H, W):
        super().__init__()
        self.H, self.W = H, W
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * W - 1) ** 2, H) * 0.02)
        places = [(y, x) for y in range(W) for x in range(W)]
        rows = [
            [(qy - ky + W - 1) * (2 * W - 1) + qx - kx + W - 1 for ky, kx in places]
            for qy, qx in places
        ]
        self.register_buffer("relative_position_index", torch.tensor(rows))
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x, mask):  # [N, S, C], [windows of a picture, S, S] or None
        N, S, C = x.shape
        q, k, v = self.qkv(x).view(N, S, 3, self.H, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(C // self.H)
        table = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = scores + table.view(S, S, self.H).permute(2, 0, 1)
        if mask is not None:
            scores = (scores.view(-1, len(mask), self.H, S, S) + mask[:, None]).view_as(scores)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(N, S, C))


class SwinBlock(nn.Module):
    def __init__(self, C, H, W, shift):
        super().__init__()
        self.W, self.shift = W, shift
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = WindowAttention(C, H, W)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(C, 4 * C), "fc2": nn.Linear(4 * C, C)})

    def forward(self, x):  # [B, h, w, C]
        B, h, w, C = x.shape
        W, s = self.W, self.shift
        y = F.pad(self.norm1(x), (0, 0, 0, -w % W, 0, -h % W))
        H2, W2, mask = *y.shape[1:3], None
        if s:
            y = y.roll((-s, -s), (1, 2))
            # rows and columns fall into three bands; only places of the same two see each other
            bands = [torch.zeros(n, dtype=torch.int64) for n in (H2, W2)]
            for band in bands:
                band[-W:], band[-s:] = 1, 2
            region = (3 * bands[0][:, None] + bands[1])[None, :, :, None]
            region = windows(region, W)[..., 0]
            mask = -100.0 * (region[:, None] != region[:, :, None]).to(x.dtype)
        y = self.attn(windows(y, W), mask)
        y = y.view(B, H2 // W, W2 // W, W, W, C).transpose(2, 3).reshape(B, H2, W2, C)
        x = x + (y.roll((s, s), (1, 2)) if s else y)[:, :h, :w]
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Downsample(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * C), nn.Linear(4 * C, 2 * C, bias=False)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Swin(nn.Module):
    def __init__(self, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7):
        super().__init__()
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, embed_dim, 4, 4), "norm": nn.LayerNorm(embed_dim)}
        )
        self.channels = tuple(embed_dim * 2**i for i in range(4))
        self.layers = nn.ModuleList()
        for i, (C, depth, H) in enumerate(zip(self.channels, depths, num_heads)):
            stage = nn.Module()
            stage.blocks = nn.ModuleList(
                SwinBlock(C, H, window_size, window_size // 2 if j % 2 else 0)
                for j in range(depth)
            )
            if i < 3:
                stage.downsample = Downsample(C)
            self.layers.append(stage)
            setattr(self, f"norm{i}", nn.LayerNorm(C))

    def forward(self, x):
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        x, maps = self.patch_embed["norm"](self.patch_embed["proj"](x).permute(0, 2, 3, 1)), []
        for i, stage in enumerate(self.layers):
            for block in stage.blocks:
                x = block(x)
            maps.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2))
            if i < 3:
                x = stage.downsample(x)
        return maps


# --- pixel decoder ----------------------------------------------------------------------------


def sine_positions(h, w, C, like):
    """[C, h, w]: sines and cosines of y, then of x, both from just above 0 to 2 pi."""
    parts = []
    for n, shape in ((h, (h, 1)), (w, (1, w))):
        place = torch.arange(1, n + 1, dtype=like.dtype) / (n + 1e-6) * 2 * math.pi
        wave = 1e4 ** (2 * torch.arange(C // 4, dtype=like.dtype) / (C // 2))
        angle = place[:, None] / wave
        both = torch.stack((angle.sin(), angle.cos()), 2).flatten(1)  # [n, C / 2]
        parts.append(both.T.view(C // 2, *shape).expand(C // 2, h, w))
    return torch.cat(parts)


class DeformableAttention(nn.Module):
    def __init__(self, C, H, L=3, P=4):
        super().__init__()
        self.H, self.L, self.P = H, L, P
        self.sampling_offsets = nn.Linear(C, H * L * P * 2)
        self.attention_weights = nn.Linear(C, H * L * P)
        self.value_proj, self.output_proj = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, query, value, shapes):  # [B, S, C] both
        B, S, C = value.shape
        H, L, P = self.H, self.L, self.P
        value = self.value_proj(value).view(B, S, H, C // H)
        offsets = self.sampling_offsets(query).view(B, S, H, L, P, 2)
        weights = self.attention_weights(query).view(B, S, H, L * P).softmax(-1)
        centres = []
        for h, w in shapes:
            y, x = ((torch.arange(n, dtype=value.dtype) + 0.5) / n for n in (h, w))
            centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), 2).flatten(0, 1))
        centres = torch.cat(centres)[:, None, None]  # [S, 1, 1, 2]
        levels = value.split([h * w for h, w in shapes], 1)
        sampled = []
        for i, ((h, w), level) in enumerate(zip(shapes, levels)):
            size = torch.tensor([w, h], dtype=value.dtype)
            grid = (centres + offsets[:, :, :, i] / size) * 2 - 1  # [B, S, H, P, 2]
            grid = grid.transpose(1, 2).flatten(0, 1)
            maps = level.permute(0, 2, 3, 1).reshape(B * H, C // H, h, w)
            sampled.append(F.grid_sample(maps, grid, align_corners=False))  # [B H, D, S, P]
        sampled = torch.stack(sampled, 3).flatten(3)
        weights = weights.transpose(1, 2).reshape(B * H, 1, S, L * P)
        out = (sampled * weights).sum(-1)  # [B H, D, S]
        return self.output_proj(out.view(B, C, S).mT)


class EncoderLayer(nn.Module):
    def __init__(self, C, H, width):
        super().__init__()
        self.self_attn = DeformableAttention(C, H)
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.linear1, self.linear2 = nn.Linear(C, width), nn.Linear(width, C)

    def forward(self, x, positions, shapes):
        x = self.norm1(x + self.self_attn(x + positions, x, shapes))
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class PixelDecoder(nn.Module):
    def __init__(self, channels, C, M, layers, H, width):
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, C, 1), nn.GroupNorm(32, C)) for c in channels[:0:-1]
        )
        self.transformer = nn.Module()
        self.transformer.level_embed = nn.Parameter(torch.randn(3, C))
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(
            EncoderLayer(C, H, width) for _ in range(layers)
        )
        self.adapter_1 = ConvNorm(channels[0], C, 1, norm=nn.GroupNorm(32, C))
        self.layer_1 = ConvNorm(C, C, 3, padding=1, norm=nn.GroupNorm(32, C))
        self.mask_features = nn.Conv2d(C, M, 1)

    def forward(self, maps):
        """Mask features, and maps at strides 32, 16 and 8."""
        tokens, positions, shapes = [], [], []
        for i, (proj, x) in enumerate(zip(self.input_proj, maps[:0:-1])):
            x = proj(x)
            place = sine_positions(*x.shape[2:], x.shape[1], x)
            positions.append(place.flatten(1).T + self.transformer.level_embed[i])
            tokens.append(x.flatten(2).mT)
            shapes.append(tuple(x.shape[2:]))
        x, place = torch.cat(tokens, 1), torch.cat(positions)
        for layer in self.transformer.encoder.layers:
            x = layer(x, place, shapes)
        parts = x.split([h * w for h, w in shapes], 1)
        levels = [part.mT.unflatten(2, shape) for part, shape in zip(parts, shapes)]
        fine = self.adapter_1(maps[0])
        fine = fine + F.interpolate(levels[-1], fine.shape[2:], mode="bilinear")
        return self.mask_features(self.layer_1(fine).relu()), levels


# --- query decoder ----------------------------------------------------------------------------


class Attending(nn.Module):
    """nn.MultiheadAttention under the name that it has in the file, and the norm after it."""

    def __init__(self, name, C, H):
        super().__init__()
        self.name = name
        setattr(self, name, nn.MultiheadAttention(C, H, batch_first=True))
        self.norm = nn.LayerNorm(C)

    def forward(self, x, q, k, v, blocked=None):
        return self.norm(x + getattr(self, self.name)(q, k, v, attn_mask=blocked)[0])


class FeedForward(nn.Module):
    def __init__(self, C, width):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(C, width), nn.Linear(width, C)
        self.norm = nn.LayerNorm(C)

    def forward(self, x):
        return self.norm(x + self.linear2(self.linear1(x).relu()))


class Predictor(nn.Module):
    def __init__(self, K, C, M, Q, layers, H, width):
        super().__init__()
        self.H = H

        def several(make):
            return nn.ModuleList(make() for _ in range(layers))

        self.transformer_self_attention_layers = several(lambda: Attending("self_attn", C, H))
        self.transformer_cross_attention_layers = several(
            lambda: Attending("multihead_attn", C, H)
        )
        self.transformer_ffn_layers = several(lambda: FeedForward(C, width))
        self.decoder_norm = nn.LayerNorm(C)
        self.query_feat, self.query_embed = nn.Embedding(Q, C), nn.Embedding(Q, C)
        self.level_embed = nn.Embedding(3, C)
        self.class_embed = nn.Linear(C, K + 1)
        self.mask_embed = nn.Module()
        self.mask_embed.layers = nn.ModuleList(nn.Linear(C, n) for n in (C, C, M))

    def predict(self, x, features, size):
        """Class logits, mask logits, and what the next layer may not see, [B H, Q, h w]."""
        x = self.decoder_norm(x)
        first, second, third = self.mask_embed.layers
        embedding = third(second(first(x).relu()).relu())
        masks = torch.einsum("bqm,bmhw->bqhw", embedding, features)
        small = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        blocked = (small.sigmoid() < 0.5).flatten(2)
        blocked &= ~blocked.all(-1, keepdim=True)
        return self.class_embed(x), masks, blocked.repeat_interleave(self.H, 0)

    def forward(self, features, levels):
        B = len(features)
        place = self.query_embed.weight.expand(B, -1, -1)
        x = self.query_feat.weight.expand(B, -1, -1)
        out = [self.predict(x, features, levels[0].shape[2:])]
        for i, feed in enumerate(self.transformer_ffn_layers):
            level = levels[i % 3]
            tokens = level.flatten(2).mT + self.level_embed.weight[i % 3]
            where = sine_positions(*level.shape[2:], level.shape[1], level).flatten(1).T
            cross = self.transformer_cross_attention_layers[i]
            x = cross(x, x + place, tokens + where, tokens, out[-1][2])
            x = self.transformer_self_attention_layers[i](x, x + place, x + place, x)
            x = feed(x)
            following = levels[(i + 1) % 3].shape[2:]
            out.append(self.predict(x, features, following))
        return [(classes, masks) for classes, masks, _ in out]


class Mask2Former(nn.Module):
    """From [B, 3, height, width] to class logits [B, Q, K + 1] and mask logits [B, Q, h, w] of
    every prediction."""

    def __init__(
        self, backbone, K, C=256, M=256, Q=100, encoder=6, decoder=9, H=8, inner=1024, width=2048
    ):
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.pixel_decoder = PixelDecoder(backbone.channels, C, M, encoder, H, inner)
        self.sem_seg_head.predictor = Predictor(K, C, M, Q, decoder, H, width)
        self.criterion = nn.Module()
        weight = torch.ones(K + 1)
        weight[-1] = 0.1
        self.criterion.register_buffer("empty_weight", weight)

    def forward(self, x):
        return self.sem_seg_head.predictor(*self.sem_seg_head.pixel_decoder(self.backbone(x)))
