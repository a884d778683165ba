"""The encoder of BERT against PyTorch's own layers with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segkern.nn.bert import EPS, Bert, Unpatch


def built(dtype=torch.float64, **changes):
    sizes = {"image_size": (12, 16), "patch_size": 4, "dim": 24, "depth": 2, "heads": 3}
    torch.manual_seed(0)
    return Bert(**(sizes | {"hidden": 40} | changes)).to(dtype)


def plain(model, image, tokens=None):
    """The states, by nn.TransformerEncoderLayer."""
    p, (gh, gw) = model.patch_size, model.grid
    conv, D = model.patch_embed["proj"], model.pos_embed.shape[2]
    x = F.conv2d(image, conv.weight, conv.bias, stride=p)
    h, w = x.shape[2:]
    positions = model.pos_embed.view(1, gh, gw, D).permute(0, 3, 1, 2)
    if (h, w) != (gh, gw):
        positions = F.interpolate(positions, (h, w), mode="bilinear")
    x = (x + positions).flatten(2).transpose(1, 2)
    if tokens is not None:
        x = torch.cat((tokens.expand(len(x), -1, -1), x), 1)
    states = [F.layer_norm(x, (D,), model.norm.weight, model.norm.bias, EPS)]
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            D, block.attn.num_heads, len(block.mlp.fc1.weight), 0.0, "gelu", EPS, True
        ).to(x.dtype)
        names = {
            "self_attn.in_proj_": block.attn.qkv,
            "self_attn.out_proj.": block.attn.proj,
            "linear1.": block.mlp.fc1,
            "linear2.": block.mlp.fc2,
            "norm1.": block.norm1,
            "norm2.": block.norm2,
        }
        weights = {k + n: v for k, part in names.items() for n, v in part.named_parameters()}
        states.append(torch.func.functional_call(layer, weights, (states[-1],)))
    return states


CASES = {
    "stored grid": ((12, 16), 0),
    "tokens in front": ((12, 16), 5),
    "resized positions": ((20, 8), 5),
    "as many patches, another shape": ((16, 12), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_states_and_gradients_are_pytorchs(case):
    size, count = CASES[case]
    model = built()
    with torch.no_grad():  # biases and norms that do something
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    tokens = torch.randn(count, 24, dtype=torch.float64, requires_grad=True) if count else None
    inputs = [*model.parameters(), *([tokens] if count else [])]
    found, wanted = (f(image, tokens) for f in (model, lambda *a: plain(model, *a)))
    weights = [torch.randn_like(x) for x in wanted]
    assert len(found) == 3
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    grads = [
        torch.autograd.grad(sum((s * w).sum() for s, w in zip(states, weights)), inputs)
        for states in (found, wanted)
    ]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def test_recomputed_blocks_have_the_same_gradients():
    grads = []
    for enable in (False, True):
        model = built(torch.float32, dropout=0.3).train()
        model.checkpointing = enable
        torch.manual_seed(1)
        model(torch.ones(1, 3, 12, 16))[-1].square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_dropout_is_for_training_alone():
    model, image = built(torch.float32, dropout=0.5), torch.randn(1, 3, 12, 16)
    one, two = (model.train()(image)[-1] for _ in range(2))
    assert not torch.equal(one, two)
    one, two = (model.eval()(image)[-1] for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("size", [1, 3])
def test_unpatch_is_a_transposed_convolution(size):
    torch.manual_seed(0)
    layer = Unpatch(6, 4, size).double()
    x = torch.randn(2, 15, 6, dtype=torch.float64, requires_grad=True)
    maps = x.transpose(1, 2).unflatten(2, (3, 5))
    wanted = F.conv_transpose2d(maps, layer.weight, layer.bias, stride=size)
    found, weight = layer(x, (3, 5)), torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    inputs = (x, layer.weight, layer.bias)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (found, wanted))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
