"""Segmenter, and timm's ViT under a plain decoder with the same weights, for the benchmarks.

Run as a script it is the process of its own that `peak_memory` starts.

Letters: B image, N token of the encoder, D channels, K class.
"""

import json
import sys
from dataclasses import replace

import _models
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from segkern.models.segmenter.config import SegmenterConfig
from segkern.models.segmenter.model import Segmenter

TINY = SegmenterConfig(  # runs in a moment
    num_labels=5, image_size=(32, 32), patch_size=8, embed_dim=64, depth=1, num_heads=1,
    decoder_layers=1, window_size=32, window_stride=32,
)  # fmt: skip


class Plain(nn.Module):
    """timm's ViT, then the decoder as the paper writes it; logits at full size, then argmax.

    Args:
        ours: the model whose configuration and weights it gets; not of a DeiT.
    """

    def __init__(self, ours: Segmenter):
        super().__init__()
        c = ours.config
        self.encoder = VisionTransformer(
            img_size=c.image_size,
            patch_size=c.patch_size,
            embed_dim=c.embed_dim,
            depth=c.depth,
            num_heads=c.num_heads,
            num_classes=0,
            global_pool="",
            drop_path_rate=c.drop_path_rate,
            norm_layer=nn.LayerNorm,  # eps 1e-5 as the original, where timm's ViT has 1e-6
        )
        self.encoder.load_state_dict(ours.encoder.state_dict())
        kind = PlainLinear if c.decoder == "linear" else PlainMaskTransformer
        self.decoder = kind(c)
        self.decoder.load_state_dict(ours.decoder.state_dict())
        self.size = c.image_size
        self.grid = [n // c.patch_size for n in c.image_size]

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] to [B, K, H, W]
        x = self.decoder(self.encoder(x)[:, 1:])
        # the original leaves the classes last in memory, where resize and argmax take five times
        # as long
        x = x.transpose(1, 2).reshape(len(x), -1, *self.grid).contiguous()
        return F.interpolate(x, size=self.size, mode="bilinear")


class PlainLinear(nn.Module):
    def __init__(self, c: SegmenterConfig):
        super().__init__()
        self.head = nn.Linear(c.embed_dim, c.num_labels)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] to [B, N, K]
        return self.head(x)


class PlainMaskTransformer(nn.Module):
    def __init__(self, c: SegmenterConfig):
        super().__init__()
        D, self.K = c.embed_dim, c.num_labels
        drop = {"proj_drop": c.decoder_dropout, "attn_drop": c.decoder_dropout}
        self.blocks = nn.ModuleList(
            Block(D, D // 64, qkv_bias=True, norm_layer=nn.LayerNorm, **drop)
            for _ in range(c.decoder_layers)
        )
        self.cls_emb = nn.Parameter(torch.zeros(1, self.K, D))
        self.proj_dec = nn.Linear(D, D)
        self.proj_patch = nn.Parameter(torch.zeros(D, D))
        self.proj_classes = nn.Parameter(torch.zeros(D, D))
        self.decoder_norm = nn.LayerNorm(D)
        self.mask_norm = nn.LayerNorm(self.K)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] to [B, N, K]
        x = torch.cat((self.proj_dec(x), self.cls_emb.expand(len(x), -1, -1)), 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches, classes = x[:, : -self.K] @ self.proj_patch, x[:, -self.K :] @ self.proj_classes
        patches = patches / patches.norm(dim=-1, keepdim=True)
        classes = classes / classes.norm(dim=-1, keepdim=True)
        return self.mask_norm(patches @ classes.transpose(1, 2))


def config(name: str, size: int | None = None, patch: int | None = None) -> SegmenterConfig:
    """A preset, or "tiny", for square images of `size` and with patches of `patch` pixels."""
    c = TINY if name == "tiny" else SegmenterConfig.preset(name)
    side, p = size or c.image_size[0], patch or c.patch_size
    side = {"image_size": (side, side), "window_size": side, "window_stride": side}
    return replace(c, **side, patch_size=p, backbone=None)


def flops(c: SegmenterConfig) -> tuple[int, int]:
    """What one image takes, forward: FLOP of attention, which grow with N^2, and of the rest,
    which grows with N; multiplications and additions of matrix products only."""
    D, K = c.embed_dim, c.num_labels
    patches = (c.image_size[0] // c.patch_size) * (c.image_size[1] // c.patch_size)
    layers = [(c.depth, patches + (2 if c.distilled else 1))]
    rest = 2 * patches * 3 * c.patch_size**2 * D
    if c.decoder == "linear":
        rest += 2 * patches * D * K
    else:
        layers.append((c.decoder_layers, patches + K))
        rest += 2 * patches * D * D + 2 * (patches + K) * D * D + 2 * patches * D * K
    attention = sum(depth * 4 * n * n * D for depth, n in layers)
    return attention, rest + sum(depth * 24 * n * D * D for depth, n in layers)


def build(
    impl, name, kind, size, batch, dtype="float32", device="cpu", compiled=False, patch=None
):
    """The function to time: images to label maps, or a training step with SGD.

    Args:
        impl: "segkern" or "timm".
        name, size, patch: as `config` takes them.
        kind: "inference" or "training step".
    """
    torch.manual_seed(0)
    c = config(name, size, patch)
    model = Segmenter(c)
    if impl == "timm":
        model = Plain(model)
    model = model.eval().to(device)
    x = torch.randn(batch, 3, *c.image_size, device=device)
    autocast = torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32")
    call = torch.compile(model) if compiled else model
    if kind == "inference":

        @torch.inference_mode()
        def run():
            with autocast:
                return call(x).argmax(1) if impl == "timm" else model.label_map(x)

        return run
    labels = torch.randint(0, c.num_labels, (batch, *c.image_size), device=device)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step():
        optimizer.zero_grad()
        with autocast:
            if impl == "timm":
                loss = F.cross_entropy(call(x), labels, ignore_index=255)
            else:
                loss = call(x, labels).loss
        loss.backward()
        optimizer.step()

    return step


def peak_memory(*arguments) -> float:
    """Megabytes that a fresh process needs for two runs on the CPU, above the imports.

    Args:
        arguments: of `build`, in their order.
    """
    return _models.peak_memory(*arguments, script=__file__)


if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    _models.print_peak(lambda: build(*case))
