"""Checkpoints of detectron2 that tests write and read, of small models with weights that all
matter."""

import pickle
from collections import OrderedDict
from functools import cache

import torch

from . import detectron2_mask2former as detectron2

SIZES = {"K": 7, "C": 64, "M": 32, "Q": 9, "encoder": 1, "decoder": 4, "inner": 96, "width": 80}
SWIN = {"embed_dim": 24, "depths": (1, 2, 2, 2), "num_heads": (1, 2, 3, 6), "window_size": 4}
BACKBONES = {
    "swin": lambda: detectron2.Swin(**SWIN),
    "resnet": lambda: detectron2.ResNet(),
}

BACK = [  # from our names to the original's, the first that fits
    (r"backbone\.norms\.", "backbone.norm"),
    (r"backbone\.body\.conv1\.", "backbone.stem.conv1."),
    (r"backbone\.body\.bn1\.", "backbone.stem.conv1.norm."),
    (r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.0\.", r"backbone.res\1.\2.shortcut."),
    (r"backbone\.body\.layer(\d)\.(\d+)\.downsample\.1\.", r"backbone.res\1.\2.shortcut.norm."),
    (r"backbone\.body\.layer(\d)\.(\d+)\.conv(\d)\.", r"backbone.res\1.\2.conv\3."),
    (r"backbone\.body\.layer(\d)\.(\d+)\.bn(\d)\.", r"backbone.res\1.\2.conv\3.norm."),
    (r"pixel_decoder\.level_embed", "sem_seg_head.pixel_decoder.transformer.level_embed"),
    (
        r"pixel_decoder\.(layers\.\d+)\.attn\.",
        r"sem_seg_head.pixel_decoder.transformer.encoder.\1.self_attn.",
    ),
    (r"pixel_decoder\.layers\.", "sem_seg_head.pixel_decoder.transformer.encoder.layers."),
    (r"pixel_decoder\.adapter\.0\.", "sem_seg_head.pixel_decoder.adapter_1."),
    (r"pixel_decoder\.adapter\.1\.", "sem_seg_head.pixel_decoder.adapter_1.norm."),
    (r"pixel_decoder\.output_conv\.0\.", "sem_seg_head.pixel_decoder.layer_1."),
    (r"pixel_decoder\.output_conv\.1\.", "sem_seg_head.pixel_decoder.layer_1.norm."),
    (r"pixel_decoder\.", "sem_seg_head.pixel_decoder."),
    (
        r"query_decoder\.layers\.(\d+)\.(self|cross)_norm\.",
        r"sem_seg_head.predictor.transformer_\2_attention_layers.\1.norm.",
    ),
    (
        r"query_decoder\.layers\.(\d+)\.self_attn\.",
        r"sem_seg_head.predictor.transformer_self_attention_layers.\1.self_attn.",
    ),
    (
        r"query_decoder\.layers\.(\d+)\.cross_attn\.",
        r"sem_seg_head.predictor.transformer_cross_attention_layers.\1.multihead_attn.",
    ),
    (r"query_decoder\.layers\.", "sem_seg_head.predictor.transformer_ffn_layers."),
    (r"query_decoder\.norm\.", "sem_seg_head.predictor.decoder_norm."),
    (r"query_decoder\.mask_embed\.", "sem_seg_head.predictor.mask_embed.layers."),
    (r"query_decoder\.", "sem_seg_head.predictor."),
]


@cache
def reference(backbone):
    """The original's model with weights that all matter: noise moves what starts as a constant,
    and samples away from the kinks of bilinear interpolation."""
    torch.manual_seed(0)
    model = detectron2.Mask2Former(BACKBONES[backbone](), **SIZES).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running" in name or name.endswith("norm.weight"):
                value.mul_(torch.rand_like(value) + 0.5)
            if value.is_floating_point() and "running_var" not in name:
                value.add_(torch.randn_like(value) * (0.3 if "offsets.bias" in name else 0.03))
    return model


def saved(path, state, **beside):
    """As detectron2's checkpointer writes it."""
    content = {"model": state, **beside}
    if path.suffix == ".pth":
        torch.save(content, path)
    else:
        arrays = OrderedDict((name, value.numpy()) for name, value in state.items())
        arrays._metadata = getattr(state, "_metadata", None)
        path.write_bytes(pickle.dumps({"__author__": "x", **content, "model": arrays}, 4))
    return path


def written(path):
    """Weights that a file holds, as it holds them."""
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)["model"]
    found = pickle.loads(path.read_bytes())["model"]
    return OrderedDict((name, torch.from_numpy(value)) for name, value in found.items())


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
        assert a[name].dtype == b[name].dtype, name
