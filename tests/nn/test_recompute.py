"""Recomputation: bytes that are kept for backward, and that no bit changes."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from segkern.nn import pixel_decoder, query_decoder, recompute
from segkern.nn.backbones import swin
from segkern.nn.position import pixel_centres

SHAPES = ((8, 8), (16, 16), (32, 32))


def block(channels):
    offsets = swin.bias_rows(7, torch.device("cpu"))
    module = swin.Block(channels, 2, 7, True, 0.0)
    return lambda x: module(x, offsets, None, None), (2, 28, 28, channels), module


def downsample():
    module = swin.Downsample(32)
    return module, (2, 28, 28, 32), module


def layer():
    module = pixel_decoder.PixelDecoderLayer(64, 4, 4, 256, 0.0)
    place = torch.randn(sum(h * w for h, w in SHAPES), 64)
    reference = pixel_centres(SHAPES, place.device, place.dtype)
    norm = torch.nn.LayerNorm(64)
    return lambda x: module(x, norm, place, SHAPES, reference, False), (2, len(place), 64), module


def pyramid():
    module = pixel_decoder.PixelDecoder((16, 16, 16, 16), 32, 32, 1, 2, 4, 64)
    coarser = torch.randn(2, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    return lambda x: module.pyramid(x.permute(0, 3, 1, 2), coarser), (2, 32, 32, 16), module


def keys_values():
    module = query_decoder.DecoderLayer(64, 4, 64, 0.0)
    place, embed = torch.randn(1344, 64), torch.randn(64)
    return lambda x: module.keys_values(x, place, embed), (2, 1344, 64), module


CASES = {  # what is kept, the result with it, over the input's size
    "block: attention, the sum with it, the result": (lambda: block(32), 3),
    "wide block: q, k, v too": (lambda: block(swin.WIDE), 6),
    "downsample: the result": (downsample, 0.5),
    "pixel decoder layer: attention, the sum": (layer, 2),
    "pyramid: its convolution, the result": (pyramid, 4),
    "keys and values alone": (keys_values, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_kept_for_backward(case):
    build, factor = CASES[case]
    torch.manual_seed(0)
    function, shape, _ = build()
    x = torch.randn(shape, requires_grad=True)
    function(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = function(x)
    kept = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert kept <= 1.1 * factor * x.numel() * x.element_size(), "with statistics and small tensors"
    assert kept >= 0.9 * factor * x.numel() * x.element_size(), "the measurement itself"
    del out


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_computing_again_changes_no_bit(case, autocast, monkeypatch):
    torch.manual_seed(0)
    function, shape, module = CASES[case][0]()
    x, found = torch.randn(shape, requires_grad=True), []
    for again in (True, False):
        if not again:
            for place in (swin, pixel_decoder, query_decoder):
                monkeypatch.setattr(place, "recomputed", lambda call, *inputs: call(*inputs))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function(x)
        tensors = [out] if isinstance(out, torch.Tensor) else [t for part in out for t in part]
        used = [p for p in module.parameters() if p.requires_grad]
        loss = sum(t.float().square().sum() for t in tensors)
        grads = torch.autograd.grad(loss, (x, *used), allow_unused=True)
        found.append([*tensors, *(g for g in grads if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_reuses_the_branch_where_its_dtype_allows(branch):
    x, y = torch.ones(3), torch.ones(3, dtype=branch)
    out = recompute.plus(y, x)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.full((3,), 2.0))
    assert (out is y) == (branch == torch.float32)
