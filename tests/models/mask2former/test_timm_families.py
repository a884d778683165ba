"""Every family of timm whose models have four maps at doubling strides: built, run on 64 x 96
pixels, saved and opened again as it was, or refused with the sizes at which that goes."""

import re

import pytest
import timm
import torch
from timm.models._registry import _model_to_module

from segkern.models.mask2former import Mask2Former, Mask2FormerConfig

# the smallest model of each family
FAMILIES = """
    convnext_zepto_rms cpubone_nano cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny densenet121
    dla46x_c dpn48b edgenext_xx_small efficientvit_b0 ese_vovnet19b_slim_dw fasternet_t0
    fastvit_t8 focalnet_tiny_srf ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t
    inception_next_atto lcnet_035 lcnetv2_small legacy_seresnet18 lowformer_b0 mambaout_femto
    mobilenetv2_035 mobilenetv5_base mobileone_s1 mobilevit_xxs mvitv2_tiny nextvit_small
    nf_regnet_b0 poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvit_m1
    res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 sam2_hiera_tiny selecsls42 skresnet18
    starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
    swinv2_tiny_window16_256 tiny_vit_5m_224 tresnet_m twins_svt_small vgg11 xception41p
"""
ALL_AT = {  # those that take images of one size alone: that side; of its multiples: (it,)
    "coat_tiny": 224,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "gcvit_xxtiny": 224,
    "hiera_tiny_224": 224,
    "halonet_h1": (256,),
    "maxvit_pico_rw_256": (256,),
}
UNEVEN = ["inception_v3", "legacy_xception"]
WITHOUT = """
    beit cait convit convmixer crossvit deepseek_vit deit efficientvim efficientvit_msra eva
    gemma4_vit levit mlp_mixer naflexvit nasnet nest pit pnasnet qwen3_vit sequencer shvit tnt
    visformer vision_transformer vision_transformer_hybrid vision_transformer_relpos
    vision_transformer_sam vitamin volo xcit
    inception_v4 inception_resnet_v2
"""  # families without four such maps; nasnet's and pnasnet's models are all large
QUICK = ["convnext_zepto_rms", "edgenext_xx_small", "poolformerv2_s12", "pvt_v2_b0", "resnet10t"]
QUICK += ["swinv2_cr_tiny_224", "coat_tiny"]
SIZES = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 32)
SIZES |= {"num_queries": 2, "encoder_layers": 1, "decoder_layers": 1, "num_labels": 2}
SIZES |= {"encoder_feedforward_dim": 8, "dim_feedforward": 8}


def rows(names):
    known = [name for name in names if timm.is_model(name)]  # older versions lack some
    slow = pytest.mark.slow
    return [name if name in QUICK else pytest.param(name, marks=slow) for name in known]


def goes_through(name, size, folder, **settings):
    model = Mask2Former(Mask2FormerConfig(backbone=name, **SIZES, **settings)).eval()
    with torch.no_grad():
        maps = model.backbone(torch.randn(1, 3, *size))
    for found, channels, stride in zip(maps, model.backbone.channels, model.backbone.strides):
        assert found.shape[1] == channels
        assert all(abs(n - side / stride) < 1 for n, side in zip(found.shape[2:], size))
    model.save_pretrained(folder)
    again = Mask2Former.from_pretrained(folder).state_dict()
    own = model.state_dict()
    assert own.keys() == again.keys()
    assert [key for key in own if not torch.equal(own[key], again[key])] == []


@pytest.mark.parametrize("name", rows(FAMILIES.split()))
def test_a_family_comes_back_as_it_was(name, tmp_path):
    goes_through(name, (64, 96), tmp_path)


@pytest.mark.parametrize("name", rows(ALL_AT))
def test_a_family_of_few_sizes_says_which(name, tmp_path):
    with pytest.raises(ValueError, match=f"'{name}' does not take images of 64 x 96") as found:
        Mask2Former(Mask2FormerConfig(backbone=name, **SIZES))
    advice = str(found.value).rpartition("): ")[2]
    side = int(re.search(r"must (?:all )?be (\d+)", advice)[1])
    at = ALL_AT[name]
    one = isinstance(at, int)
    assert side == (at if one else at[0])
    settings = dict.fromkeys(re.findall(r"[a-z]+_[a-z]+", advice), side)
    assert len(settings) == (3 if one else 1)
    goes_through(name, (at, at) if one else (at[0], 2 * at[0]), tmp_path, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNEVEN)
def test_maps_that_do_not_lie_at_the_strides_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' does not take .* choose another backbone"):
        Mask2Former(Mask2FormerConfig(backbone=name, **SIZES))


def test_every_family_is_here():
    listed = {
        _model_to_module[name]
        for name in (*FAMILIES.split(), *ALL_AT, *UNEVEN)
        if timm.is_model(name)
    }
    assert set(_model_to_module.values()) - listed - set(WITHOUT.split()) == set()
