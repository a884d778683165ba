"""Seq2Seg: segmentation as a sequence problem, by the encoder of BERT.

Letters: B image, H W image size, p patch size, N patch, D channels, Q query, K class, h w size of
the mask logits.

    semantic:  x_0 .. x_L = encoder(patches)                  the embeddings, and after each layer
               logits     = unpatch(x_0 + .. + x_L)           a transposed convolution of p x p
    instance:  x_0 .. x_L = encoder(queries, patches)
               classes    = linear(q),  masks = linear(q)     q the queries' part of x_L
    or         masks      = linear(q) . linear(y) / sqrt(D)   y the patches' part: stride p
    or         masks      = linear(q) . unpatch(y_0 + .. + y_L)               stride 4

Source: Schmidt-Mengin, Image Segmentation as a Sequence Problem, 2021, written from its equations.
The sum includes the state before the first layer, nearest to the pixels, as the states of a BERT
are listed; without `skip` it is x_L alone. A linear mask is one of the whole image, whatever its
size. Differs: BERT's pooler, token types and positions behind the last patch, which its 50.8
million weights count, have no effect and are left out.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.bert import Bert, Unpatch
from ...nn.linear import Linear
from ...nn.mask_criterion import FullMaskCriterion
from ...nn.vit import start_locally
from ...ops import unpack_bits
from ...ops._checks import exact_dtype
from ...structures.logits import PixelLogits, QueryLogits
from ...structures.roles import Role, parameter_roles
from ...structures.targets import Targets
from .. import own_format, two_heads
from ..two_heads import Scored, TwoHeadOutput
from .config import Seq2SegConfig

FINE = 4  # stride of the masks of "fine"


class Seq2Seg(nn.Module):
    """Encoder, and the head that the config asks for.

    Args:
        config: what to build; weights are random.
    """

    class_head = (
        *("decoder.weight", "decoder.bias"),  # of the semantic head
        *("class_embed.weight", "class_embed.bias", "criterion.empty_weight"),
        *("patch_classes.weight", "patch_classes.bias"),
    )

    def __init__(self, config: Seq2SegConfig):
        super().__init__()
        self.config = config
        D, p = config.hidden_size, config.patch_size
        self.encoder = Bert(
            config.image_size,
            p,
            D,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.intermediate_size,
            config.dropout,
            config.input.channels,
        )
        if config.local_start:
            start_locally(self.encoder)
        if config.task_head == "semantic":
            self.decoder = Unpatch(D, config.num_labels, p)
            return
        self.queries = nn.Embedding(config.num_queries, D)
        self.class_embed = Linear(D, config.num_labels + 1)
        if config.mask == "linear":
            self.mask_embed = Linear(D, config.mask_size[0] * config.mask_size[1])
        elif config.mask == "attention":
            self.mask_embed, self.mask_features = Linear(D, D), Linear(D, D)
        else:
            self.mask_embed = Linear(D, config.mask_channels)
            self.mask_features = Unpatch(D, config.mask_channels, p // FINE)
        if config.patch_weight:
            self.patch_classes = Linear(D, config.num_labels)
        self.criterion = FullMaskCriterion(
            config.num_labels,
            config.class_weight,
            config.mask_weight,
            config.dice_weight,
            config.no_object_weight,
        )

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Keep only the inputs of the encoder's blocks for backward, and compute the rest again.

        Args:
            enable: False keeps everything, as at the start.
        """
        self.encoder.checkpointing = enable

    def inputs(self, task: str, batch: int) -> tuple[Tensor, ...]:
        """Nothing besides pixels."""
        return ()

    def predict(self, pixel_values: Tensor) -> PixelLogits | QueryLogits:
        """Class logits of pixels, or of queries with their masks.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, of any size; padded with zeros to the
                right and below to multiples of p.

        Returns:
            of the semantic head maps [B, K, H, W] of the padded images, stride 1; of the instance
            head class logits [B, Q, K + 1], and mask logits [B, Q, h, w] or their two factors.

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        return self._run(pixel_values)[0]

    def _run(
        self, pixel_values: Tensor, targets: Targets | None = None
    ) -> tuple[PixelLogits | QueryLogits, Scored | None]:
        """What `predict` and, of targets, `loss` return."""
        found, patches = self._found(pixel_values)
        if targets is None:
            return found, None
        loss, losses = two_heads.loss(self, found, pixel_values, targets)
        if self.config.task_head == "instance" and self.config.patch_weight:
            part = patch_loss(self.patch_classes(patches), targets, self.config.patch_size)
            loss = loss + self.config.patch_weight * part
            losses["loss_patch"] = part[None]
        return found, (loss, losses)

    def _found(self, pixel_values: Tensor) -> tuple[PixelLogits | QueryLogits, Tensor]:
        """The prediction, and the last states of the patches [B, N, D]."""
        image, config = two_heads.padded(self, pixel_values), self.config
        grid = image.shape[2] // config.patch_size, image.shape[3] // config.patch_size
        if config.task_head == "semantic":
            states = self.encoder(image)
            x = sum(states) if config.skip else states[-1]
            return PixelLogits(self.decoder(x, grid), 1), states[-1]
        states = self.encoder(image, self.queries.weight)
        queries, patches = states[-1].tensor_split([config.num_queries], 1)
        classes, masks = self.class_embed(queries), self.mask_embed(queries)
        if config.mask == "linear":
            return QueryLogits(classes, masks.unflatten(2, config.mask_size)), patches
        if config.mask == "attention":
            features = self.mask_features(patches).mT.unflatten(2, grid)
            return QueryLogits(classes, masks * config.hidden_size**-0.5, features), patches
        summed = sum(x[:, config.num_queries :] for x in states) if config.skip else patches
        return QueryLogits(classes, masks, self.mask_features(summed, grid)), patches

    def parameter_roles(self) -> dict[str, Role]:
        """Nothing is a backbone, as nothing comes pretrained; matrices are those of the blocks."""
        return parameter_roles(self, nn.Identity(), self.encoder.blocks)

    def loss(self, pixel_values: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss.

        Args:
            pixel_values: [B, C, H, W] floating, normalised.
            targets: of the same B images, on the same device; with `semantic` for that head.

        Returns:
            the weighted sum [], and its unweighted parts, [1] each: "loss_bce", or
            "loss_cross_entropy", "loss_mask" where it has a weight, "loss_dice", and "loss_patch"
            where that has one.

        Raises:
            ValueError: targets without a map of labels, or a label out of range.
        """
        return self._run(pixel_values, targets)[1]

    def forward(
        self,
        pixel_values: Tensor,  # [B, C, H, W]
        labels: Tensor | None = None,  # [B, H, W]
        mask_labels: list[Tensor] | None = None,  # B of [T_b, H, W]
        class_labels: list[Tensor] | None = None,  # B of [T_b]
        targets: Targets | None = None,
    ) -> TwoHeadOutput:
        """Predictions, and the loss if there is a truth.

        Args:
            pixel_values: [B, C, H, W] floating, normalised.
            labels: of the semantic head: [B, H, W] int64 in [0, K), 255 where a pixel does not
                count (65535 of more than 255 classes).
            mask_labels: of the instance head: for each image [T_b, H, W] float, bool or uint8;
                together with `class_labels`.
            class_labels: for each image [T_b] int64 in [0, K).
            targets: the same, packed; alone.

        Returns:
            A `TwoHeadOutput`.

        Raises:
            TypeError, ValueError: wrong dtype, shape or combination of arguments, or a label out
                of range.
        """
        return two_heads.forward(
            self, self._run, pixel_values, labels, mask_labels, class_labels, targets
        )

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, num_labels: int | None = None
    ) -> "Seq2Seg":
        """Opens what `save_pretrained` wrote.

        Args:
            name_or_folder: a folder, one of its files, the folder of a training run, or a name on
                the hub.
            num_labels: K of the new task; where it differs from the checkpoint's, the class head
                starts anew. None keeps the checkpoint's.

        Returns:
            The model in eval mode.

        Raises:
            ValueError: a file is missing or is not what it should be, or the weights are not those
                of the model that is described (names the keys).
        """
        return own_format.opened(cls, Seq2SegConfig, name_or_folder, num_labels, ("stuff",))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors.

        Args:
            folder: is made if it is not there.
        """
        own_format.save(self, folder)


def patch_loss(logits: Tensor, targets: Targets, size: int) -> Tensor:
    """Binary cross entropy of the classes of patches, whose truth is the share of a patch that the
    masks of the class cover, as far as it counts.

    Args:
        logits: [B, N, K] floating, row by row.
        targets: of the same B images.
        size: side of a patch in pixels.

    Returns:
        [], a sum over classes and a mean over patches; float32 (float64).
    """
    exact = exact_dtype(logits)
    masks = targets.masks.to(exact)
    H, W = masks.shape[2:]
    known = masks.new_ones(len(masks), 1, H, W)
    if targets.void is not None:
        known = known.masked_fill(unpack_bits(targets.void, W)[:, None], 0)
    maps = F.pad(torch.cat((masks * known, known), 1), (0, -W % size, 0, -H % size))
    shares, known = F.avg_pool2d(maps, size).flatten(2).tensor_split([-1], 1)  # [B, T | 1, N]
    slots = torch.arange(shares.shape[1], device=shares.device) < targets.count[:, None]
    with torch.autocast(logits.device.type, enabled=False):
        truth = F.one_hot(targets.labels, logits.shape[2]).to(exact) * slots[..., None]
        truth = (shares.mT @ truth).clamp(max=1)  # [B, N, K]
        each = F.binary_cross_entropy_with_logits(logits.to(exact), truth, known.mT)
    return each * logits.shape[2]
