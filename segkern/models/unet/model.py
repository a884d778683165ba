"""U-Net: convolutions at ever coarser and then ever finer maps, semantic or with matched channels.

Letters: B image, H W image size, C channels of the finest maps, L halvings, Q query, K class.

    x_0 = block(image);  x_i = block(pool(x_{i-1})), i = 1 .. L      2^i C channels, stride 2^i
    y   = bert(x_L), or x_L
    y   = block(up(y), x_i), i = L-1 .. 0                   a block: conv, norm, relu, twice
    semantic:   logits = conv1x1(y), K channels
    Hungarian:  masks = conv1x1(y), Q channels;  classes = linear(mean over the map of bert(x_L))
    with class_from "mask":
                s_n = sigmoid(mean of the mask over place n of the coarsest map)
                classes = linear(mean) + linear'(sum_n s_n bert(x_L)_n / (1 + sum_n s_n))
    and in training a cross entropy more, of each true object, with true_mask_weight:
                t_n = share of place n in its mask
                classes = linear'(sum_n t_n bert(x_L)_n / (1 + sum_n t_n))

Source: U-Net (Ronneberger et al., MICCAI 2015), with norms and borders of zeros; the Hungarian one
and the table that gives it 7.8 million weights: Schmidt-Mengin, Image Segmentation as a Sequence
Problem, 2021, written from its equations. The transformer layers in between are an experiment
that it names and does not make. The mean makes the class layer one of any image size; the
channels' own convolution has no bias there, so that masks are a product of two factors.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...nn import mask_classes
from ...nn.bert import Bert
from ...nn.linear import Linear
from ...nn.maps import keep_channels_last
from ...nn.mask_criterion import FullMaskCriterion
from ...ops._norm_relu import norm_relu
from ...structures.logits import PixelLogits, QueryLogits
from ...structures.roles import Role, parameter_roles
from ...structures.targets import Targets
from .. import manners, own_format, two_heads
from ..two_heads import TwoHeadOutput
from .config import UNetConfig


class ConvBlock(nn.Module):
    """Twice a 3 x 3 convolution, a norm and a ReLU.

    Args:
        channels: of the input.
        out: of the result.
    """

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        self.checkpointing = False  # keep the input alone, compute the rest again

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, h, w] -> [B, out, h, w]
        if self.checkpointing and self.training:
            return checkpoint(self._run, x, use_reentrant=False, context_fn=self._contexts)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = conv(x)
            if norm.training:
                x = F.relu(norm(x), inplace=True)
            else:
                moments = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
                x = norm_relu(x, (moments, norm.eps))
        return x

    def _contexts(self) -> tuple:
        """Of the first run and of the second, which must not count in the norms' averages."""
        return contextlib.nullcontext(), self._uncounted()

    @contextlib.contextmanager
    def _uncounted(self) -> Iterator[None]:
        norms = (self.norm1, self.norm2)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum
                norm.num_batches_tracked -= 1


class UNet(nn.Module):
    """Encoder, transformer layers if any, decoder, and the head that the config asks for.

    Args:
        config: what to build; weights are random, those of convolutions channels-last in memory:
            for FSDP's `fully_shard` first call `model.to(memory_format=torch.contiguous_format)`.
    """

    config_class = UNetConfig
    main_input_name = "pixel_values"
    from_pretrained = classmethod(manners.from_pretrained)
    device, dtype, num_parameters = manners.device, manners.dtype, manners.num_parameters
    scored = two_heads.scored
    class_head = (
        *("classify.weight", "classify.bias"),  # of the semantic head
        *("class_embed.weight", "class_embed.bias", "criterion.empty_weight"),
        *("map_class_embed.weight", "map_class_embed.bias"),
    )

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = [config.channels << i for i in range(config.depth + 1)]
        before = [config.input.channels, *widths]
        self.encoder = nn.ModuleList(map(ConvBlock, before, widths))
        self.bert = None
        if config.bert_layers:
            D, heads = widths[-1], config.num_attention_heads
            grid = tuple(side // config.size_divisor for side in config.image_size)
            depth, hidden = config.bert_layers, 4 * D
            self.bert = Bert(grid, 1, D, depth, heads, hidden, config.dropout, in_chans=D)
        down = widths[:-1][::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * C, C, 2, stride=2) for C in down)
        self.decoder = nn.ModuleList(ConvBlock(2 * C, C) for C in down)
        if config.task_head == "semantic":
            self.classify = nn.Conv2d(config.channels, config.num_labels, 1)
        else:
            K, Q = config.num_labels, config.num_queries
            self.masks = nn.Conv2d(config.channels, Q, 1, bias=False)
            self.class_embed = Linear(widths[-1], Q * (K + 1))
            if config.class_from == "mask":
                self.map_class_embed = Linear(widths[-1], K + 1)
            self.criterion = FullMaskCriterion(
                K,
                config.class_weight,
                config.mask_weight,
                config.dice_weight,
                config.no_object_weight,
            )
        keep_channels_last(self)

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for backward, and compute the rest again.

        Args:
            enable: False keeps everything, as at the start.
        """
        for part in self.modules():
            if isinstance(part, (ConvBlock, Bert)):
                part.checkpointing = enable

    def inputs(self, task: str, batch: int) -> tuple[Tensor, ...]:
        """Nothing besides pixels."""
        return ()

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The coarsest maps, after the transformer layers if any, and the finest of the decoder.

        Args:
            pixel_values: [B, C, H, W] floating, normalised; padded with zeros to the right and
                below to multiples of 2^L.

        Returns:
            [B, 2^L channels, H / 2^L, W / 2^L] and [B, channels, H, W], of the padded images.

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        x = two_heads.padded(self, pixel_values).contiguous(memory_format=torch.channels_last)
        maps = []
        for i, block in enumerate(self.encoder):
            maps.append(block(F.max_pool2d(maps[-1], 2) if i else x))
        coarsest = maps.pop()
        if self.bert is not None:
            states = self.bert(coarsest)
            coarsest = states[-1].mT.unflatten(2, coarsest.shape[2:])
            coarsest = coarsest.contiguous(memory_format=torch.channels_last)
        y = coarsest
        for up, block in zip(self.up, self.decoder):
            y = block(torch.cat((up(y), maps.pop()), 1))
        return coarsest, y

    def predict(self, pixel_values: Tensor) -> PixelLogits | QueryLogits:
        """Class logits of pixels, or of queries with their masks.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, of any size.

        Returns:
            of the semantic head maps [B, K, H, W] of the padded images, stride 1; of the instance
            head class logits [B, Q, K + 1], mask embeddings [B, Q, channels], the same for all
            images, and features [B, channels, H, W].

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        return self.prediction(pixel_values)[0]

    def prediction(
        self, pixel_values: Tensor
    ) -> tuple[PixelLogits | QueryLogits, Tensor, tuple[int, int]]:
        """As `predict`, and the states [B, N, D] of the coarsest map with its size (h, w)."""
        coarsest, y = self.features(pixel_values)
        states, grid = coarsest.flatten(2).mT, coarsest.shape[2:]
        if self.config.task_head == "semantic":
            return PixelLogits(self.classify(y), 1), states, grid
        classes = self.class_embed(coarsest.mean((2, 3)))
        classes = classes.unflatten(1, (self.config.num_queries, -1))
        masks = self.masks.weight.flatten(1).to(y.dtype).expand(y.shape[0], -1, -1)
        if self.config.class_from == "mask":
            weights = mask_classes.cover(masks, y, grid, self.config.size_divisor)
            classes = classes + self.map_class_embed(mask_classes.mean_under(weights, states))
        return QueryLogits(classes, masks, y), states, grid

    def classes_of(self, states: Tensor) -> Tensor:
        """Class logits [B, T, K + 1] of the mean states [B, T, D] under the true masks."""
        return self.map_class_embed(states)

    def parameter_roles(self) -> dict[str, Role]:
        """Nothing is a backbone, as nothing comes pretrained; matrices are those of the
        transformer layers."""
        blocks = () if self.bert is None else self.bert.blocks
        return parameter_roles(self, nn.Identity(), blocks)

    def loss(self, pixel_values: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss.

        Args:
            pixel_values: [B, C, H, W] floating, normalised.
            targets: of the same B images, on the same device; with `semantic` for that head.

        Returns:
            the weighted sum [], and its unweighted parts, [1] each: "loss_bce", or
            "loss_cross_entropy", "loss_mask" where it has a weight, "loss_dice", and
            "loss_true_class" where it has one.

        Raises:
            ValueError: targets without a map of labels, or a label out of range.
        """
        return self.scored(pixel_values, targets)[1:]

    def forward(
        self,
        pixel_values: Tensor,  # [B, C, H, W]
        labels: Tensor | None = None,  # [B, H, W]
        mask_labels: Sequence[Tensor] | None = None,  # B of [T_b, *, *]
        class_labels: Sequence[Tensor] | None = None,  # B of [T_b]
        return_dict: bool | None = None,
        targets: Targets | None = None,
    ) -> TwoHeadOutput | tuple:
        """Predictions, and the loss if there is a truth.

        Args:
            pixel_values: [B, C, H, W] floating, normalised.
            labels: of the semantic head: [B, H, W] int64 in [0, K), 255 where a pixel does not
                count (65535 of more than 255 classes).
            mask_labels: of the instance head: for each image [T_b, *, *] of any dtype, 1 inside, 0
                outside, 255 where a pixel has no weight; all of one size, that of the images or
                another. Together with `class_labels`.
            class_labels: for each image [T_b] integers in [0, K).
            return_dict: False gives a tuple of what is not None.
            targets: the same, packed; alone.

        Returns:
            A `TwoHeadOutput`.

        Raises:
            TypeError, ValueError: wrong dtype, shape or combination of arguments, or a label out
                of range.
        """
        lists = mask_labels, class_labels
        return two_heads.forward(self, pixel_values, labels, *lists, return_dict, targets)

    @classmethod
    def read_pretrained(
        cls, source: str | Path, num_labels: int | None
    ) -> tuple[dict, dict[str, Tensor]]:
        """Settings and weights of a checkpoint, by the names of the config and of the model.

        Args:
            source: a folder of `save_pretrained`.
            num_labels: K of the new task, which then need not be that of the checkpoint.

        Raises:
            ValueError: a file is missing or is not what it should be.
        """
        return own_format.read_known(cls, source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors.

        Args:
            folder: is made if it is not there.
        """
        own_format.save(self, folder)
