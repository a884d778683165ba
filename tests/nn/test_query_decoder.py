"""The query decoder: what it leaves out when asked for its last prediction."""

import pytest
import torch

from segkern.nn.query_decoder import QueryDecoder

SHAPES = (1, 2), (2, 2), (3, 3)


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_the_last_prediction_alone(layers):
    decoder = QueryDecoder(3, 32, 16, queries=5, layers=layers, heads=2, feedforward=40)
    inputs = torch.randn(2, 15, 32), SHAPES, torch.randn(2, 16, 4, 4)
    classes = []
    decoder.class_embed.register_forward_hook(lambda *args: classes.append(args[2].numel()))
    every, last = decoder(*inputs), decoder(*inputs, last=True)
    for a, b in zip(every, last):
        assert a.shape[:2] == (2, layers + 1)
        assert b.shape[:2] == (2, 1)
        torch.testing.assert_close(a[:, -1:], b)
    assert classes == [2 * (layers + 1) * 5 * 4, 2 * 5 * 4]
