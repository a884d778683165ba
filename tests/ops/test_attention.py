"""attention: every query to every key, without their scores in memory."""

import pytest
import torch

from segkern.ops import attention
from segkern.ops.attention import attention_reference, of_pytorch
from support.comparison import DTYPES, assert_same, compare
from support.inputs import attention_inputs

CASES = {
    "small": {},
    "one key": {"S": 1},
    "one of everything": {"B": 1, "Q": 1, "S": 1, "H": 1, "D": 1},
    "whole panels": {"S": 64, "D": 16},
    "a line of one key": {"S": 33},
    "whole chunks": {"B": 1, "Q": 48, "S": 512, "H": 1, "D": 16},
    "a chunk of one key and one query": {"B": 1, "Q": 25, "S": 257, "H": 2, "D": 20},
    "wide heads": {"B": 1, "D": 72, "H": 2},
    "parts of queries": {"B": 1, "Q": 500, "S": 40, "H": 1, "D": 4},
    "no image": {"B": 0},
    "no query": {"Q": 0},
}
CHECKED = [torch.float32, torch.float64]  # half precision is PyTorch's own


@pytest.mark.parametrize("dtype", CHECKED, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    compare(attention, attention_reference, attention_inputs(**CASES[case], dtype=dtype))


@pytest.mark.parametrize("dtype", CHECKED, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale, dtype):
    compare(attention, attention_reference, [*attention_inputs(dtype=dtype), scale])


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", CHECKED, ids=str)
def test_scores_that_rise_and_fall_by_hundreds(dtype):
    """The running maximum is followed in steps, and weights far below it are 0."""
    q, k, v = attention_inputs(B=1, Q=30, S=1000, H=1, D=4, dtype=dtype)
    k = k * (torch.arange(1000, dtype=dtype) / 7).sin()[:, None, None]
    compare(attention, attention_reference, [50 * q, 10 * k, v])


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", CHECKED, ids=str)
def test_scores_that_are_not_finite(dtype):
    q, k, v = attention_inputs(B=1, Q=3, S=600, H=1, D=4, dtype=dtype)
    q[0, 0, 0, 0] = torch.nan
    k[0, :300, 0] = -torch.inf
    q[0, 1] = q[0, 1].abs()  # its first scores are -inf: weights 0
    q[0, 2] = -q[0, 2].abs()  # its first scores are inf
    found = attention(q, k, v)[0]
    assert found[0].isnan().all()
    want = attention_reference(q[:, 1:2], k[:, 300:], v[:, 300:])[0, 0]
    assert (found[1] - want).abs().max() < 1e-5
    assert found[2].isnan().all()
    low = attention(q[:, 1:2], k[:, :300], v[:, :300])
    assert low.isnan().all()  # as in PyTorch, where no score is above -inf


def test_gradients_and_half_precision_are_pytorchs():
    for dtype in DTYPES:
        inputs = attention_inputs(dtype=dtype)
        assert_same(attention, of_pytorch, inputs, (0, 1, 2))
    for dtype in (torch.bfloat16, torch.float16):
        assert_same(attention, of_pytorch, attention_inputs(dtype=dtype))


@pytest.mark.cpu_only
def test_autocast():
    q, k, v = attention_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v), of_pytorch(q, k, v))
        assert attention(q, k.bfloat16(), v).dtype == torch.bfloat16


@pytest.mark.cpu_only
def test_slices_of_one_projection():
    qkv = torch.randn(2, 40, 3, 4, 12)
    q, k, v = qkv.unbind(2)
    want = attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(attention(q, k, v), want)
    turned = k.transpose(1, 3).contiguous().transpose(1, 3)  # channels far apart
    assert torch.equal(attention(q, turned, v), want)


@pytest.mark.cpu_only
def test_any_number_of_threads_gives_the_same_bits():
    inputs = attention_inputs(B=1, Q=700, S=300, H=1)
    both = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        both.append(attention(*inputs))
    assert torch.equal(*both)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", CHECKED, ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.segkern.attention, (*attention_inputs(dtype=dtype), 0.3))


@pytest.mark.cpu_only
def test_compile():
    inputs = attention_inputs()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), attention(*inputs))


BAD = {
    "q 3-d": (lambda q, k, v: (q[0], k, v), ValueError, r"q must be \[B, Q, H, D\] float, got"),
    "q int": (lambda q, k, v: (q.int(), k, v), TypeError, "q must be .* got .* int32"),
    "heads": (lambda q, k, v: (q, k[:, :, 1:], v), ValueError, "k must be .* H = 3, .*got"),
    "keys": (lambda q, k, v: (q, k, v[:, 1:]), ValueError, "v must be .* S = 70, .*got"),
    "no key": (lambda q, k, v: (q, k[:, :0], v[:, :0]), ValueError, "at least one key"),
    "dtype": (lambda q, k, v: (q, k.double(), v), TypeError, "k must be torch.float32 as q"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        attention(*change(*attention_inputs()))
