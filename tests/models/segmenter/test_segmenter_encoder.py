"""Weights of timm's ViTs and DeiTs in a Segmenter's encoder: timm's features, no network."""

from dataclasses import asdict, replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from segkern import recipes
from segkern.models.segmenter import original as weights
from segkern.models.segmenter.config import SegmenterConfig
from segkern.models.segmenter.model import Segmenter

SMALL = SegmenterConfig(
    num_labels=5, image_size=(64, 64), embed_dim=64, depth=2, num_heads=2, window_size=64,
    window_stride=48,
)  # fmt: skip
CASES = {"ViT": {}, "DeiT": {"distilled": True}, "patch 8": {"patch_size": 8}}


def of_timm(config, size=(64, 64), double=True):
    """A random model of timm of the config's shape."""
    torch.manual_seed(3)
    kind = VisionTransformerDistilled if config.distilled else VisionTransformer
    body = kind(
        img_size=size, patch_size=config.patch_size, embed_dim=config.embed_dim,
        depth=config.depth, num_heads=config.num_heads, num_classes=7,
    ).eval()  # fmt: skip
    with torch.no_grad():  # biases and norms are not left at 0 and 1
        for p in body.parameters():
            p += 0.1 * torch.randn_like(p)
    return body.double() if double else body


def with_eps(body, eps):
    for module in body.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    return body


@pytest.mark.parametrize("case", CASES)
def test_features_are_timms(case):
    config = replace(SMALL, **CASES[case])
    model, body = Segmenter(config).double().eval(), of_timm(config)
    model.load_encoder(body)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        found = model.encoder(image)
        theirs = body.forward_features(image)
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-3)
        assert not torch.allclose(found, theirs, rtol=0, atol=1e-9)  # eps 1e-6 there, 1e-5 here
        want = with_eps(body, 1e-5).forward_features(image)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(96, 96), (32, 128), (48, 80)], ids=str)
@pytest.mark.parametrize("case", ["ViT", "DeiT"])
def test_positions_are_resized_to_the_configs_image(case, size):
    config = replace(SMALL, image_size=size, **CASES[case])
    model, body = Segmenter(config).double().eval(), of_timm(config)
    model.load_encoder(body)
    grid = [n // 16 for n in size]
    prefix, mode = (2, "bilinear") if config.distilled else (1, "bicubic")
    want = resample_abs_pos_embed(
        body.pos_embed, grid, num_prefix_tokens=prefix, interpolation=mode, antialias=False
    )
    # timm resizes in float32
    torch.testing.assert_close(model.encoder.pos_embed, want, rtol=0, atol=1e-6)
    assert model.encoder.pos_embed.requires_grad
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size, dtype=torch.float64)).logits.isfinite().all()


def test_positions_of_a_wide_image_of_timms():
    config = replace(SMALL, image_size=(32, 96))
    model, body = Segmenter(config).double(), of_timm(config, (32, 96))
    model.load_encoder(body)
    assert torch.equal(model.encoder.pos_embed, body.pos_embed)


PRESETS = ["Seg-T-Mask/16", "Seg-S/32", "Seg-B/8", "Seg-B-Mask/32", "Seg-L-Mask/16", "Seg-L/32"]
PRESETS += ["Seg-S-Mask/16", "Seg-T†/16", "Seg-S†-Mask/16", "Seg-B†-Mask/16", "Seg-B/16"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_papers_backbones_are_in_timm_and_fit(preset):
    config = SegmenterConfig.preset(preset)
    assert config.backbone in timm.list_pretrained()
    with torch.device("meta"):
        encoder = Segmenter(config).encoder
    weights.check_fit(weights.timm_model(config.backbone, False), encoder, config.backbone)


@pytest.mark.parametrize("preset", ["Seg-T/8", "Seg-T/32", "Seg-S/8", "Seg-L-Mask/8"])
def test_shapes_without_weights(preset):
    assert SegmenterConfig.preset(preset).backbone is None
    with pytest.raises(ValueError, match=r"backbone must name a ViT of timm .*, got None"):
        recipes.segmenter(preset)
    assert not recipes.segmenter(preset, pretrained=False).model.backbone_pretrained


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("heads", [2, 8])
def test_a_local_start_looks_at_the_patches_around(distilled, heads):
    torch.manual_seed(0)
    config = replace(SMALL, patch_size=8, local_start=True, distilled=distilled, depth=2)
    encoder = Segmenter(replace(config, num_heads=heads, embed_dim=64)).encoder
    with torch.no_grad():
        # every patch the same: positions alone decide
        x = encoder.patch_embed["proj"](torch.zeros(1, 3, 64, 64)).flatten(2).mT
        block = encoder.blocks[0]
        qkv = block.attn.qkv(block.norm1(x + encoder.pos_embed[:, encoder.tokens :]))
        q, k, _ = qkv.view(64, 3, heads, -1).permute(1, 2, 0, 3)
        seen = (q @ k.mT * (64 // heads) ** -0.5).softmax(-1)
    around = [(0, 1), (1, 0), (0, -1), (-1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]
    for row, column in ((1, 1), (3, 4), (6, 2)):
        places = [(row + y) * 8 + column + x for y, x in around[:heads]]
        assert (seen[range(heads), row * 8 + column, places] > 0.95).all()
    # the blocks of the second half look at what is like them
    q, k, _ = encoder.blocks[1].attn.qkv.weight.detach().view(3, heads, -1, 64)
    alike = (q.mT @ k).diagonal(dim1=1, dim2=2).sum(1) / (64 // heads)
    assert ((alike > 0.5) & (alike < 2)).all()


@pytest.mark.parametrize(("classes", "most"), [(5, 0.2), (70, 0.5)])
def test_a_local_start_compares_patches_with_classes_apart(classes, most):
    torch.manual_seed(0)
    config = replace(SMALL, local_start=True, num_labels=classes)
    decoder = Segmenter(config).double().decoder
    x = torch.randn(2, 16, 64, dtype=torch.float64)
    patches, found = decoder.embeddings(x)
    want = x @ decoder.proj_dec.weight.T  # turned alone: no patch sees another
    want = F.normalize(want - want.mean(-1, keepdim=True), dim=-1)
    torch.testing.assert_close(patches, want, rtol=0, atol=1e-4)
    turn = decoder.proj_dec.weight / 4
    torch.testing.assert_close(turn @ turn.T, torch.eye(64).double(), rtol=0, atol=1e-6)
    assert (found[0] @ found[0].mT - torch.eye(classes)).abs().max() < most
    lead = decoder.mask_norm(torch.eye(classes).double()[0])  # one class as sure as can be
    assert float((lead[0] - lead[1]).detach()) == pytest.approx(
        7 if classes == 5 else 8.43, rel=1e-3
    )
    decoder(x)[..., 0].sum().backward()
    for block in decoder.blocks:  # they can learn
        assert block.attn.proj.weight.grad.abs().max() > 0
        assert block.mlp.fc2.weight.grad.abs().max() > 0
    plain = Segmenter(SMALL).decoder  # as the original starts it
    assert plain.cls_emb.std() < 0.03
    assert plain.blocks[0].mlp.fc2.weight.abs().max() > 0


def test_pretrained_weights_come_after_a_local_start():
    model, body = Segmenter(replace(SMALL, local_start=True)), of_timm(SMALL, double=False)
    model.load_encoder(body)
    assert torch.equal(model.encoder.pos_embed, body.pos_embed)
    with pytest.raises(ValueError, match="embed_dim must be at least 8 a head with local_start"):
        replace(SMALL, local_start=True, num_heads=16)


@pytest.fixture
def downloads(monkeypatch):
    """The names whose weights were asked for; random weights are given in their place."""
    create, asked = timm.create_model, []

    def without_network(name, pretrained=False, **options):
        if pretrained:
            asked.append(name)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", without_network)
    return asked


def test_a_pretrained_backbone_is_loaded_once(downloads, tmp_path):
    config = SegmenterConfig.preset("Seg-T-Mask/16", 5)
    config = replace(config, image_size=(64, 64), backbone_pretrained=True)
    model = Segmenter(config)
    assert downloads == ["vit_tiny_patch16_384.augreg_in21k_ft_in1k"]
    assert float(model.encoder.blocks[3].attn.qkv.weight.detach().std()) > 0
    model.save_pretrained(tmp_path)
    again = Segmenter.from_pretrained(tmp_path)
    assert len(downloads) == 1
    assert asdict(again.config) == asdict(config) | {"backbone_pretrained": False}
    assert torch.equal(again.encoder.pos_embed, model.encoder.pos_embed)


@pytest.mark.parametrize("dataset", ["ade20k", "pascal_context", "cityscapes"])
def test_the_papers_recipes_ask_for_them(dataset):
    model = recipes.segmenter("Seg-S-Mask/16", dataset).model
    assert model.backbone_pretrained
    assert model.backbone == "vit_small_patch16_384.augreg_in21k_ft_in1k"
    assert not recipes.digits_segmenter().model.backbone_pretrained


BAD = {
    "unknown name": (
        "vit_tiny_patch17_384", {}, "ViT of timm, got 'vit_tiny_patch17_384'; did you mean vit_t"
    ),
    "unknown tag": ("vit_tiny_patch16_384.nobody", {}, "timm cannot give backbone 'vit_tiny_"),
    "parallel blocks": ("vit_small_patch16_18x2_224", {}, "unexpected: blocks.0.attns.0.norm"),
    "other width": (
        "vit_small_patch16_384", {},
        r"'vit_small_patch16_384' does not fit .* cls_token \[1, 1, 384\] instead of \[1, 1, 64\]",
    ),
    "other depth": (
        "vit_tiny_patch16_384", {"embed_dim": 192, "num_heads": 3},
        r"unexpected: blocks.2.norm1.weight, .* and 116 more",
    ),
    "other heads": (
        "vit_tiny_patch16_384", {"embed_dim": 192, "depth": 12}, "3 attention heads instead of 2"
    ),
    "other patch": (
        "vit_tiny_patch16_384", {"embed_dim": 192, "depth": 12, "patch_size": 8},
        r"patch_embed.proj.weight \[192, 3, 16, 16\] instead of \[192, 3, 8, 8\]",
    ),
    "no distillation token": (
        "deit_tiny_patch16_224",
        {"embed_dim": 192, "depth": 12, "num_heads": 3, "distilled": True}, "missing: dist_token",
    ),
    "a distillation token": (
        "deit_tiny_distilled_patch16_224", {"embed_dim": 192, "depth": 12, "num_heads": 3},
        "unexpected: dist_token",
    ),
    "no ViT": ("resnet18", {}, "'resnet18' does not fit the encoder; missing: cls_token"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_backbones_that_do_not_fit_are_named_before_the_download(case, downloads):
    name, change, message = BAD[case]
    config = replace(SMALL, backbone=name, backbone_pretrained=True, **change)
    with pytest.raises(ValueError, match=message):
        Segmenter(config)
    assert not downloads


def test_a_backbone_without_weights(monkeypatch):
    create, reason = timm.create_model, "No pretrained weights exist"

    def has_none(name, pretrained=False, **options):
        if pretrained:
            raise RuntimeError(reason)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", has_none)
    name, shape = "vit_tiny_patch16_384", {"embed_dim": 192, "depth": 12, "num_heads": 3}
    config = replace(SMALL, backbone=name, backbone_pretrained=True, **shape)
    with pytest.raises(ValueError, match=f"timm cannot give backbone '{name}': {reason}"):
        Segmenter(config)
