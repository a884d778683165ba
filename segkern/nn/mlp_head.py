r"""The all-MLP head of SegFormer, without the maps that it lays side by side.

    paper:   y = classifier(relu(norm(fuse(cat_l resize(W_l x_l + c_l)))))
    here:    y = classifier(relu(norm(sum_l resize(A_l x_l) + b)))
             A_l = F_l W_l,  b = sum_l F_l c_l

Letters: B image, C_l channels of level l, E width, K class, h w size of the finest map; F_l the
columns of `fuse` that meet level l; the paper lays the last level first.

A resize blends pixels with weights that sum to 1, so a product of each pixel moves through it, and
a constant stays. So each map is multiplied once, at its own size, by a matrix that is made anew
from the weights each time; gradients flow through it. The [B, 4 E, h, w] of the paper, and its
product of 4 E x E for every pixel, which is half to two thirds of the whole network, are never
there. Where the norm keeps its statistics (evaluation) it is a scale and a shift, which A_l and b
take in; in training it follows the sum.
Source: SegFormer (Xie et al., NeurIPS 2021), section 3.2; its code drops whole channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear, resize_sum
from ..ops._checks import exact_dtype
from .linear import Linear


class MLPHead(nn.Module):
    """Class logits on the finest of several maps.

    Args:
        channels: of the maps, finest first.
        width: E.
        labels: K.
        dropout: probability that a channel of an image is left out before the classifier.
    """

    def __init__(self, channels: Sequence[int], width: int, labels: int, dropout: float = 0.0):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(c, width) for c in channels)
        self.fuse = nn.Linear(width * len(self.linears), width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = dropout
        self.classifier = Linear(width, labels)
        nn.init.kaiming_normal_(self.fuse.weight, mode="fan_out", nonlinearity="relu")

    def composed(self) -> tuple[list[Tensor], Tensor]:
        """A_l [E, C_l] and b [E], with the norm in them where it keeps its statistics."""
        exact, norm = exact_dtype(self.fuse.weight), self.norm
        with torch.autocast(self.fuse.weight.device.type, enabled=False):
            parts = self.fuse.weight.to(exact).chunk(len(self.linears), 1)[::-1]
            matrices = [f @ x.weight.to(exact) for f, x in zip(parts, self.linears)]
            bias = sum(f @ x.bias.to(exact) for f, x in zip(parts, self.linears))
            if not norm.training:
                scale = norm.weight.to(exact) * (norm.running_var.to(exact) + norm.eps).rsqrt()
                matrices = [scale[:, None] * a for a in matrices]
                bias = scale * (bias - norm.running_mean.to(exact)) + norm.bias.to(exact)
        return [a.to(self.fuse.weight.dtype) for a in matrices], bias.to(self.fuse.weight.dtype)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, C_l, h_l, w_l] each, finest first, to [B, K, h, w]."""
        matrices, bias = self.composed()
        rows = [linear(x.permute(0, 2, 3, 1), a) for x, a in zip(maps, matrices)]
        fold = not self.norm.training
        x = resize_sum([x.permute(0, 3, 1, 2) for x in rows], bias, relu=fold)
        if not fold:
            x = F.relu(self.norm(x), inplace=True)
        x = F.dropout2d(x, self.dropout, self.training)
        return self.classifier(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
