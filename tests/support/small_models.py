"""A small model of each kind."""

from segkern.models import (
    EoMT,
    EoMTConfig,
    Mask2Former,
    Mask2FormerConfig,
    MaskFormer,
    MaskFormerConfig,
    OneFormer,
    OneFormerConfig,
    SegFormer,
    SegFormerConfig,
    Segmenter,
    SegmenterConfig,
    Seq2Seg,
    Seq2SegConfig,
    UNet,
    UNetConfig,
)


def queries(num_labels=3, **changes):
    """A small Mask2Former."""
    sizes = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 32)
    sizes |= {"backbone": "resnet_digits", "backbone_options": {"channels": (8, 8, 8, 8)}}
    sizes |= {"num_queries": 4, "encoder_layers": 1, "decoder_layers": 1, "dim_feedforward": 16}
    return Mask2Former(Mask2FormerConfig(num_labels, **(sizes | changes)))


def pyramid(num_labels=3, **changes):
    """A small MaskFormer."""
    sizes = dict.fromkeys(("hidden_dim", "fpn_feature_size", "mask_feature_size"), 32)
    sizes |= {"backbone": "resnet_digits", "backbone_options": {"channels": (8, 8, 8, 8)}}
    sizes |= {"num_queries": 4, "decoder_layers": 2, "dim_feedforward": 16, "dropout": 0.0}
    return MaskFormer(MaskFormerConfig(num_labels, **(sizes | changes)))


def tasks(num_labels=3, **changes):
    """A small OneFormer that trains."""
    sizes = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 64)
    sizes |= {"backbone": "resnet_digits", "backbone_options": {"channels": (8, 8, 8, 8)}}
    sizes |= {"num_queries": 4, "encoder_layers": 1, "decoder_layers": 1, "dim_feedforward": 16}
    sizes |= {"query_dec_layers": 1, "dropout": 0.0, "is_training": True, "tokens": "words"}
    sizes |= {"text_encoder_width": 64, "text_encoder_num_layers": 1, "text_encoder_n_ctx": 1}
    sizes |= {"text_encoder_vocab_size": 64}
    return OneFormer(OneFormerConfig(num_labels, **(sizes | changes)))


def pixels(num_labels=3, **changes):
    """A small Segmenter."""
    sizes = {"image_size": (32, 32), "embed_dim": 64, "depth": 1, "num_heads": 1}
    return Segmenter(SegmenterConfig(num_labels, **(sizes | changes)))


def levels(num_labels=3, **changes):
    """A small SegFormer."""
    sizes = {"hidden_sizes": (4, 8, 10, 16), "depths": (1, 1, 1, 1), "decoder_hidden_size": 8}
    return SegFormer(SegFormerConfig(num_labels, **(sizes | changes)))


def sequence(num_labels=3, head="semantic", **changes):
    """A small Seq2Seg."""
    sizes = {"image_size": (32, 32), "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16, "num_queries": 4}
    return Seq2Seg(Seq2SegConfig(num_labels, head, **(sizes | changes)))


def convolutions(num_labels=3, head="semantic", **changes):
    """A small U-Net."""
    sizes = {"image_size": (32, 32), "channels": 4, "depth": 2, "num_queries": 4}
    return UNet(UNetConfig(num_labels, head, **(sizes | changes)))


def tokens(num_labels=3, **changes):
    """A small EoMT."""
    sizes = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_blocks": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 64, "num_queries": 4}
    return EoMT(EoMTConfig(num_labels, **(sizes | changes)))


SWIN = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
DINAT = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
DINAT |= {"kernel_size": 3, "dilations": ((2,), (1,), (1,), (1,))}
EXPORTED = {  # what differs in an export: kinds, heads and backbones
    "Mask2Former, ResNet": queries,
    "Mask2Former, Swin": lambda: queries(backbone="swin_tiny", backbone_options=SWIN),
    "Mask2Former, DiNAT": lambda: queries(backbone="dinat_mini", backbone_options=DINAT),
    "MaskFormer": pyramid,
    "OneFormer": tasks,
    "Segmenter": pixels,
    "SegFormer": levels,
    "Seq2Seg, semantic": sequence,
    "Seq2Seg, instance": lambda: sequence(head="instance"),
    "Seq2Seg, classes under masks": lambda: sequence(
        head="instance", mask="fine", class_from="mask"
    ),
    "U-Net, semantic": convolutions,
    "U-Net, instance": lambda: convolutions(head="instance"),
    "U-Net, classes under masks": lambda: convolutions(head="instance", class_from="mask"),
    "EoMT": tokens,
}
