"""Task queries against the plain formula, in which every pixel is multiplied."""

import pytest
import torch
import torch.nn.functional as F

from segkern.nn.position import sine_position
from segkern.nn.task_queries import TaskQueries

SIZES = {
    "one layer": (1, 32, 48, (5, 7)),
    "two layers": (2, 64, 64, (9, 4)),
    "one pixel": (2, 64, 32, (1, 1)),
}


def made(layers, channels, mask_channels, dropout=0.0):
    torch.manual_seed(0)
    part = TaskQueries(7, channels, mask_channels, layers, 4, 24, dropout).double()
    for p in part.parameters():  # biases are 0 at the start
        p.data += 0.1 * torch.randn_like(p)
    return part


def plain(part, token, position, features):
    """The formula at the head of the file."""
    h, w = features.shape[2:]
    C = token.shape[1]
    place = sine_position(((h, w),), C, token.device, token.dtype)
    keys = place + part.input_proj(features).flatten(2).mT

    def attend(attn, q, k, v):
        q, k, v = (
            project(t).unflatten(2, (part.heads, -1)).transpose(1, 2)
            for project, t in ((attn.q_proj, q), (attn.k_proj, k), (attn.v_proj, v))
        )
        weights = (q @ k.mT / q.shape[3] ** 0.5).softmax(3)
        return F.linear((weights @ v).transpose(1, 2).flatten(2), *attn.out_proj.parameters())

    x = token[:, None].repeat(1, len(position), 1)
    values = place.expand(len(x), -1, -1)
    for layer in part.layers:
        x = layer.self_norm(x + attend(layer.self_attn, x + position, x + position, x))
        x = layer.cross_norm(x + attend(layer.cross_attn, x + position, keys, values))
        hidden = F.relu(F.linear(x, *layer.linear1.parameters()))
        x = layer.norm(x + F.linear(hidden, *layer.linear2.parameters()))
    return torch.cat((part.norm(x), token[:, None]), 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("flows", [True, False], ids=["with gradients", "without"])
def test_they_are_those_of_the_formula(size, B, flows):
    layers, C, M, (h, w) = SIZES[size]
    part = made(layers, C, M)
    inputs = [torch.randn(*shape).double() for shape in ((B, C), (5, C), (B, M, h, w))]
    for x in inputs:
        x.requires_grad_(flows)
    with torch.set_grad_enabled(flows):
        have, want = part(*inputs), plain(part, *inputs)
    torch.testing.assert_close(have, want)
    assert torch.equal(have[:, -1], inputs[0])
    if flows:
        upstream = torch.randn_like(want)
        leaves = [*inputs, *part.parameters()]
        found = (
            torch.autograd.grad((x * upstream).sum(), leaves, allow_unused=True)
            for x in (have, want)
        )
        for one, other in zip(*found):
            assert (one is None) == (other is None)  # the words' layers take no part
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_dropout_is_that_of_a_transformer_decoder_layer():
    """In the weights of attention, in the hidden layer and in what is added: the mean over many
    draws moves by what a layer of PyTorch's, with the same weights, moves."""
    part = made(1, 32, 32, dropout=0.3)
    layer, x = part.layers[0], torch.randn(1, 6, 32).double()
    theirs = torch.nn.TransformerDecoderLayer(32, 4, 24, 0.3, batch_first=True).double()
    names = {"multihead_attn": "cross_attn", "norm1": "self_norm", "norm2": "cross_norm"}
    own, state = layer.state_dict(), {}
    for name in theirs.state_dict():
        first, _, rest = name.partition(".")
        first = {**names, "norm3": "norm"}.get(first, first)
        if rest.startswith("in_proj_"):
            parts = [own[f"{first}.{p}_proj.{rest[8:]}"] for p in "qkv"]
            state[name] = torch.cat(parts)
        else:
            state[name] = own[f"{first}.{rest}"]
    theirs.load_state_dict(state)
    memory, n = torch.randn(1, 9, 32).double(), 4000
    many, there = x.expand(n, -1, -1), memory.expand(n, -1, -1)
    attn = layer.cross_attn
    key, value = (
        F.linear(there, *project.parameters()).unflatten(2, (4, 8))
        for project in (attn.k_proj, attn.v_proj)
    )
    with torch.no_grad():
        have = layer.train()(many, torch.zeros(6, 32).double(), key, value)
        want = theirs.train()(many, there)
        calm = layer.eval()(many[:1], torch.zeros(6, 32).double(), key[:1], value[:1])
        torch.testing.assert_close(calm, theirs.eval()(many[:1], there[:1]))
    for moment in (torch.mean, torch.std):
        one, other = moment(have, 0), moment(want, 0)
        # each is off by its spread over the root of the draws; six of these for 192 numbers
        assert (one - other).abs().max() < 6 * 2**0.5 * want.std(0).max() / n**0.5


def test_no_weight_of_attention_is_stored():
    part = made(2, 32, 32).train()
    inputs = [torch.randn(*shape).double() for shape in ((1, 32), (199, 32), (1, 32, 24, 24))]
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.numel()), lambda x: x):
        part(*inputs)
    assert len(stored) > 20
    assert max(stored) < 199 * 24 * 24  # those of one head
