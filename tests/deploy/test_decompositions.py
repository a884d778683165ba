"""Each decomposition against its op's reference; deformable attention in both forms."""

import pytest
import torch
from torch import randn

from segkern import ops
from segkern.deploy.decompositions import decomposed, table
from segkern.ops import _library
from segkern.ops._norm_relu import norm_relu
from segkern.ops.conv3x3 import _filters
from segkern.ops.upscale import as_product


def made(op, grid_sample=False):
    return table(grid_sample)[getattr(torch.ops.segkern, op).default]


def assert_close(have, want):
    torch.testing.assert_close(have, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_linear(activation):
    x, weight, bias, residual = randn(5, 7), randn(3, 7), randn(3), randn(5, 3)
    number = {"none": 0, "relu": 1, "gelu": 2}[activation]
    out, before = made("linear")(x, weight, bias, number, residual, True)
    assert_close(out, ops.linear(x, weight, bias, activation, residual, impl="reference"))
    assert_close(before, x @ weight.T + bias)
    out, _ = made("linear")(x, weight, None, number, None, False)
    assert_close(out, ops.linear(x, weight, None, activation, impl="reference"))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_feed_forward(activation):
    given = randn(5, 7), randn(9, 7), randn(9), randn(7, 9), randn(7)
    residual = randn(5, 7)
    want = ops.feed_forward(*given, activation, impl="reference", residual=residual)
    assert_close(made("feed_forward")(*given, activation == "gelu", residual), want)


def test_attention():
    q, k, v = randn(2, 5, 3, 8), randn(2, 7, 3, 8), randn(2, 7, 3, 8)
    assert_close(made("attention")(q, k, v, 0.3), ops.attention(q, k, v, 0.3, impl="reference"))


def test_masked_attention_keeps_booleans():
    """A row without an open key attends to all."""
    q, k, v = randn(2, 5, 3, 8), randn(2, 40, 3, 8), randn(2, 40, 3, 8)
    queries, features = randn(2, 5, 6), randn(2, 6, 40)
    queries[0, 1] = 0  # every product is 0
    for threshold in (0.5, 1.5):
        bits, open = ops.mask_bits(queries, features, threshold, impl="reference")
        want = ops.masked_attn(q, k, v, bits, open, 0.3, impl="reference")
        flags, any_open = made("mask_bits")(queries, features, threshold)
        assert torch.equal(any_open, open > 0)
        assert torch.equal(flags, ops.unpack_bits(bits, 40))
        assert not any_open[0, 1]
        assert_close(made("masked_attn")(q, k, v, flags, any_open, 0.3)[0], want)


@pytest.mark.parametrize("side", [(5, 6), (1, 1)])
def test_convolutions(side):
    x, weight = randn(2, *side, 4), randn(3, 4, 3, 3)
    have = made("conv3x3")(x, _filters(weight)).permute(0, 3, 1, 2)
    assert_close(have, ops.conv3x3(x.permute(0, 3, 1, 2), weight, impl="reference"))
    weight, bias = randn(4, 1, 3, 3), randn(4)
    have = made("dwconv3x3_gelu")(x, weight.reshape(-1, 9).mT, bias)
    assert_close(have, ops.dwconv3x3_gelu(x, weight, bias, impl="reference"))


@pytest.mark.parametrize("relu", [False, True])
def test_norms(relu):
    x, weight, bias, up = randn(2, 8, 6, 4), randn(8), randn(8), randn(2, 8, 3, 2)
    rows = x.permute(0, 2, 3, 1)
    for other in (None, up):
        want = ops.group_norm(x.clone(), 4, weight, bias, 1e-5, relu, other, impl="reference")
        coarse = None if other is None else other.permute(0, 2, 3, 1)
        have = made("group_norm")(rows, weight, bias, 4, 1e-5, relu, coarse)[0]
        assert_close(have.permute(0, 3, 1, 2), want)
    norm = [randn(8), torch.rand(8) + 0.5, randn(8), randn(8)]
    others = [randn(8), torch.rand(8) + 0.5, randn(8), randn(8)]
    y = randn(2, 8, 6, 4)
    for given in ((None, [], 0.0), (y, [], 0.0), (y, others, 1e-3)):
        other, moments, eps = given
        want = norm_relu(x, (norm, 1e-5), other, (moments, eps) if moments else None)
        assert_close(made("norm_relu")(x, norm, 1e-5, *given), want)


def test_resize_sum():
    maps = [randn(2, 3, 8, 12), randn(2, 3, 4, 6), randn(2, 3, 3, 3), randn(2, 3, 8, 12)]
    rows, bias = [x.permute(0, 2, 3, 1) for x in maps], randn(3)
    for given in ((None, False), (bias, True)):
        have = made("resize_sum")(rows, *given).permute(0, 3, 1, 2)
        assert_close(have, ops.resize_sum(maps, *given, impl="reference"))


def test_upscale():
    x, weight, bias = randn(2, 3, 4, 8), randn(8, 8, 2, 2), randn(8)
    filters, scale, shift = randn(8, 1, 3, 3), randn(8), randn(8)
    taps = filters.reshape(-1, 9).mT
    for embeddings in (None, randn(2, 5, 8)):
        args = scale, shift, 1e-6, embeddings
        have = made("upscale")(x, *as_product(weight, bias), taps, *args)
        assert_close(have, ops.upscale(x, weight, bias, filters, *args, impl="reference"))


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("size", [(6, 9), (4, 7), (2, 2)])
def test_window_attention_in_maps_that_are_padded(size, shift):
    qkv, qkv_bias, bias = randn(2, *size, 3, 2, 4), randn(3, 2, 4), randn(2, 9, 9)
    want = ops.window_attn(qkv, qkv_bias, bias, 3, shift, 0.4, impl="reference")
    assert_close(made("window_attn")(qkv, qkv_bias, bias, 3, shift, 0.4), want)


@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), (1, 1)), ((3, 5), (2, 1))])
def test_neighborhood_attention(kernel, dilation):
    q, k, v = (randn(2, 7, 8, 2, 4) for _ in range(3))
    bias = randn(2, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    want = ops.neighborhood_attn(q, k, v, bias, kernel, dilation, 0.4, impl="reference")
    assert_close(made("neighborhood_attn")(q, k, v, bias, kernel, dilation, 0.4), want)


@pytest.mark.parametrize("grid_sample", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_deformable_attention_within_and_outside_of_its_maps(grid_sample, normalized):
    shapes = ((5, 4), (3, 2), (1, 1))
    value, logits = randn(2, 27, 3, 4), randn(2, 6, 3, 3, 2)
    reference, offsets = torch.rand(1, 6, 1, 2), 3 * randn(2, 6, 3, 3, 2, 2)
    reference[0, 0], offsets[0, 0] = 0.5, 0.0  # on the border of two pixels
    want = ops.ms_deform_attn(
        value, shapes, reference, offsets, logits, normalized, impl="reference"
    )
    flat = [n for shape in shapes for n in shape]
    have = made("ms_deform_attn", grid_sample)(value, flat, reference, offsets, logits, normalized)
    assert_close(have, want)


def test_deformable_attention_reads_nothing_at_places_that_are_no_numbers():
    value, logits = randn(1, 6, 1, 4), randn(1, 2, 1, 1, 2)
    reference, offsets = torch.rand(1, 2, 1, 2), randn(1, 2, 1, 1, 2, 2)
    offsets[0, 0, 0, 0, 0, 0], offsets[0, 1, 0, 0, 1, 1] = torch.nan, 1e30
    given = reference, offsets, logits, False
    want = ops.ms_deform_attn(value, ((2, 3),), *given, impl="reference")
    assert_close(made("ms_deform_attn")(value, [2, 3], *given), want)


def test_the_table_has_every_op_but_those_of_losses_and_results():
    names = {op.name().removeprefix("segkern::") for op in table()}
    others = {n for n in _library.OPS if not n.endswith("_backward")} - names
    assert others == {
        *("linear_", "linear_assignment", "matching_cost", "point_mask_loss", "point_sample"),
        *("random_points", "resize_argmax", "segment_map", "segment_map_cover"),
        *("segment_map_instance", "segment_map_semantic"),
    }


def test_an_op_without_a_decomposition_is_named():
    class Sampling(torch.nn.Module):
        def forward(self, x):
            return ops.resize_argmax(x, torch.eye(4), torch.eye(4))

    program = torch.export.export(Sampling(), (randn(1, 2, 4, 4),))
    with pytest.raises(ValueError, match=r"no decomposition of segkern\.resize_argmax"):
        decomposed(program)


class Windows(torch.nn.Module):
    """Shifted windows of 7 x 7 on a map of every fourth pixel."""

    def forward(self, x):
        h, w = (side // 32 * 32 for side in x.shape[2:])
        x = x.narrow(2, 0, h).narrow(3, 0, w)[:, :, ::4, ::4].permute(0, 2, 3, 1)
        qkv = torch.cat([x] * 4, 3).unflatten(3, (3, 2, 2))
        return ops.window_attn(qkv, torch.ones(3, 2, 2), torch.ones(2, 49, 49), 7, 3)


@pytest.mark.slow
@torch.no_grad()
def test_windows_of_a_map_of_any_sides():
    """One that fills its windows, too."""
    free, model = torch.export.Dim.DYNAMIC, Windows()
    shapes = ({0: free, 2: free, 3: free},)
    program = torch.export.export(model, (torch.zeros(2, 3, 128, 160),), dynamic_shapes=shapes)
    module = decomposed(program).module(check_guards=False)  # as other runtimes do
    for B, h, w in ((1, 128, 160), (3, 64, 96), (2, 224, 224)):
        x = randn(B, 3, h, w)
        assert_close(module(x), model(x))
