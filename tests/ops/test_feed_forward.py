"""feed_forward: two linear layers with an activation between them."""

import pytest
import torch

from segkern.ops import _library, feed_forward
from segkern.ops.feed_forward import ACTIVATIONS, feed_forward_reference
from support.comparison import DTYPES, compare
from support.inputs import feed_forward_inputs

CASES = {  # inputs, activation
    "gelu": ({}, "gelu"),
    "relu": ({}, "relu"),
    "one row": ({"shape": ()}, "gelu"),
    "three leading dimensions": ({"shape": (2, 3, 5)}, "relu"),
    "hidden of one": ({"F": 1}, "gelu"),
    "several blocks of rows": ({"shape": (1030,), "F": 2100, "C": 3}, "gelu"),
    "a block and one row": ({"shape": (513,), "F": 2048, "C": 4}, "relu"),
}
TENSORS = range(5)


def run(function, activation):
    return lambda *tensors: function(*tensors, activation)


def check(inputs, activation, grads=()):
    kernel, reference = (run(f, activation) for f in (feed_forward, feed_forward_reference))
    # the products are PyTorch's, which stores the hidden layer in the dtype of the inputs
    compare(kernel, reference, inputs, grads, stored=inputs[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    sizes, activation = CASES[case]
    check(feed_forward_inputs(**sizes, dtype=dtype), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, dtype):
    sizes, activation = CASES[case]
    check(feed_forward_inputs(**sizes, dtype=dtype), activation, grads=TENSORS)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["several blocks of rows", "a block and one row"])
def test_gradients_where_all_products_are_the_kernels(case, dtype, monkeypatch):
    monkeypatch.setitem(feed_forward.__globals__, "INTEL", False)
    sizes, activation = CASES[case]
    check(feed_forward_inputs(**sizes, dtype=dtype), activation, grads=TENSORS)


def normed(function, activation="gelu"):
    """`function` of x, the four weights, and the norm's weight and bias."""
    return lambda *t: function(*t[:5], activation, norm=(t[5], t[6], 1e-5))


def norm_inputs(shape=(6, 5), dtype=torch.float32):
    inputs = feed_forward_inputs(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    norm = torch.randn(2, inputs[0].shape[-1], generator=generator) + torch.tensor([[1.0], [0.0]])
    return [*inputs, *norm.to(inputs[0])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_comes_first(dtype):
    inputs = norm_inputs(dtype=dtype)
    compare(normed(feed_forward), normed(feed_forward_reference), inputs, range(7), stored=dtype)


def with_residual(function):
    """`function` of x, the four weights, the norm's weight and bias, and a residual."""
    return lambda *t: function(*t[:5], norm=(t[5], t[6], 1e-5), residual=t[7])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_is_added(dtype):
    inputs = [*norm_inputs(dtype=dtype), norm_inputs(dtype=dtype)[0].flip(0)]
    functions = [with_residual(f) for f in (feed_forward, feed_forward_reference)]
    compare(*functions, inputs, range(8), stored=dtype)


def test_a_residual_of_another_dtype_is_added_to_the_result():
    *inputs, scale, shift = (t.requires_grad_() for t in norm_inputs())
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        plain = feed_forward(*inputs, norm=(scale, shift, 1e-5))
        out = feed_forward(*inputs, norm=(scale, shift, 1e-5), residual=inputs[0])
    assert out.dtype == torch.float32
    assert torch.equal(out, plain + inputs[0])


@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_a_norm_stays_in_float32_under_autocast(impl):
    x, *weights, scale, shift = (t.requires_grad_() for t in norm_inputs())
    device, norm = x.device.type, (scale, shift, 1e-5)
    with torch.autocast(device, torch.bfloat16):
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], *norm)
        want = feed_forward(y, *weights, impl=impl)
        out = feed_forward(x, *weights, impl=impl, norm=norm)
    assert torch.equal(out, want)
    grads = [torch.autograd.grad(o.float().sum(), (x, scale, shift)) for o in (out, want)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t[:-1], ValueError, r"norm's bias must be \[C\] float with"),
        (torch.Tensor.double, TypeError, "norm's bias must be torch.float32 as x, got torch.flo"),
    ],
    ids=["too short", "other dtype"],
)
def test_bad_norm(change, error, message):
    *inputs, scale, shift = norm_inputs()
    with pytest.raises(error, match=message):
        feed_forward(*inputs, norm=(scale, change(shift), 1e-5))


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_gradcheck(activation):
    inputs = [t.requires_grad_() for t in feed_forward_inputs(F=9, dtype=torch.float64)]
    assert torch.autograd.gradcheck(run(feed_forward, activation), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, *weights = feed_forward_inputs((7,), dtype=dtype)
    torch.library.opcheck(torch.ops.segkern.feed_forward, (x, *weights, True, None))
    torch.library.opcheck(torch.ops.segkern.feed_forward, (x, *weights, False, x.clone()))
    inputs = (torch.ones_like(x), x, *weights[:-1], False)
    torch.library.opcheck(torch.ops.segkern.feed_forward_backward, inputs)


def test_compile():
    inputs = [t.requires_grad_() for t in feed_forward_inputs()]
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(feed_forward(*inputs).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, w in zip(actual, want):
        assert torch.equal(a, w)


@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_autocast(impl):
    inputs = [t.requires_grad_() for t in feed_forward_inputs()]
    device = inputs[0].device.type
    half = [t.bfloat16() for t in inputs]
    with torch.autocast(device, torch.bfloat16):
        out = feed_forward(*inputs, impl=impl)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, feed_forward(*half, impl=impl))
    grads = torch.autograd.grad(out.float().sum(), inputs)
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in grads)


def test_the_hidden_layer_is_not_kept_for_backward():
    inputs = [t.requires_grad_() for t in feed_forward_inputs((64,), C=8, F=512)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        feed_forward(*inputs)
    assert max(kept) <= 8 * 512, "weights are the largest"


BAD = {
    "x 0-d": ((0, lambda t: t[0, 0, 0]), ValueError, r"x must be \[R, C\] float, got \[\]"),
    "x int64": ((0, torch.Tensor.long), TypeError, "x must be .* got .* int64"),
    "weight1 transposed": (
        (1, torch.Tensor.t),
        ValueError,
        r"weight1 must be \[F, C\] float with",
    ),
    "weight2 transposed": (
        (3, torch.Tensor.t),
        ValueError,
        r"weight2 must be \[C, F\] float with",
    ),
    "bias1 too long": (
        (2, lambda t: t.repeat(2)),
        ValueError,
        r"bias1 must be \[F\] float with F",
    ),
    "bias2 2-d": ((4, lambda t: t[None]), ValueError, r"bias2 must be \[C\] float"),
    "other dtype": (
        (3, torch.Tensor.double),
        TypeError,
        "weight2 must be torch.float32 as x, got torch.float64",
    ),
    "no tensor": ((2, lambda t: None), TypeError, "bias1 must be .* got NoneType"),
    "other device": ((1, lambda t: t.to("meta")), ValueError, r"must be on \S+, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    (place, change), error, message = BAD[case]
    inputs = feed_forward_inputs()
    inputs[place] = change(inputs[place])
    with pytest.raises(error, match=message):
        feed_forward(*inputs)


def test_bad_activation():
    with pytest.raises(ValueError, match="activation must be one of gelu, relu, got 'tanh'"):
        feed_forward(*feed_forward_inputs(), "tanh")


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)], ids=str)
def test_no_rows(shape):
    inputs = [t.requires_grad_() for t in feed_forward_inputs(shape)]
    out = feed_forward(*inputs)
    assert out.shape == inputs[0].shape
    out.sum().backward()
    assert all((t.grad == 0).all() for t in inputs)


def test_non_contiguous():
    x, *weights = feed_forward_inputs((6, 5))
    want = feed_forward(x, *weights)
    last = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(feed_forward(last, *weights), want)
    columns = [w.t().contiguous().t() if w.ndim == 2 else w for w in weights]
    torch.testing.assert_close(feed_forward(x, *columns), want)


def test_nan_stays_in_its_row():
    x, *weights = feed_forward_inputs((9,))
    want = feed_forward(x, *weights)
    x[4] = float("nan")
    out = feed_forward(x, *weights)
    assert out[4].isnan().all()
    rest = torch.arange(9) != 4
    torch.testing.assert_close(out[rest], want[rest])


@pytest.mark.cpu_only
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_the_library_pytorch_activates(activation, monkeypatch):
    monkeypatch.setitem(_library.MISSING, "cpu", "not built")
    monkeypatch.setitem(feed_forward.__globals__, "linear_op_", None)  # never called
    kernel, reference = (run(f, activation) for f in (feed_forward, feed_forward_reference))
    compare(kernel, reference, feed_forward_inputs((1030,), F=2100, C=3), grads=TENSORS)
