"""Segmenter against its equations written once more in plain PyTorch, and the original code."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from segkern.inference import sliding_window
from segkern.models.segmenter import original as weights
from segkern.models.segmenter.config import SegmenterConfig
from segkern.models.segmenter.model import Segmenter
from segkern.nn import resized_cross_entropy
from segkern.ops import _bands
from segkern.structures.outputs import Resized
from segkern.structures.settings import Views
from segkern.structures.targets import Targets

SMALL = SegmenterConfig(
    num_labels=5, image_size=(64, 64), embed_dim=64, depth=2, num_heads=2, window_size=64,
    window_stride=48,
)  # fmt: skip
CASES = {
    "mask decoder": {},
    "linear decoder": {"decoder": "linear"},
    "one decoder layer": {"decoder_layers": 1},
    "patch 8": {"patch_size": 8},
    "distilled": {"distilled": True},
    "wide image": {"image_size": (32, 96)},
    "one decoder head of 96 channels": {"embed_dim": 96},
    "two decoder heads of 80 channels": {"embed_dim": 160},
}
SIZES = [(64, 64), (50, 70), (96, 32), (17, 130), (128, 32)]


def built(double=True, **changes):
    torch.manual_seed(1)
    model = Segmenter(replace(SMALL, **changes)).eval()
    with torch.no_grad():  # biases and norms are not left at 0 and 1
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.double() if double else model


def reference(w, config, image):
    """Logits [B, K, H, W] from the weights `w` by name, every step spelled out."""

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def block(x, name, heads):
        B, N, D = x.shape
        y = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = y.view(B, N, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(D // heads)
        y = torch.einsum("bhnm,bhmd->bnhd", scores.softmax(-1), v).reshape(B, N, D)
        x = x + linear(y, f"{name}.attn.proj")
        y = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        return x + linear(y, f"{name}.mlp.fc2")

    p, (H, W) = config.patch_size, image.shape[2:]
    h, width = math.ceil(H / p), math.ceil(W / p)
    padded = image.new_zeros(len(image), 3, h * p, width * p)
    padded[:, :, :H, :W] = image
    patches = padded.view(len(image), 3, h, p, width, p).permute(0, 2, 4, 1, 3, 5).flatten(3)
    kernel = w["encoder.patch_embed.proj.weight"].flatten(1)
    x = (patches @ kernel.T + w["encoder.patch_embed.proj.bias"]).flatten(1, 2)
    names = ["cls_token", "dist_token"][: 2 if config.distilled else 1]
    x = torch.cat([w[f"encoder.{n}"].expand(len(x), -1, -1) for n in names] + [x], 1)
    positions = w["encoder.pos_embed"]
    if positions.shape[1] != x.shape[1]:
        own, grid = positions[:, : len(names)], positions[:, len(names) :]
        size = [n // p for n in config.image_size]
        grid = grid.reshape(1, *size, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(h, width), mode="bilinear", align_corners=False)
        positions = torch.cat((own, grid.permute(0, 2, 3, 1).flatten(1, 2)), 1)
    x = x + positions
    for i in range(config.depth):
        x = block(x, f"encoder.blocks.{i}", config.num_heads)
    x = norm(x, "encoder.norm")[:, len(names) :]
    if config.decoder == "linear":
        masks = linear(x, "decoder.head")
    else:
        K = config.num_labels
        x = linear(x, "decoder.proj_dec")
        x = torch.cat((x, w["decoder.cls_emb"].expand(len(x), -1, -1)), 1)
        for i in range(config.decoder_layers):
            x = block(x, f"decoder.blocks.{i}", config.embed_dim // 64)
        x = norm(x, "decoder.decoder_norm")
        patches, classes = (
            x[:, :-K] @ w["decoder.proj_patch"],
            x[:, -K:] @ w["decoder.proj_classes"],
        )
        patches = patches / patches.square().sum(-1, keepdim=True).sqrt()
        classes = classes / classes.square().sum(-1, keepdim=True).sqrt()
        masks = norm(torch.einsum("bnd,bkd->bnk", patches, classes), "decoder.mask_norm")
    masks = masks.mT.reshape(len(masks), -1, h, width)
    masks = F.interpolate(masks, size=(h * p, width * p), mode="bilinear", align_corners=False)
    return masks[:, :, :H, :W]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_equations(case, size):
    model = built(**CASES[case])
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    want = reference(model.state_dict(), model.config, image)
    with torch.no_grad():
        for _ in range(2):  # the second time with the positions that were kept
            torch.testing.assert_close(model(image).logits, want, rtol=1e-8, atol=1e-8)


def test_gradients_are_those_of_the_equations():
    model = built()
    image = torch.randn(1, 3, 50, 70, dtype=torch.float64)
    leaves = dict(model.named_parameters())
    wanted = torch.autograd.grad(
        reference(leaves, model.config, image).square().sum(), leaves.values()
    )
    found = torch.autograd.grad(model(image).logits.square().sum(), leaves.values())
    for name, a, b in zip(leaves, found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_kept_positions_follow_the_weights():
    model = built()
    image = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        first = model(image).logits
        model.encoder.pos_embed += 1
        second = model(image).logits
        want = reference(model.state_dict(), model.config, image)
    assert not torch.equal(first, second)
    torch.testing.assert_close(second, want, rtol=1e-8, atol=1e-8)


def test_a_class_of_zeros_gives_no_nan():
    model = built()
    with torch.no_grad():
        model.decoder.proj_classes.zero_()
        assert model(torch.randn(1, 3, 64, 64, dtype=torch.float64)).logits.isfinite().all()


# | preset | crop | millions | with the original's unused heads | paper | backbone |
TABLE = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in (Path(__file__).parents[3] / "docs/segmenter.md").read_text().splitlines()
    if line.startswith("| Seg-")
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_presets_have_the_parameters_of_the_table(row):
    name, crop, own, whole, paper, backbone = row
    config = SegmenterConfig.preset(name)
    assert config.image_size == (int(crop),) * 2
    assert (config.backbone or "none") == backbone
    with torch.device("meta"):
        count = sum(p.numel() for p in Segmenter(config).parameters())
    heads = (2 if config.distilled else 1) * 1000 * (config.embed_dim + 1)
    assert f"{count / 1e6:.1f}" == own
    assert f"{(count + heads) / 1e6:.1f}" == whole
    if paper:
        assert (count + heads) / 1e6 == pytest.approx(float(paper), rel=0.03)


def test_the_table_has_every_preset_and_the_papers_figures():
    assert len({row[0] for row in TABLE}) == 4 * 3 * 2 + 3 * 2
    papers = {row[0]: row[4] for row in TABLE if row[4]}
    assert papers == {
        "Seg-T-Mask/16": "7",
        "Seg-S-Mask/16": "27",
        "Seg-B-Mask/16": "106",
        "Seg-B/8": "89",
        "Seg-L-Mask/16": "334",
    }


def test_a_distilled_preset():
    config = SegmenterConfig.preset("Seg-B†-Mask/16", num_labels=59)
    assert (config.distilled, config.decoder, config.num_labels) == (True, "mask", 59)
    assert config.image_mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ["Seg-X/16", "Seg-B/12", "Seg-L†/16", "Seg-B†/32", "B/16", ""])
def test_no_such_preset(name):
    with pytest.raises(ValueError, match=r"preset: name must be Seg-"):
        SegmenterConfig.preset(name)


@pytest.mark.parametrize("values", [2**21, 3000], ids=["one band", "bands"])
@pytest.mark.parametrize("size", [(40, 64), (64, 50), (37, 33)], ids=str)
def test_loss_is_torchs_of_the_resized_logits(size, values, monkeypatch):
    for device in ("ON_CPU", "ELSEWHERE"):
        monkeypatch.setattr(_bands, device, values)
    model = built()
    labels = torch.randint(0, 5, (2, *size))
    labels[:, :10], labels[0, -3:] = 255, 255
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    leaves = list(model.parameters())
    want = F.cross_entropy(model(image).logits, labels, ignore_index=255)
    out = model(image, labels)
    assert isinstance(vars(out)["logits"], Resized)  # of which none is computed before it is read
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(3 * out.loss, leaves), torch.autograd.grad(3 * want, leaves)
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_loss_of_patches_as_small_as_pixels():
    logits = torch.randn(1, 4, 6, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (1, 6, 7))
    loss = resized_cross_entropy.resized_cross_entropy(logits, labels, (6, 7))
    want = F.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits) for x in (loss, want)))


def test_no_labelled_pixel_gives_zero_and_gradients_of_zeros():
    labels, model = torch.full((1, 64, 64), 255), built(double=False)
    loss = model(torch.randn(1, 3, 64, 64), labels).loss
    loss.backward()
    assert loss == 0
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert not any(g.any() for g in grads)


BAD = {
    "image 3-d": (lambda x, y: (x[0], y), ValueError, r"pixel_values must be \[B, 3, H, W\]"),
    "image uint8": (lambda x, y: (x.byte(), y), TypeError, "pixel_values must be .* uint8"),
    "empty image": (lambda x, y: (x[:, :, :0], None), ValueError, "must not be empty"),
    "labels of another size": (
        lambda x, y: (x, y[:, 1:]), ValueError, r"labels must be .* with B = 2, H = 40, W = 64"
    ),
    "labels float": (lambda x, y: (x, y.float()), TypeError, "labels must be .* int64"),
    "label K": (
        lambda x, y: (x, y.index_fill(0, torch.tensor(1), 5)), ValueError,
        r"Segmenter: labels must be in \[0, 5\) or 255, got 5 in image 1",
    ),
    "labels from -2 to 253": (
        lambda x, y: (x, y + torch.tensor([-2, 253] * 32)), ValueError, "got -2, 253 in image 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    image, labels = torch.randn(2, 3, 40, 64), torch.zeros(2, 40, 64, dtype=torch.int64)
    with pytest.raises(error, match=message):
        built(double=False)(*change(image, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 0}, "num_labels must be >= 1, got 0"),
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"image_size": (60, 64)}, r"image_size must be .* multiples of patch_size \(16\)"),
        ({"num_heads": 5}, r"embed_dim must be a multiple of num_heads \(5\), got 64"),
        ({"decoder": "fpn"}, "decoder must be 'mask' or 'linear', got 'fpn'"),
        ({"embed_dim": 48}, r"embed_dim must be at least 64 and .* // 64 = 0\), got 48"),
        ({"embed_dim": 200}, r"a multiple of the mask decoder's heads .* // 64 = 3\), got 200"),
        ({"window_size": -1}, "window_size must be >= 1, got -1"),
        ({"window_stride": 0}, "window_stride must be >= 1, got 0"),
        ({"window_stride": 65}, r"window_stride must be <= window_size \(64\), got 65"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize("value", ["64", 64.0, True, b"64"], ids=str)
@pytest.mark.parametrize("name", ["window_size", "window_stride", "patch_size", "num_labels"])
def test_settings_of_another_type(name, value):
    with pytest.raises(
        TypeError, match=f"SegmenterConfig: {name} must be an integer, got {value!r}"
    ):
        replace(SMALL, **{name: value})


def test_targets_with_a_label_of_another_data_set():
    targets = Targets.from_lists([torch.zeros(0, 32, 32)], [torch.zeros(0, dtype=torch.int64)])
    targets = targets._replace(semantic=torch.full((1, 32, 32), 255, dtype=torch.uint8))
    targets.semantic[0, 3, 4:6] = torch.tensor([7, 150])
    message = r"labels must be in \[0, 5\) or 255, got 7, 150 in image 0"
    with pytest.raises(ValueError, match=message):
        built(double=False).loss(torch.randn(1, 3, 32, 32), targets)


@pytest.mark.parametrize("label", [-1, 4, 254, 2**40])
def test_loss_and_gradient_of_a_label_out_of_range_are_nan(label):
    """What a GPU gives, where nothing may wait for the labels."""
    logits = torch.randn(2, 4, 3, 3, requires_grad=True)
    labels = torch.zeros(2, 12, 12, dtype=torch.int64)
    labels[1, 5, 5] = label
    loss = resized_cross_entropy.resized_cross_entropy(logits, labels, (12, 12))
    assert loss.isnan()
    assert torch.autograd.grad(loss, logits)[0].isnan().all()


# what the original code (commit 20d1bfa, timm 0.4.12, float32) makes of weights and images that
# `original_folder` and `waves` make again: 40 values of each result
EXPECTED = json.loads((Path(__file__).parents[2] / "expected" / "segmenter.json").read_text())
VARIANTS = {
    "mask": {},
    "linear": {"decoder": {"name": "linear", "n_cls": 5}},
    "distilled": {"distilled": True},
    "wide": {"d_model": 128, "n_heads": 4, "image_size": (32, 96), "patch_size": 8},
}


def original_folder(folder, **changes):
    """A checkpoint as the original writes it, with weights that are waves."""
    net = {
        "backbone": "vit_tiny_patch16_384",
        "image_size": (64, 64),
        "patch_size": 16,
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 2,
        "distilled": False,
        "n_cls": 5,
        "normalization": "vit",
        "dropout": 0.0,
        "drop_path_rate": 0.1,
        "decoder": {
            "name": "mask_transformer",
            "n_layers": 2,
            "drop_path_rate": 0.0,
            "dropout": 0.1,
            "n_cls": 5,
        },
        **changes,
    }
    inference = {"im_size": 64, "window_size": 64, "window_stride": 48}
    schedule = {"lr": 0.001, "epochs": 64, "min_lr": 1e-05, "poly_power": 0.9, "poly_step_size": 1}
    optimizer = {"opt": "sgd", "weight_decay": 0.0, "momentum": 0.9, "clip_grad": None}
    loading = {"dataset": "ade20k", "image_size": 64, "crop_size": 64, "batch_size": 8}
    variant = {
        "world_batch_size": 8,
        "version": "normal",
        "resume": True,
        "dataset_kwargs": loading | {"normalization": "vit", "split": "train", "num_workers": 10},
        "algorithm_kwargs": {"batch_size": 8, "start_epoch": 0, "num_epochs": 64, "eval_freq": 2},
        "optimizer_kwargs": optimizer | schedule | {"iter_max": 161664, "iter_warmup": 0.0},
        "net_kwargs": net,
        "amp": False,
        "log_dir": "seg_tiny_mask",
        "inference_kwargs": inference,
    }
    (folder / "variant.yml").write_text(yaml.dump(variant))
    settings = weights.from_variant(variant, "variant.yml")
    state = Segmenter(SegmenterConfig(**settings)).state_dict()
    for name, p in state.items():
        wave = torch.arange(p.numel(), dtype=torch.float64) * 0.7 + sum(map(ord, name))
        scale = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = (0.05 * wave.cos() + scale).view(p.shape).float()
    state["encoder.head.weight"] = torch.zeros(1000, net["d_model"])
    rest = {"optimizer": {"state": {}}, "n_cls": 5, "lr_scheduler": {"last_epoch": 3}, "epoch": 3}
    torch.save({"model": state, **rest}, folder / "checkpoint.pth")
    return folder


def waves(h, w):
    n = torch.arange(3 * h * w, dtype=torch.float64)
    return (n * 0.013).sin().view(1, 3, h, w).float()


def sampled(t):
    return t.flatten()[:: t.numel() // 40][:40]


@pytest.mark.parametrize("case", VARIANTS)
def test_an_original_checkpoint_gives_the_originals_logits(case, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that the original writes is unknown
        model = Segmenter.from_pretrained(original_folder(tmp_path, **VARIANTS[case]))
    for size, want in EXPECTED[case]["logits"].items():
        with torch.no_grad():
            found = sampled(model(waves(*map(int, size.split("x")))).logits)
        torch.testing.assert_close(found, torch.tensor(want), rtol=0, atol=1e-4)


@pytest.mark.parametrize("values", [2**22, 5 * 101 * 7], ids=["one band", "bands"])
@pytest.mark.parametrize("case", VARIANTS)
def test_windows_scales_and_mirrors_are_the_originals(case, values, tmp_path, monkeypatch):
    for device in ("ON_CPU", "ELSEWHERE"):
        monkeypatch.setattr(_bands, device, values)
    monkeypatch.setattr(sliding_window, "PIXELS_AT_ONCE", 2 * 64**2)
    model = Segmenter.from_pretrained(original_folder(tmp_path, **VARIANTS[case]))
    for name, want in EXPECTED[case]["windows"].items():
        size, scales, out = name.split()
        h, w = map(int, size.split("x"))
        scales = [float(s) for s in scales.split(",")]
        images = [waves(int(h * s), int(w * s)) for s in scales]
        H, W = map(int, out.split("x"))
        with torch.no_grad():
            views = Views(64, 48, scales, len(scales) > 1)
            options = model, images, [(H, W)], views
            ((labels, found),) = sliding_window.label_maps(*options, return_scores=True)
            ((alone, _),) = sliding_window.label_maps(*options)
        assert found.shape == (5, H, W)
        torch.testing.assert_close(sampled(found), torch.tensor(want), rtol=0, atol=1e-4)
        assert torch.equal(labels, found.argmax(0))
        # without probabilities another way is taken: only classes that are as likely may differ
        chosen = found.gather(0, alone[None].long())[0]
        torch.testing.assert_close(chosen, found.amax(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (50, 71)], ids=str)
def test_predict_is_the_argmax_of_the_logits(size, tmp_path):
    model = Segmenter.from_pretrained(original_folder(tmp_path, **VARIANTS["mask"])).double()
    x = torch.cat((waves(*size), waves(*size).flip(3))).double()
    with torch.no_grad():
        assert torch.equal(model.label_map(x), model(x).logits.argmax(1).int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_under_autocast_is_that_of_its_logits(dtype, tmp_path):
    model = Segmenter.from_pretrained(original_folder(tmp_path, **VARIANTS["mask"]))
    x, labels = waves(50, 71), torch.randint(0, 5, (1, 50, 71))
    with torch.autocast("cpu", dtype):
        loss, patches = model(x, labels).loss, model.patch_logits(x)
    whole = torch.nn.functional.interpolate(
        patches.detach().float(), scale_factor=model.config.patch_size, mode="bilinear"
    )
    want = torch.nn.functional.cross_entropy(whole[:, :, :50, :71], labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), want)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
