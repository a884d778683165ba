"""query_layer: a decoder layer behind its cross attention, and what a prediction needs."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from segkern.nn.query_decoder import QueryDecoder
from segkern.ops import query_layer, query_prediction
from segkern.ops.query_layer import (
    Layer,
    Prediction,
    query_layer_reference,
    query_prediction_reference,
)
from support.comparison import assert_same, compare
from support.inputs import query_layer_inputs

MODULE = importlib.import_module("segkern.ops.query_layer")
LAUNCHED = MODULE._layer
HALVES = (torch.float16, torch.bfloat16)
CASES = {
    "small": {},
    "one query": {"B": 1, "Q": 1},
    "whole tiles": {"B": 1, "Q": 32},
    "keys of several tiles": {"B": 1, "Q": 70, "C": 64, "H": 2},
    "one head": {"H": 1},
    "one channel of masks, one hidden": {"M": 1, "F": 1},
    "chunks of hidden channels": {"B": 1, "F": 1030, "M": 530},
    "wide": {"B": 1, "Q": 5, "C": 256, "H": 8, "F": 300, "M": 70},
    "the last layer": {"more": False},
}


def run(function, heads=2, **options):
    """`function` of the tensors one after another."""

    def call(x, attended, position, *tensors):
        named = Layer(*tensors[:20]), Prediction(*tensors[20:])
        return given(function(x, attended, position, *named, heads, **options))

    return call


def given(outputs):
    return tuple(t for t in outputs if t is not None)


def predict(function):
    return lambda x, attended, position, *tensors: given(
        function(x, position, Prediction(*tensors[20:]))
    )


def plain_attention(q, k, v):
    return (q @ k.mT * q.shape[3] ** -0.5).softmax(-1) @ v


def check(sizes, dtype, monkeypatch, kernel=None):
    inputs, heads = query_layer_inputs(**sizes, dtype=dtype), sizes.get("H", 2)
    reference = run(query_layer_reference, heads)

    def algorithm(*tensors):
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", plain_attention)
            return reference(*tensors)

    kernel = kernel or run(query_layer, heads)
    compare(kernel, reference, inputs, stored=dtype, algorithm=algorithm)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_layer(case, dtype, monkeypatch):
    check(CASES[case], dtype, monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", ["small", "wide", "the last layer"])
def test_prediction(case, dtype):
    inputs = query_layer_inputs(**CASES[case], dtype=dtype)
    functions = predict(query_prediction), predict(query_prediction_reference)
    compare(*functions, inputs, stored=dtype)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_runs(case, monkeypatch):
    inputs, calls = query_layer_inputs(**CASES[case], dtype=torch.bfloat16), []
    for name in ("query_layer_reference", "query_prediction_reference"):
        monkeypatch.setattr(MODULE, name, None)
    monkeypatch.setattr(MODULE, "_layer", lambda *args: calls.append(args) or args[:4])
    monkeypatch.setattr(MODULE, "_prediction", lambda *args: calls.append(args) or args[:3])
    run(query_layer, CASES[case].get("H", 2))(*inputs)
    predict(query_prediction)(*inputs)
    assert len(calls) == 2


WITHOUT_KERNEL = {  # sizes, dtype
    "float32": ({}, torch.float32),
    "float64": ({}, torch.float64),
    "channels no power of two": ({"C": 48, "H": 3}, torch.float16),
    "narrow heads": ({"H": 4}, torch.float16),
    "wide heads": ({"B": 1, "Q": 3, "C": 256, "H": 1}, torch.float16),
    "more rows than it takes": ({"B": 1, "Q": 513}, torch.float16),
    "no image": ({"B": 0}, torch.float16),
    "no query": ({"Q": 0}, torch.float16),
    "nothing hidden": ({"F": 0}, torch.float16),
}
OF_THE_LAYER = ("narrow heads", "wide heads", "nothing hidden")  # a prediction has none of them


@torch.no_grad()
@pytest.mark.parametrize("case", WITHOUT_KERNEL)
def test_what_the_kernel_does_not_suit_takes_the_reference(case):
    sizes, dtype = WITHOUT_KERNEL[case]
    inputs, heads = query_layer_inputs(**sizes, dtype=dtype), sizes.get("H", 2)
    assert_same(run(query_layer, heads), run(query_layer_reference, heads), inputs)
    if case not in OF_THE_LAYER:
        assert_same(predict(query_prediction), predict(query_prediction_reference), inputs)


def test_gradients():
    inputs = query_layer_inputs()
    assert_same(run(query_layer), run(query_layer_reference), inputs, range(len(inputs)))
    leaves = [t.requires_grad_() for t in query_layer_inputs(dtype=torch.float16)]
    out = sum(t.float().sum() for t in run(query_layer)(*leaves))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, leaves))


@torch.no_grad()
def test_dropout():
    inputs, outputs = query_layer_inputs(dtype=torch.float16), []
    for function in (query_layer, query_layer_reference):
        torch.manual_seed(0)
        outputs.append(run(function, dropout=0.5)(*inputs))
    assert all(torch.equal(*pair) for pair in zip(*outputs))
    assert not torch.equal(outputs[0][0], run(query_layer_reference)(*inputs)[0])


@torch.no_grad()
def test_autocast():
    inputs = query_layer_inputs()
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        assert_same(run(query_layer), run(query_layer_reference), inputs)


@torch.no_grad()
@pytest.mark.parametrize("more", [False, True])
def test_opcheck(more):
    inputs = query_layer_inputs(more=more, dtype=torch.float16)
    rows, layer, prediction = inputs[:3], inputs[3:23], inputs[23:]
    ops = torch.ops.segkern
    torch.library.opcheck(ops.query_layer, (*rows, layer, prediction, 2, 1e-5))
    torch.library.opcheck(ops.query_prediction, (rows[0], rows[2], prediction, 1e-5))


@torch.no_grad()
def test_compile():
    inputs = query_layer_inputs(dtype=torch.float16)
    compiled = torch.compile(run(query_layer), fullgraph=True, backend="aot_eager")
    assert_same(compiled, run(query_layer), inputs)


@torch.no_grad()
def test_non_contiguous(monkeypatch):
    def strided(*tensors):
        spread = (t.repeat_interleave(2, -1)[..., ::2] for t in tensors)
        return run(query_layer)(*(t.mT.contiguous().mT if t.ndim == 2 else t for t in spread))

    check({"B": 1}, torch.float16, monkeypatch, strided)


@torch.no_grad()
def test_nan_stays_in_its_image():
    inputs = query_layer_inputs(B=2, Q=5, dtype=torch.float16)  # both in one tile of rows
    want = run(query_layer)(*inputs)
    inputs[0][0, 3, 4] = float("nan")
    for a, b in zip(run(query_layer)(*inputs), want):
        assert a[0].isnan().all()
        torch.testing.assert_close(a[1], b[1])


BAD = {
    "x 2-d": (0, lambda t: t[0], ValueError, r"x must be \[B, Q, C\] float, got \[20, 32\]"),
    "attended of others": (1, lambda t: t[:1], ValueError, r"attended must be .* with B = 2"),
    "position of others": (
        2,
        lambda t: t[:3],
        ValueError,
        r"position must be \[Q, C\] float with",
    ),
    "a layer's weight": (7, torch.Tensor.int, TypeError, r"layer.query_weight must be \[C, C\]"),
    "hidden": (19, lambda t: t[:, 1:], ValueError, r"layer.weight2 must be \[C, F\] .* F = 40"),
    "a prediction's bias": (30, lambda t: t[1:], ValueError, r"prediction.bias3 must be \[M\]"),
    "query": (32, lambda t: None, TypeError, r"prediction.next_bias must be .* got NoneType"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    place, change, error, message = BAD[case]
    inputs = query_layer_inputs()
    inputs[place] = change(inputs[place])
    with pytest.raises(error, match=message):
        run(query_layer)(*inputs)


@pytest.mark.parametrize("heads", [0, 3])
def test_bad_heads(heads):
    with pytest.raises(ValueError, match=f"heads must divide C = 32, got {heads}"):
        run(query_layer, heads)(*query_layer_inputs())


@torch.no_grad()
def test_the_decoder_in_half_precision(monkeypatch):
    """As accurate as without the kernel, where no bit of a mask can flip: all keys are open."""
    shapes = (1, 2), (2, 2), (3, 3)
    decoder = QueryDecoder(3, 32, 16, queries=18, layers=2, heads=2, feedforward=40).eval()
    for p in decoder.parameters():
        p.add_(torch.randn(p.shape) / 8)
    decoder.half()
    pixels, features = torch.randn(2, 15, 32).half(), torch.zeros(2, 16, 4, 4).half()
    calls = []
    monkeypatch.setattr(MODULE, "_layer", lambda *args: calls.append(args) or LAUNCHED(*args))
    fast = decoder(pixels, shapes, features)
    assert len(calls) == 2
    monkeypatch.setattr(MODULE, "ROWS", 0)
    slow = decoder(pixels, shapes, features)
    assert len(calls) == 2
    exact = decoder.double()(pixels.double(), shapes, features.double())
    for a, b, x in zip(fast, slow, exact):
        errors = [(t - x).square().mean(-1).sqrt() for t in (a, b)]
        assert errors[0].mean() <= 2 * errors[1].mean()
