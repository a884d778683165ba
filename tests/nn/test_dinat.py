"""DiNAT against a plain reference and against transformers' own code, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_backbones import backbone, rename
from torch import nn
from transformers import DinatConfig
from transformers.models.dinat import modeling_dinat

from segkern.nn.backbones.dinat import VARIANTS, Dinat

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL = {"embed_dim": 24, "depths": (2, 2, 1, 2), "num_heads": (3, 3, 6, 6), "mlp_ratio": 2.0}


def random(**options):
    """A small DiNAT in float64 all of whose weights count."""
    model = Dinat(**SMALL | options).double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model


def keys(i, length, K, t):
    """Of pixel i of an axis its keys, and the row of the bias that belongs to the first."""
    n = math.ceil((length - i % t) / t)
    start = min(max(i // t - K // 2, 0), n - K)
    return [(start + j) * t + i % t for j in range(K)], start - i // t + K - 1


def plain_attention(x, attn):
    """Neighbourhood attention as the formula has it, row by row of the map; [B, h, w, C]."""
    K, t, heads = attn.kernel, attn.dilation, attn.heads
    h, w = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, max(0, K * t - w), 0, max(0, K * t - h)))
    B, H, W, C = x.shape
    qkv = F.linear(x, attn.qkv.weight, attn.qkv.bias).view(B, H, W, 3, heads, C // heads)

    out = torch.empty(B, H, W, C, dtype=x.dtype)
    for y in range(H):
        rows, offset_y = keys(y, H, K, t)
        for column in range(W):
            columns, offset_x = keys(column, W, K, t)
            near = qkv[:, rows][:, :, columns].flatten(1, 2)  # [B, K K, 3, heads, D]
            q = qkv[:, y, column, 0]
            scores = torch.einsum("bhd,bkhd->bhk", q, near[:, :, 1]) * (C // heads) ** -0.5
            bias = attn.rpb[:, offset_y : offset_y + K, offset_x : offset_x + K].flatten(1)
            weights = (scores + bias).softmax(-1)
            out[:, y, column] = torch.einsum("bhk,bkhd->bhd", weights, near[:, :, 2]).flatten(1)
    return F.linear(out[:, :h, :w], attn.proj.weight, attn.proj.bias)


def plain(model, x):
    """The whole network, without a kernel."""
    for convolution in model.patch_embed["proj"]:
        x = F.conv2d(x, convolution.weight, convolution.bias, stride=2, padding=1)
    x = model.patch_embed["norm"](x.permute(0, 2, 3, 1))
    maps = []
    for stage, norm in zip(model.layers, model.norms):
        for block in stage.blocks:
            gammas = [1.0 if g is None else g for g in (block.gamma1, block.gamma2)]
            x = x + gammas[0] * plain_attention(block.norm1(x), block.attn)
            fc1, fc2 = block.mlp["fc1"], block.mlp["fc2"]
            hidden = F.gelu(F.linear(block.norm2(x), fc1.weight, fc1.bias))
            x = x + gammas[1] * F.linear(hidden, fc2.weight, fc2.bias)
        maps.append(norm(x).permute(0, 3, 1, 2))
        if stage.downsample is not None:
            weight = stage.downsample.reduction.weight
            x = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=2, padding=1).permute(0, 2, 3, 1)
            x = stage.downsample.norm(x)
    return maps


CASES = {
    "every map holds its kernels": ({"kernel_size": 3, "dilations": None}, (1, 3, 160, 100)),
    "coarse maps are padded": ({"kernel_size": 5}, (1, 3, 64, 96)),
    "no side is a multiple of the stride": ({"kernel_size": 3}, (2, 3, 57, 83)),
    "layer scale": ({"kernel_size": 3, "layer_scale": 0.5}, (1, 3, 40, 72)),
    "dilations of its own": (
        {"kernel_size": 3, "dilations": ((1, 5), (2, 3), (2,), (1, 1))},
        (1, 3, 66, 90),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_dinat_is_what_the_formula_says(case):
    options, shape = CASES[case]
    model = random(**options)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    got, want = model(x), plain(model, x)
    weights = [torch.randn_like(m) for m in want]
    inputs = [x, *model.parameters()]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    grads = (
        torch.autograd.grad([(m * c).sum() for m, c in zip(maps, weights)], inputs)
        for maps in (got, want)
    )
    for a, b in zip(*grads):
        assert (a - b).norm() <= 1e-8 * (1 + b.norm())


def around(x, K, t):
    """[B, h, w, heads, D] to the keys of each pixel, [B, h, w, heads, K K, D]."""
    rows, columns = ([keys(i, n, K, t)[0] for i in range(n)] for n in x.shape[1:3])
    near = x[:, torch.tensor(rows)][:, :, :, torch.tensor(columns)]
    return near.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


@pytest.fixture
def natten(monkeypatch):
    """transformers' DiNAT runs: what it calls of NATTEN, which no NATTEN has any more, by formula.

    NATTEN takes [B, heads, h, w, D]. transformers 5 hands over [B, w, h, heads, D] instead: its
    own mistake, put right here. Gives a list of the shapes that came.
    """
    came = []

    def maps(x, heads):  # to [B, h, w, heads, D]
        return x.permute(0, 2, 3, 1, 4) if x.shape[1] == heads else x.transpose(1, 2)

    def scores(q, k, bias, K, t):
        came.append(tuple(q.shape))
        q, k = maps(q, len(bias)), maps(k, len(bias))
        offsets = [torch.tensor([keys(i, n, K, t)[1] for i in range(n)]) for n in q.shape[1:3]]
        rows, columns = (o[:, None] + torch.arange(K) for o in offsets)
        added = bias[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3)
        return (q.unsqueeze(-2) * around(k, K, t)).sum(-1) + added.permute(1, 2, 0, 3)

    def sums(p, v, K, t):
        near = around(maps(v, p.shape[3]), K, t)
        return (p.unsqueeze(-1) * near).sum(-2).permute(0, 3, 1, 2, 4)

    monkeypatch.setattr(modeling_dinat, "natten2dqkrpb", scores)
    monkeypatch.setattr(modeling_dinat, "natten2dav", sums)
    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *_: None)
    return came


def pair(scale=0.0, **sizes):
    """transformers' DiNAT and ours with the same weights, in float64."""
    config = DinatConfig(
        drop_path_rate=0.0, out_features=STAGES, layer_scale_init_value=scale, **sizes
    )
    theirs = modeling_dinat.DinatBackbone(config).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = Dinat(layer_scale=scale, **sizes).double()
    ours.load_state_dict(rename(theirs.state_dict(), "dinat"))
    return theirs, ours


@pytest.mark.parametrize("scale", [0.0, 0.5], ids=["plain", "layer scale"])
def test_dinat_is_that_of_transformers_where_natten_is_put_back(natten, scale):
    """On maps that hold the kernels and on some that are padded."""
    sizes = SMALL | {"kernel_size": 3, "dilations": ((1, 4), (1, 2), (3,), (1, 2))}
    sizes["num_heads"] = (3, 3, 4, 8)  # which no side of a map equals
    theirs, ours = pair(scale, **sizes)
    x = torch.randn(1, 3, 72, 114, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(theirs(x).feature_maps, ours(x), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def test_heads_are_no_axis_of_the_map(natten):
    """transformers 5 gives NATTEN the columns for heads, and the heads for columns: on a map that
    is not square its attention is another, whatever NATTEN does. Ours follows the formula."""
    theirs, ours = pair(**SMALL | {"kernel_size": 3, "dilations": ((1, 1), (1, 1), (1,), (1, 1))})
    x = torch.randn(1, 3, 40, 100, dtype=torch.float64)
    with torch.no_grad():
        theirs(x)
        assert natten[0] in ((1, 25, 10, 3, 8), (1, 3, 10, 25, 8)), natten[0]
        torch.testing.assert_close(ours(x)[0], plain(ours, x)[0], rtol=1e-10, atol=1e-10)
        turned = ours(x.mT)[0].mT  # rows for columns is another network
    assert (turned - ours(x)[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("dinat_mini", 19.6),
        ("dinat_tiny", 27.4),
        ("dinat_small", 50.1),
        ("dinat_base", 89.0),
        ("dinat_large", 199.1),
    ],
)
def test_variants_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        model = backbone(name)
    assert all(
        c // b.attn.heads == 32 for s, c in zip(model.layers, model.channels) for b in s.blocks
    )
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count - millions) < 0.5, count
    assert model.strides == (4, 8, 16, 32)
    assert [b.attn.dilation for b in model.layers[0].blocks] == [1, 8, 1]
    scaled = model.layers[3].blocks[0].gamma2 is not None
    assert scaled == ("layer_scale" in VARIANTS[name])


def test_dinat_compiles_whole():
    model = Dinat(12, (1, 1, 1, 1), (1, 1, 1, 1), 3, ((2,), (1,), (1,), (1,)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 40, 52)
    grads = []
    for f in (model, compiled):
        model.zero_grad()
        sum((m * m).mean() for m in f(x)).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_dinat_in_bfloat16_is_near():
    model = Dinat(**SMALL | {"layer_scale": 0.3}).eval()
    x = torch.randn(1, 3, 97, 130)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    for a, b, c in zip(exact, mixed, model.bfloat16()(x.bfloat16())):
        assert (a - b).abs().mean() < 0.05
        assert (a - c).abs().mean() < 0.05


def test_gradient_checkpointing_changes_nothing():
    model = Dinat(**SMALL | {"kernel_size": 3, "drop_path_rate": 0.4, "layer_scale": 0.3}).train()
    x, found = torch.randn(2, 3, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        maps = model(x)
        sum(m.square().mean() for m in maps).backward()
        found.append([*maps, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


BAD = {
    "three stages": ({"depths": (1, 1, 1)}, "must have four entries"),
    "heads": ({"num_heads": (5, 1, 1, 1)}, "num_heads must divide the channels"),
    "an even kernel": ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
    "dilations": ({"dilations": ((1,), (1,), (1,), (1,))}, "one entry a block"),
    "drop path": ({"drop_path_rate": 1.0}, r"must be in \[0, 1\), got 1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Dinat(**SMALL | options)


def test_timm_has_no_weights_of_it():
    with pytest.raises(ValueError, match="backbone_pretrained must be False for 'dinat_tiny'"):
        backbone("dinat_tiny", pretrained=True)
