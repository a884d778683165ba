"""The settings of OneFormer, and the presets of its paper."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from ...structures.labels import CLASS_NAMES, DATASETS, IMAGENET_MEAN, IMAGENET_STD, Labels
from ...structures.logits import QueryLogits
from ...structures.processing import Processing
from ...structures.settings import InputConfig, Options
from ...structures.targets import TASKS
from .. import manners
from ..mask2former.config import BACKBONES as _BACKBONES
from .prompts import TASK_TOKENS, Tokenizer, hashed_words, known_words, open_tokenizer, token_rows

BACKBONES = {
    name: _BACKBONES[name] for name in ("resnet50", "swin_tiny", "swin_small", "swin_large")
}
_HEAD = 64  # channels of a head of the text encoder


@dataclass
class OneFormerConfig:
    """Everything that shapes a `OneFormer` and its loss.

    Attributes:
        num_labels: K, at least 1; "no object" is not counted.
        backbone: "swin_tiny", "swin_small", "swin_base", "swin_large", "dinat_mini", "dinat_tiny",
            "dinat_small", "dinat_base", "dinat_large", "resnet_digits", or any timm model with
            four feature maps.
        backbone_pretrained: start from timm's ImageNet weights, which are downloaded; those of
            swin_base and swin_large are of ImageNet-22k.
        backbone_options: further arguments of the backbone, such as Swin's depths.
        drop_path_rate: rate of dropped residual branches of the last block, in [0, 1).
        num_queries: Q, the task's own among them; more than `text_encoder_n_ctx`.
        hidden_dim: channels of the query decoder, a multiple of 32 and of `num_attention_heads`.
        feature_size: channels of the pixel decoder; must equal `hidden_dim`, as in every published
            model.
        mask_feature_size: M.
        encoder_layers: layers of the pixel decoder.
        decoder_layers: layers of the query decoder (Hugging Face counts one more).
        query_dec_layers: layers that make queries of the task's token.
        num_attention_heads: heads of all of these.
        num_points_encoder: places that a head looks at in each level.
        encoder_feedforward_dim: width of the pixel decoder's feed-forward networks.
        dim_feedforward: width of the others' feed-forward networks.
        dropout: probability in the pixel decoder and in `query_dec_layers`; the query decoder has
            none.
        task_seq_len: length of the row of tokens that names a task.
        is_training: whether there is a text encoder, which training alone needs: without it the
            contrastive loss is left out.
        text_encoder_width: channels of the text encoder, a multiple of 64, which are a head's;
            `hidden_dim` where there are learned text queries.
        text_encoder_context_length: the most tokens of a sentence.
        text_encoder_num_layers: layers of the text encoder.
        text_encoder_vocab_size: numbers of tokens there are.
        text_encoder_proj_layers: layers that make text queries of its results.
        text_encoder_n_ctx: number of learned text queries.
        tokens: of sentences: "clip", numbers of CLIP's vocabulary, or "words", a scheme of our own
            that needs no vocabulary, for models that are trained from scratch.
        prompts: tokens of the sentences of K classes and three tasks, made by `with_prompts`; ()
            where the model does not train, or its tokens are "words".
        train_num_points: points of a mask in matching and loss.
        oversample_ratio: candidates drawn for each point of the loss, at least 1.
        importance_sample_ratio: share of the points that are the most uncertain candidates, in [0,
            1].
        class_weight, mask_weight, dice_weight: of the losses and costs of classes and masks.
        contrastive_weight: of the loss between queries and text queries.
        contrastive_temperature: of that loss at the start, above 0; it is learned.
        no_object_weight: weight of "no object" in the class loss.
        id2label: name of each label.
        stuff: labels that have no instances.
        image_mean: of the pixels in [0, 1], red, green, blue; or of as many channels as the
            pictures have, which is then what the first convolution takes.
        image_std: likewise.
        shortest_edge: pixels, to which an image's short side is resized for prediction; None where
            `processing` has another size.
        longest_edge: pixels, the most that the long side may get; None for no limit.
        size_divisor: sides of a batch are padded to a multiple of it.
        processing: what else a checkpoint's preprocessor_config.json says (`Processing`).
    """

    to_dict, to_json_string = manners.to_dict, manners.to_json_string
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["losses"]  # read by transformers' Trainer
    kind: ClassVar[str] = "oneformer"
    tasks: ClassVar[tuple[str, ...]] = TASKS
    logits: ClassVar[type] = QueryLogits
    joint_tasks: ClassVar[bool] = True  # trains on all tasks, each with its own targets

    num_labels: int = 150
    backbone: str = "swin_tiny"
    backbone_pretrained: bool = False
    backbone_options: dict = field(default_factory=dict)
    drop_path_rate: float = 0.0
    num_queries: int = 150
    hidden_dim: int = 256
    feature_size: int = 256
    mask_feature_size: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 9
    query_dec_layers: int = 2
    num_attention_heads: int = 8
    num_points_encoder: int = 4
    encoder_feedforward_dim: int = 1024
    dim_feedforward: int = 2048
    dropout: float = 0.1
    task_seq_len: int = 77
    is_training: bool = False
    text_encoder_width: int = 256
    text_encoder_context_length: int = 77
    text_encoder_num_layers: int = 6
    text_encoder_vocab_size: int = 49408
    text_encoder_proj_layers: int = 2
    text_encoder_n_ctx: int = 16
    tokens: str = "clip"
    prompts: tuple[tuple[int, ...], ...] = ()
    train_num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    contrastive_weight: float = 0.5
    contrastive_temperature: float = 0.07
    no_object_weight: float = 0.1
    id2label: dict[int, str] | None = None
    stuff: tuple[int, ...] = ()
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    shortest_edge: int | None = 800
    longest_edge: int | None = 1333
    size_divisor: int = 32
    processing: Processing = field(default_factory=Processing)

    def __post_init__(self):
        self.processing = Processing.of(self.processing)
        self.prompts = tuple(tuple(row) for row in self.prompts)
        positive = (
            "num_labels hidden_dim mask_feature_size decoder_layers query_dec_layers "
            "num_attention_heads num_points_encoder train_num_points oversample_ratio "
            "size_divisor text_encoder_num_layers text_encoder_proj_layers "
            "text_encoder_context_length"
        )
        longest = max(map(len, TASK_TOKENS.values()))
        for names, least in (
            (positive, 1),
            ("num_queries", self.text_encoder_n_ctx + 1 if self.is_training else 2),
            ("text_encoder_n_ctx contrastive_weight", 0),
            ("task_seq_len", longest),
            ("text_encoder_vocab_size", 4),
        ):
            for name in names.split():
                if not getattr(self, name) >= least:
                    raise ValueError(
                        f"OneFormerConfig: {name} must be >= {least}, got {getattr(self, name)}"
                    )
        if not self.contrastive_temperature > 0:
            raise ValueError(
                "OneFormerConfig: contrastive_temperature must be > 0, "
                f"got {self.contrastive_temperature}"
            )
        if self.hidden_dim % 32 or self.hidden_dim % self.num_attention_heads:
            raise ValueError(
                "OneFormerConfig: hidden_dim must be a multiple of 32 and of "
                f"num_attention_heads ({self.num_attention_heads}), got {self.hidden_dim}"
            )
        if self.feature_size != self.hidden_dim:
            raise ValueError(
                f"OneFormerConfig: feature_size must equal hidden_dim ({self.hidden_dim}), "
                f"got {self.feature_size}"
            )
        width = self.text_encoder_width
        if width < _HEAD or width % _HEAD:
            raise ValueError(
                f"OneFormerConfig: text_encoder_width must be a multiple of {_HEAD}, got {width}"
            )
        if self.is_training and self.text_encoder_n_ctx and width != self.hidden_dim:
            raise ValueError(
                f"OneFormerConfig: text_encoder_width must equal hidden_dim ({self.hidden_dim}) "
                f"where text_encoder_n_ctx is not 0, got {width}"
            )
        for name in ("importance_sample_ratio", "dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"OneFormerConfig: {name} must be in [0, 1], got {getattr(self, name)}"
                )
        if self.tokens not in ("clip", "words"):
            raise ValueError(f"OneFormerConfig: tokens must be clip or words, got {self.tokens!r}")
        longest, largest = self.text_encoder_context_length, self.text_encoder_vocab_size - 1
        for row in self.prompts if self.is_training else ():
            if not 0 < len(row) <= longest or not 0 <= min(row) <= max(row) <= largest:
                raise ValueError(
                    f"OneFormerConfig: prompts must be rows of 1 to {longest} tokens in [0, "
                    f"{largest}], got {row}; with_prompts makes them anew"
                )
        _ = self.input  # checks its own

    @property
    def labels(self) -> Labels:
        """Names of the labels, and which are stuff."""
        return Labels(self.id2label, tuple(self.stuff))

    @property
    def input(self) -> InputConfig:
        """How images are taken: whole, resized between the edges or as `processing` says."""
        return self.processing.input(
            InputConfig(
                self.image_mean,
                self.image_std,
                self.shortest_edge,
                self.longest_edge,
                self.size_divisor,
            )
        )

    @property
    def options(self) -> dict[str, Options]:
        """What stands for options of a result that are not given, as in the paper's code."""
        return {
            "panoptic": Options(threshold=0.5, overlap_threshold=0.8),
            "instance": Options(top_k=self.num_queries),
        }

    @property
    def sentences(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of the sentences of K classes and three tasks; () where they are not known."""
        if self.prompts or self.tokens == "clip":
            return self.prompts
        names = self.id2label or {k: str(k) for k in range(self.num_labels)}
        own = hashed_words(self.text_encoder_vocab_size)
        return self._rows([names[k] for k in sorted(names)], own)

    def with_prompts(
        self, names: Sequence[str] | None = None, tokenizer: Tokenizer | str | Path | None = None
    ) -> "OneFormerConfig":
        """The same, made to train: with a text encoder, and with the tokens of its sentences.

        Args:
            names: of the K classes; None takes those of `id2label`.
            tokenizer: text to CLIP's ids, such as transformers' CLIPTokenizer, or the folder of
                one. None knows the words of the classes of COCO, ADE20K, Cityscapes and
                PASCAL-Context. Of a model whose tokens are "words" it must be None.

        Returns:
            A `OneFormerConfig`.

        Raises:
            ValueError: no names, not K of them, or words whose tokens are not known.
            ImportError: the folder's files need a library that is not there.
        """
        if names is None and self.id2label is not None:
            names = [self.id2label[k] for k in sorted(self.id2label)]
        if names is None or len(names) != self.num_labels:
            raise ValueError(
                f"OneFormerConfig.with_prompts: names must be {self.num_labels}, one a label, "
                f"got {names if names is None else len(names)}"
            )
        named = {"is_training": True, "id2label": dict(enumerate(names))}
        if self.tokens == "words":
            if tokenizer is not None:
                raise ValueError(
                    "OneFormerConfig.with_prompts: tokenizer must be None where tokens are "
                    f"'words', got {tokenizer!r}"
                )
            return replace(self, prompts=(), **named)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = open_tokenizer(tokenizer)
        return replace(self, prompts=self._rows(names, tokenizer or known_words), **named)

    def _rows(self, names: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
        sizes = self.text_encoder_context_length, self.text_encoder_vocab_size
        return token_rows(names, tokenizer, *sizes)

    @classmethod
    def preset(cls, backbone: str, dataset: str = "ade20k"):
        """The configurations of the paper, with the names of the classes; `with_prompts` makes one
        that trains.

        Args:
            backbone: "resnet50", "swin_tiny", "swin_small" or "swin_large".
            dataset: "ade20k", "coco" or "cityscapes".

        Returns:
            A `OneFormerConfig`.

        Raises:
            ValueError: no such preset.
        """
        if backbone not in BACKBONES or dataset not in CLASS_NAMES:
            raise ValueError(
                f"OneFormerConfig.preset: backbone must be one of {', '.join(BACKBONES)}, "
                f"dataset one of {', '.join(CLASS_NAMES)}, got {backbone}, {dataset}"
            )
        facts, large = DATASETS[dataset], backbone == "swin_large"
        shortest, longest = facts.edges
        if large and dataset == "ade20k":
            shortest, longest = 640, 2560
        return cls(
            num_labels=facts.labels["panoptic"],
            id2label=dict(enumerate(CLASS_NAMES[dataset])),
            stuff=facts.stuff,
            num_queries=250 if large and dataset != "coco" else 150,
            shortest_edge=shortest,
            longest_edge=longest,
            **deepcopy(BACKBONES[backbone]),
        )

    @classmethod
    def tiny(cls, num_labels: int):
        """A model for images of about 64 x 64 pixels that trains on a laptop, with masks at half
        the image's size. It reads words by a scheme of our own, without a vocabulary.

        Args:
            num_labels: K.

        Returns:
            A `OneFormerConfig`.
        """
        return cls(
            num_labels=num_labels,
            backbone="resnet_digits",
            num_queries=10,
            hidden_dim=64,
            feature_size=64,
            mask_feature_size=64,
            encoder_layers=1,
            decoder_layers=3,
            query_dec_layers=1,
            encoder_feedforward_dim=256,
            dim_feedforward=256,
            dropout=0.0,
            is_training=True,
            text_encoder_width=64,
            text_encoder_context_length=16,
            text_encoder_num_layers=2,
            text_encoder_vocab_size=1024,
            text_encoder_n_ctx=2,
            tokens="words",
            train_num_points=512,
            class_weight=5.0,
            mask_weight=2.0,
            dice_weight=5.0,
            shortest_edge=64,
            longest_edge=128,
            size_divisor=16,
        )
