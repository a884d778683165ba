"""Tiny models of transformers with random weights, and inputs and labels for them."""

import torch
import transformers as T
from torch import nn

from .inputs import random_targets

STAGES = ["stage1", "stage2", "stage3", "stage4"]
LABELS, POINTS = 7, 60
SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "out_features": STAGES}
SWIN |= {"drop_path_rate": 0.0}
MASKS = {"num_labels": LABELS, "train_num_points": POINTS}
RESNET = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16], "embedding_size": 8}
DETR = {"d_model": 32, "num_queries": 5, "num_labels": LABELS, "encoder_layers": 1}
DETR |= {"decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
DETR |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0.0}


def mask2former(**settings) -> nn.Module:
    config = T.Mask2FormerConfig(
        backbone_config=T.SwinConfig(**SWIN),
        **({"num_queries": 9, "hidden_dim": 32, "feature_size": 32} | settings),
        **MASKS,
        mask_feature_size=32,
        encoder_layers=2,
        decoder_layers=5,
        num_attention_heads=2,
        dim_feedforward=48,
        encoder_feedforward_dim=40,
    )
    return T.Mask2FormerForUniversalSegmentation(config)


def maskformer(dropout: float = 0.0) -> nn.Module:
    decoder = {"num_queries": 9, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 40}
    decoder |= {"model_type": "detr", "decoder_attention_heads": 2, "dropout": dropout}
    config = T.MaskFormerConfig(
        backbone_config=T.SwinConfig(**SWIN),
        decoder_config=decoder,
        num_labels=LABELS,
        fpn_feature_size=32,
        mask_feature_size=24,
    )
    return T.MaskFormerForInstanceSegmentation(config)


OWN = {"num_queries": 9, "is_training": False, "dropout": 0.0, "hidden_dim": 32, "conv_dim": 32}
OWN |= {"mask_dim": 32}


def oneformer(**settings) -> nn.Module:
    config = T.OneFormerConfig(
        backbone_config=T.SwinConfig(**SWIN),
        **(OWN | settings),
        **MASKS,
        encoder_layers=2,
        decoder_layers=4,
        num_attention_heads=2,
        dim_feedforward=48,
        encoder_feedforward_dim=40,
        task_seq_len=8,
        text_encoder_width=64,
        text_encoder_n_ctx=2,
        text_encoder_num_layers=1,
        text_encoder_proj_layers=1,
        text_encoder_context_length=8,
        text_encoder_vocab_size=50,
        max_seq_len=8,
    )
    return T.OneFormerForUniversalSegmentation(config)


def segformer(**settings) -> nn.Module:
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 24}
    plain = {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}
    config = T.SegformerConfig(
        num_labels=LABELS, num_attention_heads=[1, 2, 2, 4], **sizes, **(plain | settings)
    )
    return T.SegformerForSemanticSegmentation(config)


def eomt(**settings) -> nn.Module:
    config = T.EomtConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        num_queries=9,
        num_blocks=2,
        num_upscale_blocks=2,
        num_register_tokens=2,
        **MASKS,
        **settings,
    )
    return T.EomtForUniversalSegmentation(config)


def resnet(**settings) -> T.ResNetConfig:
    return T.ResNetConfig(**RESNET, out_features=STAGES[1:], **settings)


def deformable_detr() -> nn.Module:
    config = T.DeformableDetrConfig(
        backbone_config=resnet(),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        **DETR,
        encoder_n_points=2,
        decoder_n_points=3,
    )
    return T.DeformableDetrForObjectDetection(config)


def rt_detr(kind: str = "RTDetr") -> nn.Module:
    config = getattr(T, f"{kind}Config")(
        backbone_config=T.RTDetrResNetConfig(
            **RESNET, layer_type="basic", out_features=STAGES[1:]
        ),
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 16, 16],
        feat_strides=[8, 16, 32],
        **{k: v for k, v in DETR.items() if k != "dropout"},
        decoder_in_channels=[32, 32, 32],
        num_feature_levels=3,
        decoder_n_points=3,
        num_denoising=0,
    )
    return getattr(T, f"{kind}ForObjectDetection")(config)


def rt_detr_v2() -> nn.Module:
    return rt_detr("RTDetrV2")


def d_fine() -> nn.Module:
    config = T.DFineConfig(
        backbone_config=T.HGNetV2Config(
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 16, 16, 16],
            stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=[16, 16, 16, 16],
            stage_num_blocks=[1, 1, 1, 1],
            stage_numb_of_layers=[1, 1, 1, 1],
            embedding_size=8,
            hidden_sizes=[16, 16, 16, 16],
            depths=[1, 1, 1, 1],
            out_features=STAGES[1:],
        ),
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 16, 16],
        feat_strides=[8, 16, 32],
        **{k: v for k, v in DETR.items() if k != "dropout"},
        decoder_in_channels=[32, 32, 32],
        num_feature_levels=3,
        decoder_n_points=[2, 3, 2],
        num_denoising=0,
    )
    return T.DFineForObjectDetection(config)


def bert(**settings) -> dict:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"model_type": "bert", "intermediate_size": 16, "vocab_size": 50, **sizes, **settings}


def grounding_dino() -> nn.Module:
    config = T.GroundingDinoConfig(
        backbone_config=T.SwinConfig(**(SWIN | {"out_features": STAGES[1:]})),
        use_pretrained_backbone=False,
        use_timm_backbone=False,
        text_config=bert(),
        **{k: v for k, v in DETR.items() if k not in ("encoder_ffn_dim",)},
        encoder_ffn_dim=16,
        encoder_n_points=2,
        decoder_n_points=2,
        max_text_len=8,
    )
    return T.GroundingDinoForObjectDetection(config)


def omdet_turbo() -> nn.Module:
    text = {"model_type": "clip_text_model", "hidden_size": 48, "projection_dim": 48}
    text |= {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 50, "max_position_embeddings": 8}
    config = T.OmDetTurboConfig(
        backbone_config=T.SwinConfig(**(SWIN | {"out_features": STAGES[1:]})),
        text_config=T.CLIPTextConfig(**text),
        use_timm_backbone=False,
        encoder_hidden_dim=32,
        encoder_in_channels=(32, 64, 128),
        vision_features_channels=(32, 32, 32),
        encoder_dim_feedforward=16,
        encoder_attention_heads=2,
        decoder_hidden_dim=32,
        decoder_num_heads=2,
        decoder_num_layers=2,
        decoder_dim_feedforward=16,
        decoder_num_points=2,
        text_projection_in_dim=48,
        text_projection_out_dim=48,
        class_embed_dim=48,
        task_encoder_hidden_dim=16,
        num_queries=5,
        image_size=64,
        apply_layernorm_after_vision_backbone=False,
    )
    return T.OmDetTurboForObjectDetection(config)


def rf_detr() -> nn.Module:
    config = T.RfDetrConfig(
        backbone_config={
            "model_type": "rf_detr_dinov2",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 128,
            "patch_size": 8,
            "num_windows": 2,
            "out_features": ["stage2", "stage3"],
        },
        d_model=32,
        decoder_layers=2,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        decoder_n_points=2,
        decoder_ffn_dim=16,
        num_queries=5,
        group_detr=1,
        dropout=0.0,
        num_labels=LABELS,
        intermediate_size=16,
    )
    return T.RfDetrForInstanceSegmentation(config)


def noisy(model: nn.Module, seed: int = 1) -> nn.Module:
    """A model in float64, in evaluation mode, away from the points where its gradient jumps.

    At initialisation sampling offsets sit on the kinks of bilinear sampling, many biases are zero
    and batch norms change nothing: noise makes an error in any of them visible.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = (
                0.3 if name.endswith("sampling_offsets.bias") else 0.05 if p.ndim == 1 else 0.02
            )
            p.add_(torch.randn(p.shape, generator=g) * scale)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=g) + 0.5)
                module.running_mean.copy_(torch.randn(module.bias.shape, generator=g) * 0.1)
                module.running_var.copy_(torch.rand(module.bias.shape, generator=g) + 0.5)
    return model.double().eval()


SEGMENTATION = {f.__name__: f for f in (mask2former, maskformer, oneformer, segformer, eomt)}
DEFORMABLE = {
    f.__name__: f
    for f in (deformable_detr, rt_detr, rt_detr_v2, d_fine, grounding_dino, omdet_turbo, rf_detr)
}


def tokens(rows: int, seed: int = 0) -> torch.Tensor:
    """[rows, 6] of a vocabulary of 50."""
    return torch.randint(1, 49, (rows, 6), generator=torch.Generator().manual_seed(seed))


def inputs(name: str, dtype: torch.dtype = torch.float64, batch: int = 2) -> dict:
    """What the model of that name is called with, but for labels."""
    size = (104, 136) if name in SEGMENTATION else (96, 128)
    size = {"eomt": (64, 64), "rf_detr": (128, 128)}.get(name, size)
    g = torch.Generator().manual_seed(2)
    out = {"pixel_values": torch.randn(batch, 3, *size, generator=g).to(dtype)}
    if name == "oneformer":
        out["task_inputs"] = torch.rand(batch, 8, generator=g).to(dtype)
    if name == "grounding_dino":
        out["input_ids"] = tokens(batch)
    if name == "omdet_turbo":
        for kind, rows in (("classes", 2 * batch), ("tasks", batch)):
            out[f"{kind}_input_ids"] = tokens(rows)
            out[f"{kind}_attention_mask"] = torch.ones(rows, 6, dtype=torch.int64)
        out["classes_structure"] = torch.full((batch,), 2)
    return out


def labels(name: str, counts=(3, 4), dtype: torch.dtype = torch.float64) -> dict:
    """Labels that go with `inputs` of the model for segmentation of that name."""
    H, W = inputs(name)["pixel_values"].shape[2:]
    masks, classes = random_targets(counts, LABELS, H, W)
    if name == "segformer":
        g = torch.Generator().manual_seed(3)
        maps = torch.randint(0, LABELS, (len(counts), H, W), generator=g)
        maps[0, :20] = 255
        return {"labels": maps}
    return {"mask_labels": [m.to(dtype) for m in masks], "class_labels": classes}
