"""The contrastive loss between an image's queries and what its texts say.

Letters: B image of this process, A images of all processes, Q query, C channels.

    u_i, t_i = all queries, all text queries of an image as one unit vector [Q C]
    logits   = s u t^T                                                     s = min(exp(scale), 100)
    loss     = mean over i of -log softmax(logits)[i, i], over texts for each image and the other
               way round

Each process compares its own images with the texts of all, and its texts with the images of all:
the mean of the gradients over processes is that of the joined batch. This is the one loss in which
a process waits for the others, in training alone; all must have as many images.
Source: OneFormer (Jain et al., CVPR 2023), section 3.3; CLIP (Radford et al., ICML 2021).
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Gathered(torch.autograd.Function):
    """Rows [B, n] of all processes, [A, n]; a row's gradient is the sum of those of all."""

    @staticmethod
    def forward(ctx, rows):
        out = rows.new_empty(len(rows) * dist.get_world_size(), rows.shape[1])
        dist.all_gather_into_tensor(out, rows.contiguous())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class ContrastiveLoss(nn.Module):
    """The loss, with its learned temperature.

    Args:
        temperature: 1 / s at the start, above 0.
    """

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        # [1], not []: FSDP shards no scalar
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))

    def forward(self, queries: Tensor, texts: Tensor) -> Tensor:
        """[B, Q, C] and [B, Q, C] floating to [], in float32 at least."""
        exact = torch.promote_types(queries.dtype, torch.float32)
        with torch.autocast(queries.device.type, enabled=False):
            u, t = (F.normalize(x.to(exact).flatten(1), dim=1) for x in (queries, texts))
            scale = self.logit_scale.to(exact).exp().clamp(max=100)
            every_u, every_t, first = u, t, 0
            if self.training and dist.is_available() and dist.is_initialized():
                every_u, every_t = _Gathered.apply(u), _Gathered.apply(t)
                first = len(u) * dist.get_rank()
            own = torch.arange(first, first + len(u), device=u.device)
            of_images = F.cross_entropy(scale * u @ every_t.T, own)
            return of_images + F.cross_entropy(scale * t @ every_u.T, own)
