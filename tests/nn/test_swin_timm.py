"""Swin from a state dict that timm's own model wrote: the same features, in float64."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from segkern.models import Mask2FormerConfig, build_model
from segkern.nn.backbones import swin_timm
from segkern.nn.backbones.swin import Swin

SIZES = {"embed_dim": 24, "depths": (2, 1, 2, 2), "num_heads": (1, 2, 3, 6), "window_size": 4}


def written(**more):
    """A Swin classifier of timm with random weights, biases and norms too."""
    torch.manual_seed(0)
    name = "swin_tiny_patch4_window7_224"
    model = timm.create_model(name, img_size=256, **(SIZES | more)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def test_features_are_timms_where_every_level_divides_by_the_window():
    theirs, ours = written(), Swin(**SIZES).double().eval()
    swin_timm.load_timm(ours, theirs.state_dict())
    x = torch.randn(1, 3, 256, 256, dtype=torch.float64)  # levels of 64, 32, 16 and 8
    with torch.no_grad():
        wanted = theirs.forward_intermediates(x, intermediates_only=True)
        found = ours(x)
    for a, b in zip(found, wanted, strict=True):
        b = b.movedim(1, 3)
        b = F.layer_norm(b, b.shape[-1:])  # the norms of the maps are new
        assert (a.movedim(1, 3) - b).abs().max() <= 1e-10


def test_weights_of_other_sizes_load_nothing():
    ours = Swin(**SIZES)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"do not fit the backbone; unexpected: layers.1.blocks"):
        swin_timm.load_timm(ours, written(depths=(2, 2, 2, 2)).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("channels", [3, 5])
def test_the_config_asks_for_them(channels, monkeypatch):
    theirs, asked = written(in_chans=channels).float(), []

    def pretrained(name, in_chans):
        asked.append(name)
        assert in_chans == channels
        return theirs

    monkeypatch.setattr(swin_timm, "pretrained_model", pretrained)
    config = Mask2FormerConfig(
        num_labels=2,
        backbone="swin_tiny",
        backbone_pretrained=True,
        backbone_options=SIZES,
        image_mean=(0.5,) * channels,
        image_std=(0.2,) * channels,
    )
    found = build_model(config).backbone.state_dict()
    assert asked == ["swin_tiny_patch4_window7_224.ms_in1k"]
    name = "layers.0.downsample.reduction.weight"
    assert torch.equal(found[name], theirs.state_dict()["layers.1.downsample.reduction.weight"])
    build_model(config, pretrained=False)
    build_model(replace(config, backbone_pretrained=False))
    assert len(asked) == 1


@pytest.mark.parametrize("name", swin_timm.PRETRAINED)
def test_timm_has_such_weights(name):
    assert timm.is_model_pretrained(swin_timm.PRETRAINED[name])
