"""EoMT: panoptic, instance and semantic segmentation by a plain Vision Transformer.

Letters: B image, S side of the image, p patch size, h w size of the masks, P class token and
registers, N patch, Q query, T = P + N + Q token, D channels, R prediction, K class.

    x = blocks(tokens of the image)                     all but the last num_blocks
    x = last blocks([x, queries])                       one attention for patches and queries
    x = norm(x)
    class logits = C x_query;  mask logits = mlp(x_query) . upscale(x_patches)

In training a prediction is made before each of the last blocks, too, and its masks say which
patches a query attends to there; that fades (`anneal`) until none is needed. Inference has no mask
and one prediction.
Source: Your ViT is Secretly an Image Segmentation Model (Kerssies et al., CVPR 2025). Names of
arguments, results and most settings are those of Hugging Face transformers.
Differs: a patch where the mask logit is exactly 0 is open; queries stand after the patches, which
attention does not notice.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.criterion import Criterion, class_weights
from ...nn.dino_vit import DinoViT, Mask, Rotary
from ...nn.linear import Linear
from ...nn.upscale import Upscale
from ...nn.vit import start_locally
from ...ops import linear, mask_bits
from ...ops._checks import expect, got
from ...ops.upscale import masks_of
from ...structures.logits import QueryLogits
from ...structures.outputs import returned
from ...structures.roles import Role, parameter_roles
from ...structures.targets import Targets
from .. import manners
from ..query_output import given_targets
from . import huggingface, original, pretrained
from .config import EoMTConfig
from .output import EoMTOutput, Prediction

_POWER = 0.9  # of the fading masks


class EoMT(nn.Module):
    """Encoder, queries, heads and criterion.

    Args:
        config: what to build; weights are random, but for a pretrained encoder.

    Raises:
        ValueError: timm has no such backbone or no weights of it, or they do not fit.
    """

    config_class = EoMTConfig
    main_input_name = "pixel_values"
    from_pretrained = classmethod(manners.from_pretrained)
    device, dtype, num_parameters = manners.device, manners.dtype, manners.num_parameters
    class_head = (
        "class_predictor.weight",
        "class_predictor.bias",
        "criterion.empty_weight",
    )

    def __init__(self, config: EoMTConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        turned = config.encoder == "dinov3"
        drawn = config.pos_embed_shift, config.pos_embed_jitter, config.pos_embed_rescale
        self.encoder = DinoViT(
            config.image_size,
            config.patch_size,
            D,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.intermediate_size,
            registers=config.num_register_tokens,
            rotary=Rotary(config.rope_theta, *drawn) if turned else None,
            gated=config.gated,
            key_bias=config.key_bias,
            scale=config.layerscale_value,
            eps=config.layer_norm_eps,
            drop_path=config.drop_path_rate,
            in_chans=config.input.channels,
        )
        self.query = nn.Embedding(config.num_queries, D)
        # the published code has one activation for all, which a gated DINOv3 makes silu
        self.activation = F.silu if turned and config.gated else None
        self.upscale = nn.Sequential(
            *(Upscale(D, self.activation) for _ in range(config.num_upscale_blocks))
        )
        self.mask_head = nn.ModuleList(Linear(D, D) for _ in range(3))
        self.class_predictor = Linear(D, config.num_labels + 1)
        self.criterion = Criterion(
            config.num_labels,
            class_weight=config.class_weight,
            mask_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            no_object_weight=config.no_object_weight,
            num_points=config.train_num_points,
            oversample_ratio=config.oversample_ratio,
            importance_sample_ratio=config.importance_sample_ratio,
        )
        # share of the queries that keep their mask in each of the last blocks
        self.register_buffer("attn_mask_probs", torch.ones(config.num_blocks))
        if config.local_start:
            start_locally(self.encoder)
        if config.backbone_pretrained:
            self.load_encoder(config.backbone)

    def load_encoder(self, backbone: str | nn.Module) -> None:
        """Takes the encoder's weights from a DINOv2 or DINOv3 of timm.

        Args:
            backbone: timm's name of a pretrained model, which is downloaded once it is clear that
                it fits, and whose positions and patches timm resizes to ours; or a model of our
                sizes.

        Raises:
            ValueError: no such model or no weights of it, or another architecture (names the
                keys); nothing is loaded then.
        """
        self.encoder.load_state_dict(pretrained.encoder_weights(backbone, self))

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Keep only the inputs of the encoder's blocks for backward, and compute the rest again.

        Args:
            enable: False keeps everything, as at the start.
        """
        self.encoder.checkpointing = enable

    def inputs(self, task: str, batch: int) -> tuple[Tensor, ...]:
        """Nothing besides pixels: all tasks share one run."""
        return ()

    def parameter_roles(self) -> dict[str, Role]:
        """The encoder is the backbone; matrices are those of its blocks and of the mask head.
        Tokens, positions and scales do not decay."""
        kept = ("cls_token", "reg_token", "pos_embed", "ls1", "ls2")
        named = self.encoder.named_parameters()
        free = [p for name, p in named if name.rpartition(".")[2] in kept]
        blocks = (*self.encoder.blocks, self.mask_head)
        return parameter_roles(self, self.encoder, blocks, undecayed=free)

    @torch.no_grad()
    def anneal(self, progress: float) -> None:
        """Sets how many queries keep their mask, as training goes on.

        With n last blocks, the masks of block i fade from (i + 1) / (n + 2) of the training to
        (i + 2) / (n + 2), as 1 - the share of that way, to the power 0.9. Does nothing where the
        config has no `mask_annealing`.

        Args:
            progress: share of the training's steps that are done, in [0, 1].
        """
        if not self.config.mask_annealing:
            return
        n = self.config.num_blocks
        for i in range(n):
            left = min(max(i + 2 - (n + 2) * progress, 0.0), 1.0)
            self.attn_mask_probs[i].fill_(left**_POWER)

    def predict(self, pixel_values: Tensor) -> QueryLogits:
        """The last prediction without masks, as two factors, which inference needs no product of.

        Args:
            pixel_values: [B, C, S, S] floating, normalised.

        Returns:
            class logits [B, Q, K + 1], mask embeddings [B, Q, D] and features [B, D, h, w].

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        (prediction,), _ = self.all_predictions(pixel_values, last=True)
        return QueryLogits(*prediction)

    def all_predictions(
        self, pixel_values: Tensor, last: bool = False
    ) -> tuple[list[Prediction], Tensor]:
        """All predictions.

        Args:
            pixel_values: [B, C, S, S] floating, normalised.
            last: only the last prediction, without masks.

        Returns:
            the predictions before each of the last blocks and after them, and the tokens [B, T, D]
            after the norm, queries last.

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        found, x = self._tokens(pixel_values, last)
        return [*found, self._prediction(x)], x

    def _tokens(
        self, pixel_values: Tensor, last: bool, states: list[Tensor] | None = None
    ) -> tuple[list[Prediction], Tensor]:
        """All predictions but the last, and the normed tokens [B, T, D] that it comes from.
        `states` takes the tokens before each block, and the normed ones."""
        S, encoder = self.config.image_size, self.encoder
        shape = f"B {self.config.input.channels} H W"
        expect("EoMT", "pixel_values", pixel_values, shape, "float", {})
        if pixel_values.shape[2:] != (S, S) or pixel_values.shape[0] == 0:
            raise ValueError(
                f"EoMT: pixel_values must be [B >= 1, C, {S}, {S}], the size of the config "
                f"(image_size), got {got(pixel_values)}"
            )
        x = encoder.embed(pixel_values)
        turn = encoder.turn(pixel_values, self.config.num_queries)
        found, first = [], len(encoder.blocks) - self.config.num_blocks
        for i, block in enumerate(encoder.blocks):
            mask = None
            if states is not None:
                states.append(x)
            if i == first:
                queries = self.query.weight.to(x.dtype).expand(x.shape[0], -1, -1)
                x = torch.cat((x, queries), 1)
            if i >= first and not last:
                found.append(self._prediction(encoder.norm(x)))
                mask = self._mask(found[-1], self.attn_mask_probs[i - first])
            x = encoder.run(block, x, turn, mask)
        x = encoder.norm(x)
        if states is not None:
            states.append(x)
        return found, x

    def _prediction(self, x: Tensor) -> Prediction:
        """Of normed tokens [B, T, D]."""
        classes, embeddings, patches = self._factors(x)
        return Prediction(classes, embeddings, self.upscale(patches).movedim(3, 1))

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of normed tokens [B, T, D]: class logits, mask embeddings, patches [B, *, *, D]."""
        Q, P = self.config.num_queries, self.encoder.tokens
        patches, queries = x[:, P:-Q].unflatten(1, self.encoder.grid), x[:, -Q:]
        classes, embeddings = self.class_predictor(queries), queries
        for layer in self.mask_head[:-1]:
            if self.activation is None:
                embeddings = linear(embeddings, layer.weight, layer.bias, "gelu")
            else:
                embeddings = self.activation(layer(embeddings))
        return classes, self.mask_head[-1](embeddings), patches

    def _masks(self, embeddings: Tensor, patches: Tensor) -> Tensor:
        """[B, Q, h, w] of embeddings [B, Q, D] and patches [B, *, *, D]; no features are held."""
        for i, block in enumerate(self.upscale, 1):
            patches = block(patches, embeddings if i == len(self.upscale) else None)
        return patches if len(self.upscale) else masks_of(embeddings, patches)

    @torch.no_grad()
    def _mask(self, prediction: Prediction, share: Tensor) -> Mask:
        """What queries attend to: all that is no patch, and the patches in their mask; of queries
        drawn at random (all but `share` [] of them) all patches."""
        embeddings, features = prediction.embeddings, prediction.features
        drawn = torch.rand(embeddings.shape[:2], device=embeddings.device)
        kept = (drawn < share).to(embeddings.dtype)[..., None]
        # resized before the product, which is linear; a product with zeros is 0, which is open
        patches = F.interpolate(features, self.encoder.grid, mode="bilinear").flatten(2)
        others = self.encoder.tokens, self.config.num_queries
        return Mask(*mask_bits(embeddings * kept, F.pad(patches, others)))

    def loss(self, pixel_values: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss.

        Args:
            pixel_values: [B, C, S, S] floating, normalised.
            targets: of the same B images, on the same device.

        Returns:
            the weighted sum [], and "loss_cross_entropy", "loss_mask" and "loss_dice" of each
            prediction, [R] each, unweighted.
        """
        predictions, _ = self.all_predictions(pixel_values)
        return self._loss(predictions, targets)

    def _loss(
        self, predictions: list[Prediction], targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One prediction after the other, as each has maps of its own."""
        found = [
            self.criterion(p.classes[:, None], p.embeddings[:, None], p.features, targets)
            for p in predictions
        ]
        names = found[0][1]
        losses = {name: torch.cat([parts[name] for _, parts in found]) for name in names}
        return sum(loss for loss, _ in found), losses

    def forward(
        self,
        pixel_values: Tensor,  # [B, C, S, S]
        mask_labels: Sequence[Tensor] | None = None,  # B of [T_b, *, *]
        class_labels: Sequence[Tensor] | None = None,  # B of [T_b]
        patch_offsets: list[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        return_dict: bool | None = None,
        targets: Targets | None = None,
    ) -> EoMTOutput | tuple:
        """Predictions, and the loss if there are targets.

        Where the loss or the auxiliary logits are asked for, attention has the masks that
        `attn_mask_probs` says; else it has none.

        Args:
            pixel_values: [B, C, S, S] floating, normalised, padded to the right and below with
                black.
            mask_labels: for each image [T_b, *, *] of any dtype, 1 inside, 0 outside, 255 where a
                pixel has no weight; all of one size, that of the images or another, as both are
                seen at the same points. Together with `class_labels`.
            class_labels: for each image [T_b] integers in [0, K).
            patch_offsets: handed on, as in Hugging Face's model.
            output_hidden_states: also give the tokens before each block, and the last, normed.
            output_auxiliary_logits: also give the logits of the earlier predictions.
            return_dict: False gives a tuple of what is not None.
            targets: the same as the labels, packed; not together with them.

        Returns:
            An `EoMTOutput`.

        Raises:
            TypeError, ValueError: wrong dtype, shape or combination of arguments.
        """
        targets = given_targets(self, pixel_values, mask_labels, class_labels, targets)
        out, Q = EoMTOutput(patch_offsets=patch_offsets), self.config.num_queries
        states = [] if output_hidden_states else None
        if targets is None and not output_auxiliary_logits:
            _, x = self._tokens(pixel_values, last=True, states=states)
            out.class_queries_logits, embeddings, patches = self._factors(x)
            out.masks_queries_logits = self._masks(embeddings, patches)
        else:
            earlier, x = self._tokens(pixel_values, last=False, states=states)
            last = self._prediction(x)
            out.class_queries_logits = last.classes
            if targets is not None:
                out.loss, out.losses = self._loss([*earlier, last], targets)
            unread = targets is not None and not output_auxiliary_logits
            out.masks_queries_logits = last.product() if unread else last.product().tensor()
            if output_auxiliary_logits:
                out.auxiliary_logits = [
                    {
                        "class_queries_logits": p.classes,
                        "masks_queries_logits": p.product().tensor(),
                    }
                    for p in earlier
                ]
        out.last_hidden_state = x.roll(Q, 1)
        if states is not None:
            with_queries = tuple(state.roll(Q, 1) for state in states[-self.config.num_blocks :])
            out.hidden_states = (*states[: -self.config.num_blocks], *with_queries)
        return returned(out, return_dict)

    @classmethod
    def read_pretrained(
        cls, source: str | Path, num_labels: int | None
    ) -> tuple[dict, dict[str, Tensor]]:
        """Settings and weights of a checkpoint, by the names of the config and of the model.

        Args:
            source: a folder of Hugging Face's format, or a .bin, .pth or .ckpt file of the
                original code, of a model of DINOv2.
            num_labels: K of the new task, which then need not be that of the checkpoint.

        Raises:
            ValueError: a file is missing or is not what it should be.
        """
        if original.is_file(source):
            settings, weights = original.read_file(source)
        else:
            settings, weights = huggingface.read_folder(source, num_labels)
        # what some files leave out: a model that is handed on is trained to its end
        absent = {
            "attn_mask_probs": torch.zeros(settings["num_blocks"]),
            "criterion.empty_weight": class_weights(
                settings["num_labels"], settings.get("no_object_weight", 0.1)
            ),
        }
        return settings | {"local_start": False}, absent | weights

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, preprocessor_config.json and model.safetensors as transformers reads
        them.

        Args:
            folder: is made if it is not there.
        """
        settings = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        huggingface.write_folder(folder, settings, self.state_dict())

    def save_original(self, path: str | Path) -> None:
        """Writes the weights as the original code reads them.

        Args:
            path: ends in .bin, .pth or .ckpt; its folder is made if it is not there.

        Raises:
            ValueError: another suffix, or an encoder that is no DINOv2.
        """
        settings = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        original.write_file(path, settings, self.state_dict())
