"""Object queries that know their task: a token of the task, sent over the finest map.

Letters: B image, L token of a text, Q query, N layer, S pixels of the finest map, h w its size,
H head, D channels a head, C channels, M channels of the mask features.

    token    = norm(W2 relu(W1 ids))        ids of the words "the task is ...", as numbers  [B, C]
    x        = Q - 1 copies of the token
    N times: x = norm(x + self attention); x = norm(x + attention to the pixels);
             x = norm(x + feed-forward); queries and keys of the first have a learned position
    queries  = norm(x), and the token as the last one                                    [B, Q, C]

    pixels:  keys = Wk (PE + P f + p),  values = Wv PE      f: mask features, PE: their positions

What a pixel gives is its position, and its features say how much: so it stands in the paper's
code. Of the keys, Wk P is one matrix, made anew from the weights each time. The sine embedding of
a pixel is one of its row beside one of its column, and so is its product with a matrix the sum of
a row's and a column's: h + w products in place of h w, for values as for keys.
No weight of attention is stored.
Source: OneFormer (Jain et al., CVPR 2023), section 3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear
from ..ops._checks import exact_dtype
from .detr_decoder import DetrLayer
from .linear import use_own_products
from .position import sine_position


class TaskQueries(nn.Module):
    """The tokens of tasks, and the queries that they become before an image.

    Args:
        tokens: L.
        channels: C.
        mask_channels: M.
        layers: N.
        heads: H.
        feedforward: width of the feed-forward networks.
        dropout: probability, as torch.nn.TransformerDecoderLayer has it.
    """

    def __init__(
        self,
        tokens: int = 77,
        channels: int = 256,
        mask_channels: int = 256,
        layers: int = 2,
        heads: int = 8,
        feedforward: int = 2048,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.heads = heads
        self.task_mlp = nn.ModuleList([nn.Linear(tokens, channels), nn.Linear(channels, channels)])
        self.input_proj = nn.Conv2d(mask_channels, channels, 1)
        self.layers = nn.ModuleList(
            DetrLayer(channels, heads, feedforward, dropout, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(channels)
        nn.init.kaiming_uniform_(self.input_proj.weight, a=1)
        nn.init.zeros_(self.input_proj.bias)
        use_own_products(self.layers)

    def token(self, ids: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The token of each task, normalised.

        Args:
            ids: [B, L], of words; as numbers up to 49407, of which half precision and autocast
                would keep two or three digits: float32 at least computes them.
            norm: that of the predictions.

        Returns:
            [B, C] in the dtype of the weights.
        """
        first, second = self.task_mlp
        exact = exact_dtype(first.weight)
        with torch.autocast(ids.device.type, enabled=False):
            x = F.linear(ids.to(exact), first.weight.to(exact), first.bias.to(exact))
            x = F.linear(F.relu(x), second.weight.to(exact), second.bias.to(exact))
            x = F.layer_norm(x, x.shape[1:], norm.weight.to(exact), norm.bias.to(exact), norm.eps)
        return x.to(first.weight.dtype)

    def forward(
        self,
        token: Tensor,  # [B, C], normalised
        position: Tensor,  # [Q - 1, C]
        mask_features: Tensor,  # [B, M, h, w]
    ) -> Tensor:  # [B, Q, C]
        """The queries, the token last."""
        x = token[:, None].expand(-1, len(position), -1)
        for layer in self.layers:  # the keys and values of one layer at a time
            x = layer(x, position, *self._keys_values(layer.cross_attn, mask_features))
        return torch.cat((self.norm(x), token[:, None]), 1)

    def _keys_values(self, attn: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, S, H, D] and values, the same for all B, of a layer's attention."""
        weight, (B, _, h, w) = self.input_proj.weight, features.shape
        exact = exact_dtype(weight)
        with torch.autocast(features.device.type, enabled=False):
            project = attn.k_proj.weight.to(exact)  # [C, C]
            matrix = project @ weight.flatten(1).to(exact)  # [C, M]
            bias = attn.k_proj.bias.to(exact) + project @ self.input_proj.bias.to(exact)
            placed = _placed(project, bias, (h, w)).to(weight.dtype)  # [S, C]
        rows = features.flatten(2).transpose(1, 2)  # [B, S, M]
        key = linear(rows, matrix.to(weight.dtype), residual=placed.expand(B, -1, -1))
        del placed
        with torch.autocast(features.device.type, enabled=False):
            project, bias = attn.v_proj.weight.to(exact), attn.v_proj.bias.to(exact)
            value = _placed(project, bias, (h, w)).to(weight.dtype).to(key.dtype)
        heads = (self.heads, -1)
        return key.unflatten(2, heads), value.expand(B, -1, -1).unflatten(2, heads)


def _placed(weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Products of the sine embeddings of a map's pixels [S, C] with a weight [E, C], plus the bias
    [E]: [S, E]."""
    (h, w), C, kind = size, weight.shape[1], (weight.device, weight.dtype)
    down = sine_position(((h, 1),), C, *kind)[:, : C // 2]
    across = sine_position(((1, w),), C, *kind)[:, C // 2 :]
    down, across = down @ weight[:, : C // 2].T, torch.addmm(bias, across, weight[:, C // 2 :].T)
    return (down[:, None] + across).flatten(0, 1)
