"""OneFormer: one model, trained once, for panoptic, instance and semantic segmentation.

Letters: B image, H W image size, h w size of the finest map, R prediction, Q query, T target,
K class, C channels, M channels of the mask features, L token of a text, S sentence, N text.

    maps                           = backbone(image)
    mask features, pixels          = pixel decoder(maps)
    queries                        = task queries(the task's token, mask features)
    class logits, mask embeddings  = query decoder(pixels, mask features), from these queries
    mask logits                    = mask embeddings . mask features

    in training: text queries = text encoder(sentences about the image), near whose own queries
    should be, and far from those of other images

All but the task queries and the texts are Mask2Former's parts. A text encoder reads every sentence
once a step, K + 3 of them, whatever the images: an image's texts are rows of that table.
Source: OneFormer (Jain et al., CVPR 2023). Names of arguments, results and most settings are those
of Hugging Face transformers. Differs from transformers in training, where the paper's code does:
texts are read causally, each image has the sentences of its own classes alone, "a panoptic photo",
and the contrastive loss compares the images of all processes.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.backbones import build_backbone
from ...nn.contrastive import ContrastiveLoss
from ...nn.criterion import Criterion
from ...nn.pixel_decoder import PixelDecoder
from ...nn.query_decoder import QueryDecoder
from ...nn.task_queries import TaskQueries
from ...nn.text_encoder import TextEncoder
from ...ops._checks import expect, got
from ...structures.logits import QueryLogits
from ...structures.roles import Role, parameter_roles
from ...structures.targets import TASKS, Targets
from .. import manners
from ..query_output import (
    HiddenStates,
    Predictions,
    QueryOutput,
    expect_pixels,
    given_targets,
    maps_of,
    only_last,
    query_output,
)
from . import huggingface, original
from .config import OneFormerConfig
from .prompts import END, TASK_TOKENS, task_names

_TOKENS = (torch.int64, torch.int32, torch.float32, torch.float64)  # that hold every token


class OneFormer(nn.Module):
    """Backbone, pixel decoder, task queries, query decoder, text encoder and criterion.

    Args:
        config: what to build; weights are random, as the paper initialises them. Nothing is read
            from a file or the network. Those of convolutional backbones are channels-last in
            memory: for FSDP's `fully_shard` first call
            `model.to(memory_format=torch.contiguous_format)`.

    Raises:
        ValueError: the config's prompts are not those of its classes.
    """

    main_input_name = "pixel_values"
    config_class = OneFormerConfig
    from_pretrained = classmethod(manners.from_pretrained)
    device, dtype, num_parameters = manners.device, manners.dtype, manners.num_parameters
    class_head = (
        "query_decoder.class_embed.weight",
        "query_decoder.class_embed.bias",
        "criterion.empty_weight",
    )
    deep_supervision = True
    training_parts = ("text_encoder",)

    def __init__(self, config: OneFormerConfig):
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config, config.input.channels)
        sizes = {
            "channels": config.hidden_dim,
            "mask_channels": config.mask_feature_size,
            "heads": config.num_attention_heads,
        }
        self.pixel_decoder = PixelDecoder(
            self.backbone.channels,
            layers=config.encoder_layers,
            points=config.num_points_encoder,
            feedforward=config.encoder_feedforward_dim,
            dropout=config.dropout,
            **sizes,
        )
        self.task_queries = TaskQueries(
            config.task_seq_len,
            layers=config.query_dec_layers,
            feedforward=config.dim_feedforward,
            dropout=config.dropout,
            **sizes,
        )
        self.query_decoder = QueryDecoder(
            config.num_labels,
            queries=config.num_queries,
            layers=config.decoder_layers,
            feedforward=config.dim_feedforward,
            learned=False,
            **sizes,
        )
        self.text_encoder = None
        if config.is_training:
            self.text_encoder = TextEncoder(
                config.text_encoder_vocab_size,
                config.text_encoder_context_length,
                config.text_encoder_width,
                config.text_encoder_num_layers,
                config.hidden_dim,
                config.text_encoder_proj_layers,
                config.text_encoder_n_ctx,
            )
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
        self.contrastive = ContrastiveLoss(config.contrastive_temperature)
        # without texts nothing learns it, and DDP waits for the gradient of all that may learn
        self.contrastive.requires_grad_(config.is_training)
        sentences = config.sentences if config.is_training else ()
        if sentences and len(sentences) != config.num_labels + len(TASKS):
            raise ValueError(
                f"OneFormer: prompts must be {config.num_labels + len(TASKS)} rows of tokens, one "
                f"a class and a task, got {len(sentences)}; config.with_prompts makes them anew"
            )
        for name, rows in self._tables().items():
            self.register_buffer(name, rows, persistent=False)

    def _tables(self) -> dict[str, Tensor | None]:
        """Tokens of the tasks [3, L], and of the sentences [K + 3, L], which no file holds."""
        sentences = self.config.sentences if self.config.is_training else ()
        return {
            "task_rows": _padded([TASK_TOKENS[t] for t in TASKS], self.config.task_seq_len),
            "sentences": _padded(sentences, max(map(len, sentences))) if sentences else None,
        }

    def _apply(self, fn, recurse=True):
        """What `to` and `to_empty` do; the latter leaves in new memory what was there before."""
        before = self.task_rows
        super()._apply(fn, recurse)
        if self.task_rows is not before:
            with torch.device("cpu"):
                tables = self._tables()
            for name, rows in tables.items():
                if rows is not None:
                    getattr(self, name).copy_(rows)
        return self

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """For backward keep only the inputs of the backbone's blocks and of the pixel decoder's
        layers, and compute the rest again.

        Args:
            enable: False keeps everything, as at the start.
        """
        self.pixel_decoder.checkpointing = enable
        if hasattr(self.backbone, "set_grad_checkpointing"):  # not for small images
            self.backbone.set_grad_checkpointing(enable)

    def inputs(self, task: str, batch: int) -> tuple[Tensor, ...]:
        """The tokens [B, L] int64 that name a task to `predict`."""
        return (self.task_inputs(task, batch),)

    def task_inputs(self, tasks: str | Sequence[str], batch: int) -> Tensor:
        """The tokens that name tasks.

        Args:
            tasks: "panoptic", "instance" or "semantic", of all images or one for each; or their
                sentences, such as "the task is panoptic", which processors of pictures give.
            batch: B.

        Returns:
            [B, L] int64.

        Raises:
            ValueError: no such task, or not as many as images.
        """
        named = task_names(tasks, batch)
        if len(set(named)) == 1:  # no copy from the host: a CUDA graph may hold it
            return self.task_rows[TASKS.index(named[0])].expand(batch, -1)
        return self.task_rows[[TASKS.index(task) for task in named]]

    def predict(self, pixel_values: Tensor, task_inputs: Tensor) -> QueryLogits:
        """The last prediction, with the masks as two factors, which inference needs no product of.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, zero-padded to the right and below.
            task_inputs: [B, L] tokens of tasks, of `inputs`.

        Returns:
            class logits [B, Q, K + 1], mask embeddings [B, Q, M] and features [B, M, h, w].

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        class_logits, embeddings, features, _ = self.all_predictions(
            pixel_values, task_inputs, last=True
        )
        return QueryLogits(class_logits[:, -1], embeddings[:, -1], features)

    def parameter_roles(self) -> dict[str, Role]:
        """Matrices are those of the backbone and of the decoders' and the text encoder's layers;
        Swin's tables of position biases do not decay."""
        name = "relative_position_bias_table"
        tables = [p for path, p in self.backbone.named_parameters() if path.endswith(name)]
        decoder = self.query_decoder
        blocks = [self.backbone, self.pixel_decoder.layers, self.task_queries.layers]
        blocks += [decoder.layers, decoder.mask_embed]
        if self.text_encoder is not None:
            blocks.append(self.text_encoder.layers)
        return parameter_roles(self, self.backbone, blocks, undecayed=tables)

    def all_predictions(
        self, pixel_values: Tensor, task_inputs: Tensor, last: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All predictions, with the masks as two factors.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, zero-padded to the right and below.
            task_inputs: [B, L] tokens of tasks.
            last: only the last prediction, R = 1.

        Returns:
            class logits [B, R, Q, K + 1], mask embeddings [B, R, Q, M], mask features [B, M, h, w]
            and the queries [B, Q, C] before the query decoder; mask logits are the product of the
            second and third over M.

        Raises:
            TypeError, ValueError: wrong dtype or shape.
        """
        found = self._predictions(pixel_values, task_inputs, last)
        return *found[:3], found.hidden.decoder[0]

    def _predictions(
        self, pixel_values: Tensor, task_inputs: Tensor, last: bool, hidden: bool = False
    ) -> Predictions:
        """As `all_predictions`; with `hidden` no map is dropped that was computed on the way."""
        expect_pixels(self, pixel_values)
        shape = (pixel_values.shape[0], self.config.task_seq_len)
        if not isinstance(task_inputs, Tensor) or task_inputs.shape != shape:
            raise ValueError(
                f"OneFormer: task_inputs must be tokens {list(shape)}, got {got(task_inputs)}"
            )
        if task_inputs.dtype not in _TOKENS:
            raise TypeError(
                "OneFormer: task_inputs must be int64, int32, float32 or float64, others cannot "
                f"hold tokens up to {END}, got {got(task_inputs)}"
            )
        decoder = self.query_decoder
        token = self.task_queries.token(task_inputs, decoder.norm)
        maps = self.backbone(pixel_values)
        encoder = tuple(maps if hidden else maps[-1:])
        features, pixels, shapes = self.pixel_decoder(maps)
        del maps  # the large ones are not held while queries are decoded
        start = self.task_queries(token, decoder.query_embed.weight[:-1], features)
        classes, embeddings, states = decoder.run(pixels, shapes, features, last, start)
        levels = maps_of(pixels, shapes) if hidden else ()
        states = HiddenStates(encoder, levels, states, features)
        return Predictions(classes, embeddings, features, states)

    def text_queries(self, targets: Targets) -> Tensor:
        """What the sentences about images say [B, Q, C]: one of each target, in the order of their
        classes, then those of the task.

        Args:
            targets: with `task`.
        """
        K, n = self.config.num_labels, self.config.num_queries - self.config.text_encoder_n_ctx
        slots = torch.arange(targets.labels.shape[1], device=targets.labels.device)
        there = slots < targets.count[:, None]
        rows = targets.labels.where(there, K).sort(1).values[:, :n]
        rows = F.pad(rows, (0, n - rows.shape[1]), value=K)
        rows = rows.where(rows < K, K + targets.task[:, None])
        return self.text_encoder.queries(self.text_encoder(self.sentences)[rows])

    def loss(self, pixel_values: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss.

        Args:
            pixel_values: [B, C, H, W] floating, normalised.
            targets: of the same B images, on the same device, each those of its `task`.

        Returns:
            the weighted sum [], and "loss_cross_entropy", "loss_mask" and "loss_dice" of each
            prediction, [R] each, and, with a text encoder, "loss_contrastive" [1], unweighted.

        Raises:
            ValueError: targets name no tasks, or the tokens of sentences are not known.
        """
        if targets.task is None:
            raise ValueError(
                "OneFormer: targets.task must say what is to be found in each image, got None"
            )
        found = self._predictions(pixel_values, self._named(targets), last=False)
        return self._losses(found, targets, None)

    def _named(self, targets: Targets) -> Tensor:
        """The tokens [B, L] of the tasks that targets name."""
        sizes = {"B": len(targets.labels)}
        expect("OneFormer", "targets.task", targets.task, "B", "int64", sizes)
        return self.task_rows[targets.task]

    def _losses(
        self, found: Predictions, targets: Targets, text_inputs: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, losses = self.criterion(*found[:3], targets)
        queries = found.hidden.decoder[0]
        if self.text_encoder is None:
            return total, losses
        if text_inputs is not None:
            texts = self.text_encoder.queries(self._read(text_inputs, queries))
        elif self.sentences is not None:
            texts = self.text_queries(targets)
        else:
            raise ValueError(
                "OneFormer: prompts must hold the tokens of the classes' sentences to train, and "
                "are empty: config.with_prompts(names) makes them"
            )
        loss = self.contrastive(queries, texts)
        return total + self.config.contrastive_weight * loss, losses | {
            "loss_contrastive": loss[None]
        }

    def _read(self, text_inputs: Tensor, queries: Tensor) -> Tensor:
        """Texts [B, N, C] of tokens [B, N, L]."""
        B, Q, _ = queries.shape
        sizes = {"B": B, "Q-n_ctx": Q - self.config.text_encoder_n_ctx}
        expect("OneFormer", "text_inputs", text_inputs, "B Q-n_ctx L", "int64", sizes)
        if sizes["L"] > (most := self.config.text_encoder_context_length):
            raise ValueError(
                f"OneFormer: text_inputs must have at most {most} tokens a text, "
                f"got {got(text_inputs)}"
            )
        return self.text_encoder(text_inputs.flatten(0, 1)).unflatten(0, text_inputs.shape[:2])

    def forward(
        self,
        pixel_values: Tensor,  # [B, C, H, W]
        task_inputs: Tensor | str | Sequence[str] | None = None,  # [B, L]
        text_inputs: Tensor | None = None,  # [B, N, L]
        mask_labels: Sequence[Tensor] | None = None,  # B of [T_b, *, *]
        class_labels: Sequence[Tensor] | None = None,  # B of [T_b]
        pixel_mask: Tensor | None = None,  # [B, H, W]
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        return_dict: bool | None = None,
        targets: Targets | None = None,
    ) -> QueryOutput | tuple:
        """Predictions, and the loss if there are targets.

        Args:
            pixel_values: [B, C, H, W] floating, normalised, zero-padded to the right and below.
            task_inputs: "panoptic", "instance" or "semantic", or one for each image, their
                sentences, as of `task_inputs`, or tokens [B, L]; None takes those of the
                targets, or "panoptic" where there are none.
            text_inputs: tokens of an image's sentences, Q less the learned text queries; None
                takes those of its targets' classes. Without targets or text encoder not read.
            mask_labels: for each image [T_b, *, *] of any dtype, those of its task: 1 inside, 0
                outside, 255 where a pixel has no weight; all of one size, that of the images or
                another. Together with `class_labels`.
            class_labels: for each image [T_b] integers in [0, K).
            pixel_mask: taken for Hugging Face's sake and not used: padding is not masked in
                OneFormer.
            output_hidden_states: also give what is computed on the way.
            output_auxiliary_logits: also return the logits of the earlier predictions.
            return_dict: False gives a tuple of what is not None.
            targets: the same as the labels, packed; not together with them. Their `task`, if any,
                chooses the sentences of the texts, and `task_inputs` must name the same.

        Returns:
            A `OneFormerOutput`; `losses` has "loss_contrastive" [1] where there is a text encoder.

        Raises:
            TypeError, ValueError: wrong dtype, shape or combination of arguments.
        """
        targets = given_targets(self, pixel_values, mask_labels, class_labels, targets)
        told = targets is not None and targets.task is not None
        named = self._named(targets) if told else None
        if task_inputs is None:
            task_inputs = "panoptic" if named is None else named
        if not isinstance(task_inputs, Tensor):
            task_inputs = self.task_inputs(task_inputs, pixel_values.shape[0])
        last = only_last(self, targets, output_auxiliary_logits)
        found = self._predictions(pixel_values, task_inputs, last, bool(output_hidden_states))
        losses = None
        if targets is not None:
            if targets.task is None:  # of other words than the three the first
                same = (task_inputs[:, None] == self.task_rows).all(2)
                targets = targets._replace(task=same.int().argmax(1))
            losses = self._losses(found, targets, text_inputs)
        options = output_auxiliary_logits, output_hidden_states, return_dict
        return query_output(self, found, targets, *options, losses)

    @classmethod
    def read_pretrained(
        cls, source: str | Path, num_labels: int | None
    ) -> tuple[dict, dict[str, Tensor]]:
        """Settings and weights of a checkpoint, by the names of the config and of the model.

        Args:
            source: a folder of Hugging Face's format, or a .pth or .pkl file of the original code.
            num_labels: K of the new task, which then need not be that of the checkpoint.

        Raises:
            ValueError: a file is missing or is not what it should be.
        """
        if Path(source).suffix in original.SUFFIXES:
            return original.read_file(source)
        return huggingface.read_folder(source, num_labels)

    def save_pretrained(self, folder: str | Path, text_encoder: bool = True) -> None:
        """Writes config.json and model.safetensors as transformers reads them.

        Args:
            folder: is made if it is not there.
            text_encoder: whether that is written, too, where there is one: transformers then wants
                texts even in inference.
        """
        config, state = self.config, self.state_dict()
        if not text_encoder:
            config = replace(config, is_training=False)
            state = {k: v for k, v in state.items() if not k.startswith("text_encoder.")}
        settings = {f.name: getattr(config, f.name) for f in fields(config)}
        huggingface.write_folder(folder, settings, state)


def _padded(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """[n, length] int64, with zeros behind each row."""
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
