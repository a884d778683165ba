"""query_layer: a decoder layer behind its cross attention, and what a prediction needs."""

import pytest
import torch
import torch.nn.functional as F

from segkern.ops import query_layer, query_prediction
from segkern.ops.query_layer import (
    Layer,
    Prediction,
    query_layer_reference,
    query_prediction_reference,
)
from support.comparison import assert_same, compare
from support.inputs import query_layer_inputs

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


def check(sizes, dtype, monkeypatch):
    inputs, heads = query_layer_inputs(**sizes, dtype=dtype), sizes.get("H", 2)
    reference = run(query_layer_reference, heads)

    def algorithm(*tensors):
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", plain_attention)
            return reference(*tensors)

    compare(run(query_layer, heads), reference, inputs, stored=dtype, algorithm=algorithm)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_layer(case, dtype, monkeypatch):
    check(CASES[case], dtype, monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", ["small", "the last layer"])
def test_prediction(case, dtype):
    inputs = query_layer_inputs(**CASES[case], dtype=dtype)
    functions = predict(query_prediction), predict(query_prediction_reference)
    compare(*functions, inputs, stored=dtype)
