"""Swin's blocks on `ops.window_attn` and `ops.feed_forward`: of `swin` and of `maskformer-swin`.

Letters: B image, h w map size, C channels, H head, W window's side, S = W W tokens of a window.

Windows are neither padded, rolled nor cut in memory, the scores of a window are never stored, and
the hidden layer of the network neither (`nn.backbones.swin`, whose ways with memory these are).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.maskformer import modeling_maskformer_swin
from transformers.models.swin import modeling_swin

from ...nn.backbones.swin import WIDE
from ...nn.recompute import recomputed
from ...ops import feed_forward, linear, window_attn
from .plain import idle, is_gelu, plain, unhooked


class _Block(NamedTuple):
    """A block's layers."""

    norm1: nn.LayerNorm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    proj: nn.Linear
    norm2: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear

    def fits(self) -> bool:
        """Whether kernels may have the weights."""
        return plain(*self) and all(p.bias is not None for p in self[1:4])

    def attended(
        self,
        x: Tensor,  # [B, h, w, C]
        table: Callable[[], Tensor],  # gives the bias [H, S, S]
        window: int,
        shift: int,
    ) -> Tensor:  # [B, h, w, C]
        """Attention in windows without its last product."""

        def project(x: Tensor) -> Tensor:  # [B, h, w, 3 C]
            return linear(self.norm1(x), torch.cat([p.weight for p in self[1:4]]))

        def attend(qkv: Tensor) -> Tensor:
            bias = table()
            added = torch.stack([p.bias for p in self[1:4]]).unflatten(1, (len(bias), -1))
            return window_attn(qkv.unflatten(3, added.shape), added, bias, window, shift)

        if x.shape[3] < WIDE:
            return recomputed(lambda x: attend(project(x)), x)
        return attend(recomputed(project, x))

    def run(
        self,
        x: Tensor,  # [B, h w, C]
        size: tuple[int, int],  # h, w
        table: Callable[[], Tensor],
        window: int,
        shift: int,
        drop_path: nn.Module,
    ) -> Tensor:  # [B, h w, C]
        """The block, whose attention is left out as `drop_path` draws; transformers never leaves
        the feed-forward network out."""
        out = self.attended(x.unflatten(1, size), table, window, shift).flatten(1, 2)
        norm = self.norm2.weight, self.norm2.bias, self.norm2.eps
        weights = [p for layer in (self.fc1, self.fc2) for p in (layer.weight, layer.bias)]
        proj = self.proj.weight, self.proj.bias
        if type(drop_path) is nn.Identity or not drop_path.training:
            x = linear(out, *proj, residual=x)
        else:
            x = x + drop_path(linear(out, *proj))
        return feed_forward(x, *weights, norm=norm, residual=x)


class SwinLayer(modeling_swin.SwinLayer):
    """A block of `SwinModel`."""

    def forward(self, hidden_states, input_dimensions, always_partition=False, **kwargs):
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        attn, mlp = self.attention, self.mlp
        block = _Block(
            self.layernorm_before,
            *(attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj),
            *(self.layernorm_after, mlp.fc1, mlp.fc2),
        )
        if not (
            attn.config._attn_implementation == "sdpa"  # "eager" also returns weights
            and self.window_size == attn.relative_position_bias.window_size[0]
            and idle(self.training, self.dropout.p, attn.attention_dropout)
            and is_gelu(mlp.activation_fn)
            and unhooked(attn, mlp, self.dropout, self.drop_path)
            and block.fits()
        ):
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
        options = self.window_size, self.shift_size, self.drop_path
        table = attn.relative_position_bias
        return block.run(hidden_states, input_dimensions, lambda: table()[0], *options), None


class MaskFormerSwinLayer(modeling_maskformer_swin.MaskFormerSwinLayer):
    """A block of `MaskFormerSwinModel`."""

    def forward(self, hidden_states, input_dimensions, output_attentions=False):
        attn, out = self.attention.self, self.attention.output
        fc1, fc2 = self.intermediate, self.output
        block = _Block(
            self.layernorm_before,
            *(attn.query, attn.key, attn.value, out.dense),
            *(self.layernorm_after, fc1.dense, fc2.dense),
        )
        if not (
            not output_attentions
            and idle(self.training, attn.dropout.p, out.dropout.p, fc2.dropout.p)
            and is_gelu(fc1.intermediate_act_fn)
            and unhooked(self.attention, attn, out, fc1, fc2, self.drop_path)
            and block.fits()
        ):
            return super().forward(hidden_states, input_dimensions, output_attentions)

        def table() -> Tensor:
            rows, tokens = attn.relative_position_index, attn.window_size[0] ** 2
            bias = attn.relative_position_bias_table[rows.view(-1)]
            return bias.view(tokens, tokens, -1).permute(2, 0, 1)

        options = self.window_size, self.shift_size, self.drop_path
        return (block.run(hidden_states, input_dimensions, table, *options),)


PARTS = {
    "window_attention": {
        "SwinLayer": SwinLayer,
        "MaskFormerSwinLayer": MaskFormerSwinLayer,
    }
}
