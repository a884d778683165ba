"""Seq2Seg: segmentation as a sequence problem, by the encoder of BERT.

Letters: B image, H W image size, p patch size, N patch, D channels, Q query, K class, h w size of
the mask logits.

    semantic:  x_0 .. x_L = encoder(patches)                  the embeddings, and after each layer
               logits     = unpatch(x_0 + .. + x_L)           a transposed convolution of p x p
    instance:  x_0 .. x_L = encoder(queries, patches)
               classes    = linear(q),  masks = linear(q)     q the queries' part of x_L
    or         masks      = linear(q) . linear(y) / sqrt(D)   y the patches' part: stride p
    or         masks      = linear(q) . unpatch(y)            stride 4
    with class_from "mask":
               s_n        = sigmoid(mean of the mask over patch n)
               classes    = linear(q) + linear'(sum_n s_n y_n / (1 + sum_n s_n))
    and in training a cross entropy more, of each true object, with true_mask_weight:
               t_n        = share of patch n in its mask
               classes    = bias of linear + linear'(sum_n t_n y_n / (1 + sum_n t_n))

Source: Schmidt-Mengin, Image Segmentation as a Sequence Problem, 2021, written from its equations.
The sum includes the state before the first layer, nearest to the pixels, as the states of a BERT
are listed; without `skip` it is x_L alone. A linear mask is one of the whole image, whatever its
size. Differs: BERT's pooler, token types and positions behind the last patch, which its 50.8
million weights count, have no effect and are left out.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ...nn import mask_classes
from ...nn.bert import Bert, Unpatch
from ...nn.linear import Linear
from ...nn.mask_criterion import FullMaskCriterion
from ...nn.vit import start_at_places, start_locally
from ...structures.logits import PixelLogits, QueryLogits
from ...structures.roles import Role, parameter_roles
from ...structures.targets import Targets
from .. import manners, own_format, two_heads
from ..two_heads import TwoHeadOutput
from .config import Seq2SegConfig

FINE = 4  # stride of the masks of "fine"


class Seq2Seg(nn.Module):
    """Encoder, and the head that the config asks for.

    Args:
        config: what to build; weights are random.
    """

    config_class = Seq2SegConfig
    main_input_name = "pixel_values"
    from_pretrained = classmethod(manners.from_pretrained)
    device, dtype, num_parameters = manners.device, manners.dtype, manners.num_parameters
    scored = two_heads.scored
    class_head = (
        *("decoder.weight", "decoder.bias"),  # of the semantic head
        *("class_embed.weight", "class_embed.bias", "patch_class_embed.weight"),
        "criterion.empty_weight",
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
        semantic = config.task_head == "semantic"
        if config.local_start:
            start_locally(self.encoder, 1.0 if semantic else 0.5)
        if semantic:
            self.decoder = Unpatch(D, config.num_labels, p)
            return
        self.queries = nn.Embedding(config.num_queries, D)
        if config.local_start:
            start_at_places(self.queries.weight, self.encoder)
        self.class_embed = Linear(D, config.num_labels + 1)
        if config.class_from == "mask":
            self.patch_class_embed = Linear(D, config.num_labels + 1, bias=False)
        if config.mask == "linear":
            self.mask_embed = Linear(D, config.mask_size[0] * config.mask_size[1])
        elif config.mask == "attention":
            self.mask_embed, self.mask_features = Linear(D, D), Linear(D, D)
        else:
            self.mask_embed = Linear(D, config.mask_channels)
            self.mask_features = Unpatch(D, config.mask_channels, p // FINE)
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
        return self.prediction(pixel_values)[0]

    def prediction(
        self, pixel_values: Tensor
    ) -> tuple[PixelLogits | QueryLogits, Tensor, tuple[int, int]]:
        """As `predict`, and the last states of the patches [B, N, D] with their grid (h, w)."""
        image, config = two_heads.padded(self, pixel_values), self.config
        grid = image.shape[2] // config.patch_size, image.shape[3] // config.patch_size
        if config.task_head == "semantic":
            states = self.encoder(image)
            x = sum(states) if config.skip else states[-1]
            return PixelLogits(self.decoder(x, grid), 1), states[-1], grid
        *_, x = self.encoder(image, self.queries.weight)
        queries, patches = x.tensor_split([config.num_queries], 1)
        classes, masks = self.class_embed(queries), self.mask_embed(queries)
        features = None
        if config.mask == "linear":
            masks = masks.unflatten(2, config.mask_size)
        elif config.mask == "attention":
            masks = masks * config.hidden_size**-0.5
            features = self.mask_features(patches).mT.unflatten(2, grid)
        else:
            features = self.mask_features(patches, grid)
        if config.class_from == "mask":
            stride = config.patch_size // FINE if config.mask == "fine" else 1
            weights = mask_classes.cover(masks, features, grid, stride)
            classes = classes + self.patch_class_embed(mask_classes.mean_under(weights, patches))
        return QueryLogits(classes, masks, features), patches, grid

    def classes_of(self, states: Tensor) -> Tensor:
        """Class logits [B, T, K + 1] of the mean states [B, T, D] under the true masks."""
        return self.patch_class_embed(states) + self.class_embed.bias

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
