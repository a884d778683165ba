"""upscale: twice the resolution of a map, and masks from it."""

import pytest
import torch

from segkern.ops import upscale
from segkern.ops.upscale import as_product, masks_of, refined, upscale_reference
from support.comparison import compare, promote
from support.inputs import upscale_inputs

CASES = {
    "small": {},
    "masks": {"Q": 4},
    "one pixel": {"h": 1, "w": 1},
    "one row": {"h": 1, "w": 4, "Q": 2},
    "one column": {"h": 4, "w": 1},
    "more than a panel": {"B": 1, "C": 21},
    "whole panels": {"B": 1, "C": 32, "Q": 40},
    "several bands": {"B": 2, "h": 7, "w": 520, "C": 3},
    "masks of several bands": {"B": 2, "h": 7, "w": 520, "C": 3, "Q": 2},
    "no image": {"B": 0},
    "no row": {"h": 0},
}
CHECKED = [torch.float32, torch.float64]  # half precision is PyTorch's own


def in_parts(x, weight, bias, filters, scale, shift, eps, embeddings=None):
    y = torch.nn.functional.gelu(torch.nn.functional.linear(x, *as_product(weight, bias)))
    out = refined(y, filters, scale, shift, eps)
    return out if embeddings is None else masks_of(embeddings, out)


@pytest.mark.parametrize("dtype", CHECKED, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("no ")])
def test_forward(case, dtype):
    compare(upscale, upscale_reference, upscale_inputs(**CASES[case], dtype=dtype))


@pytest.mark.cpu_only
def test_no_image_and_no_row():
    """PyTorch's convolution raises for maps without pixels."""
    assert upscale(*upscale_inputs(B=0)).shape == (0, 6, 10, 6)
    assert upscale(*upscale_inputs(h=0)).shape == (2, 0, 10, 6)
    assert upscale(*upscale_inputs(h=0, Q=3)).shape == (2, 3, 0, 10)
    assert upscale(*upscale_inputs(Q=0)).shape == (2, 0, 6, 10)


@pytest.mark.parametrize("Q", [None, 4], ids=["map", "masks"])
def test_gradients(Q):
    inputs = upscale_inputs(Q=Q, dtype=torch.float64)
    places = [i for i in range(len(inputs)) if i != 6]  # but eps
    compare(upscale, upscale_reference, inputs, places)


@pytest.mark.cpu_only
@pytest.mark.parametrize("Q", [None, 4], ids=["map", "masks"])
def test_half_precision_is_as_exact_as_pytorchs(Q):
    """Whose product is oneDNN's with the activation inside, where the CPU has it."""
    inputs = upscale_inputs(Q=Q, dtype=torch.bfloat16)
    exact = in_parts(*promote(inputs))
    found, want = ((f(*inputs) - exact).abs().max() for f in (upscale, in_parts))
    assert found <= 1.5 * want
    x, *rest = upscale_inputs(Q=Q)
    with torch.autocast("cpu", torch.bfloat16):
        found = upscale(x, *rest)
    want = upscale(x, *rest)
    assert (found.float() - want).abs().max() < 0.1


@pytest.mark.cpu_only
@pytest.mark.parametrize("Q", [None, 4], ids=["map", "masks"])
def test_any_strides(Q):
    x, *rest = upscale_inputs(Q=Q)
    want = upscale(x, *rest)
    turned = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(upscale(turned, *rest), want)
    part = torch.cat([x, x], 3)[..., :6]
    assert torch.equal(upscale(part, *rest), want)


@pytest.mark.cpu_only
def test_any_number_of_threads_gives_the_same_bits():
    for Q in (None, 5):
        inputs = upscale_inputs(1, 40, 60, 16, Q)
        both = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            both.append(upscale(*inputs))
        assert torch.equal(*both)


@pytest.mark.cpu_only
def test_nan_stays_where_it_is_read():
    x, *rest = upscale_inputs(1, 6, 6, 4)
    x[0, 3, 2, 1] = torch.nan
    found = upscale(x, *rest)[0].isnan().all(2)
    assert found[5:9, 3:7].all()
    assert found.sum() == 16


@pytest.mark.cpu_only
@pytest.mark.parametrize("Q", [None, 4], ids=["map", "masks"])
@pytest.mark.parametrize("dtype", CHECKED, ids=str)
def test_opcheck(dtype, Q):
    x, weight, bias, filters, scale, shift, eps, *e = upscale_inputs(Q=Q, dtype=dtype)
    taps = filters.reshape(-1, 9).mT.contiguous()
    inputs = x, *as_product(weight, bias), taps, scale, shift, eps, e[0] if e else None
    torch.library.opcheck(torch.ops.segkern.upscale, inputs)


@pytest.mark.cpu_only
def test_compile():
    inputs = upscale_inputs(Q=3)
    compiled = torch.compile(upscale, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), upscale(*inputs))


BAD = {  # what is changed, to what, the error and its message
    "x 3-d": (0, lambda t: t[0], ValueError, r"x must be \[B, h, w, C\] float, got"),
    "x int": (0, lambda t: t.int(), TypeError, "x must be .* got .* int32"),
    "weight": (1, lambda t: t[1:], ValueError, r"weight must be \[C, C, 2, 2\]"),
    "bias": (2, lambda t: t[1:], ValueError, "bias must be .* C = 6, got"),
    "no depthwise": (3, lambda t: t.expand(6, 6, 3, 3), ValueError, "filters must be"),
    "dtype": (4, lambda t: t.double(), TypeError, "scale must be torch.float32 as x"),
    "embeddings": (7, lambda t: t[..., 1:], ValueError, "embeddings must be .* C = 6, got"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    place, change, error, message = BAD[case]
    inputs = upscale_inputs(Q=4)
    inputs[place] = change(inputs[place])
    with pytest.raises(error, match=message):
        upscale(*inputs)
