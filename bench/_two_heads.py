"""Seq2Seg and U-Net, and both in plain PyTorch layers with the same weights, for the benchmark.

The plain ones are what one writes from the equations: nn.TransformerEncoderLayer, nn.Conv2d,
nn.BatchNorm2d, nn.ConvTranspose2d, and the loss of the truth of every class of every pixel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segkern.models import Seq2Seg, Seq2SegConfig, UNet, UNetConfig

CONFIGS = {
    "seq2seg": lambda: Seq2SegConfig.preset("semantic", 34),
    "seq2seg instance": lambda: Seq2SegConfig.preset("instance"),
    "unet": lambda: UNetConfig.preset("semantic", 34),
    "tiny seq2seg": lambda: Seq2SegConfig.tiny(5, "semantic"),
    "tiny seq2seg instance": lambda: Seq2SegConfig.tiny(5),
    "tiny unet": lambda: UNetConfig.tiny(5),
}


class PlainSeq2Seg(nn.Module):
    """Either head, of images of the stored size.

    Args:
        ours: the model whose config and weights it gets.
    """

    def __init__(self, ours: Seq2Seg):
        super().__init__()
        self.config, self.queries = ours.config, None
        c = ours.config
        D, heads, hidden = c.hidden_size, c.num_attention_heads, c.intermediate_size
        self.patches, self.positions = ours.encoder.patch_embed["proj"], ours.encoder.pos_embed
        self.norm = ours.encoder.norm
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(D, heads, hidden, c.dropout, "gelu", 1e-12, True)
            for _ in ours.encoder.blocks
        )
        for layer, block in zip(self.layers, ours.encoder.blocks):
            names = ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2.")
            parts = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            names, parts = (*names, "norm1.", "norm2."), (*parts, block.norm1, block.norm2)
            named = {a + b: v for a, m in zip(names, parts) for b, v in m.state_dict().items()}
            layer.load_state_dict(named)
        if c.task_head == "semantic":
            self.decoder = nn.ConvTranspose2d(D, c.num_labels, c.patch_size, c.patch_size)
            self.decoder.load_state_dict(ours.decoder.state_dict())
        else:
            self.queries = ours.queries
            self.class_embed, self.mask_embed = ours.class_embed, ours.mask_embed

    def forward(self, x: Tensor):
        """[B, C, H, W] to [B, K, H, W], or to class logits and mask logits."""
        x = self.patches(x)
        grid = x.shape[2:]
        x = x.flatten(2).mT + self.positions
        if self.queries is not None:
            x = torch.cat((self.queries.weight.expand(len(x), -1, -1), x), 1)
        states = [self.norm(x)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        if self.queries is None:
            return self.decoder(torch.stack(states).sum(0).mT.unflatten(2, grid))
        q = states[-1][:, : self.config.num_queries]
        return self.class_embed(q), self.mask_embed(q)


class PlainUNet(nn.Module):
    """The semantic head.

    Args:
        ours: the model whose weights it gets.
    """

    def __init__(self, ours: UNet):
        super().__init__()

        def block(part):
            layers = (part.conv1, part.norm1, nn.ReLU(), part.conv2, part.norm2, nn.ReLU())
            return nn.Sequential(*layers)

        self.encoder = nn.ModuleList(map(block, ours.encoder))
        self.decoder = nn.ModuleList(map(block, ours.decoder))
        self.up, self.classify = ours.up, ours.classify

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] to [B, K, H, W]
        maps = []
        for i, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if i else x)
            maps.append(x)
        maps.pop()
        for up, block in zip(self.up, self.decoder):
            x = block(torch.cat((up(x), maps.pop()), 1))
        return self.classify(x)


def build(impl: str, name: str, kind: str, batch: int, device: str):
    """The function to time: images to logits (of pixels: to labels), or a training step with Adam.

    Args:
        impl: "segkern" or "PyTorch".
        name: of `CONFIGS`; the step is that of a semantic head.
        kind: "inference" or "training step".
    """
    torch.manual_seed(0)
    c = CONFIGS[name]()
    model = (UNet if isinstance(c, UNetConfig) else Seq2Seg)(c)
    if impl != "segkern":
        model = (PlainUNet if isinstance(c, UNetConfig) else PlainSeq2Seg)(model)
        model = model.to(memory_format=torch.contiguous_format)
    model = model.eval().to(device)
    x = torch.randn(batch, 3, *c.image_size, device=device)
    if kind == "inference":

        @torch.inference_mode()
        def run():
            found = model.predict(x) if impl == "segkern" else model(x)
            if c.task_head == "instance":
                return found
            return (found.maps if impl == "segkern" else found).argmax(1)

        return run
    labels = torch.randint(0, c.num_labels, (batch, *c.image_size), device=device)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-6, fused=True)

    def step():
        optimizer.zero_grad()
        if impl == "segkern":
            loss = model(x, labels).loss
        else:
            truth = F.one_hot(labels, c.num_labels).movedim(3, 1).float()
            loss = F.binary_cross_entropy_with_logits(model(x), truth)
        loss.backward()
        optimizer.step()

    return step
