"""linear: a product with its bias, activation and residual."""

import pytest
import torch

from segkern.ops import linear
from segkern.ops._half_linear import takes
from segkern.ops.linear import ACTIVATIONS, linear_op_, linear_reference
from support.comparison import DTYPES, assert_same, compare
from support.inputs import linear_inputs

CASES = {  # inputs, activation, tensors given
    "bias": ({}, "none", 3),
    "weight alone": ({}, "none", 2),
    "relu": ({}, "relu", 3),
    "gelu": ({}, "gelu", 3),
    "gelu and residual": ({"shape": (3, 5, 2)}, "gelu", 4),
    "relu and residual": ({}, "relu", 4),
    "one value": ({"shape": (), "K": 1, "N": 1}, "relu", 4),
    "one column": ({"shape": (50,), "K": 7, "N": 1}, "none", 3),
    "rests on all sides": ({"shape": (121,), "K": 37, "N": 83}, "none", 4),
    "several pieces of K": ({"shape": (60,), "K": 700, "N": 33}, "gelu", 4),
    "several lengths of K": ({"shape": (30,), "K": 1700, "N": 20}, "gelu", 4),
    "several blocks and groups": ({"shape": (600,), "K": 300, "N": 500}, "none", 3),
}
CHECKED = [torch.float32, torch.float64]  # the products of others are PyTorch's or oneDNN's


def run(function, activation, tensors):
    def called(x, weight, *rest):
        bias, residual = (*rest, None, None)[:2]
        return function(x, weight, bias, activation, residual)

    return called


def check(case, dtype, backward):
    sizes, activation, given = CASES[case]
    inputs = linear_inputs(**sizes, dtype=dtype)[:given]
    grads = range(given) if backward else ()
    kernel, reference = (run(f, activation, given) for f in (linear, linear_reference))
    # of half precision oneDNN's, whose result is as exact, or the very layers of PyTorch
    onednn = takes(dtype) and not backward and (activation == "none" or given < 4)
    if not inputs[0].is_cuda and (dtype in CHECKED or onednn):
        compare(kernel, reference, inputs, grads)
    else:
        assert_same(kernel, reference, inputs, grads)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The kernel runs also where PyTorch's product would be taken as the faster one."""
    monkeypatch.setitem(linear.__globals__, "INTEL", False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    check(case, dtype, backward=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, dtype):
    check(case, dtype, backward=True)


@pytest.mark.parametrize("case", ["bias", "several blocks and groups"])
def test_gradients_where_their_products_are_pytorchs(case, monkeypatch):
    monkeypatch.setitem(linear.__globals__, "INTEL", True)
    check(case, torch.float32, backward=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    inputs = [t.requires_grad_() for t in linear_inputs(dtype=torch.float64)]
    assert torch.autograd.gradcheck(run(linear, activation, 4), inputs)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", CHECKED, ids=str)
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(dtype, keep):
    x, weight, bias, residual = linear_inputs((7,), dtype=dtype)
    op = torch.ops.segkern.linear
    torch.library.opcheck(op, (x, weight, bias, 2, residual, keep))
    torch.library.opcheck(op, (x, weight, None, 0, None, keep))
    torch.library.opcheck(linear_op_, (residual.clone(), x, weight, bias, 1, None, None))


def test_compile():
    inputs = [t.requires_grad_() for t in linear_inputs()]
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    want = linear(*inputs[:3], "gelu", inputs[3])
    actual = compiled(*inputs[:3], "gelu", inputs[3])
    assert torch.equal(actual, want)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (want, actual)]
    for a, w in zip(*grads):
        assert torch.equal(a, w)


def test_autocast():
    inputs = [t.requires_grad_() for t in linear_inputs()]
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        out = linear(*inputs[:3], "relu")
        want = torch.nn.functional.linear(*inputs[:3]).relu()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)


@pytest.mark.cpu_only
@pytest.mark.skipif(not takes(torch.bfloat16), reason="oneDNN has no bfloat16 on this CPU")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_has_one_rounding(activation):
    """With the activation inside; PyTorch's layers round before it, too."""
    single = linear_inputs((64,), K=96, N=48)[:3]
    half = [t.bfloat16() for t in single]
    exact = linear_reference(*(t.double() for t in half), activation)
    with torch.inference_mode():
        out = linear(*half, activation)
        assert ((out - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(linear(*single, activation), out)
            assert torch.equal(linear(half[0], *single[1:], activation), out)


@pytest.mark.cpu_only
def test_half_precision_where_onednns_layer_does_not_fit():
    x, weight, bias, residual = (t.bfloat16() for t in linear_inputs((9,), K=16, N=8))
    want = linear_reference(x, weight, bias, "relu")
    trained = weight.clone().requires_grad_()
    assert linear(x, trained, bias, "relu").grad_fn is not None
    assert torch.equal(linear(x, trained, bias, "relu"), want)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.allclose(linear(x, weight, bias, "relu"), want, rtol=2.0**-7, atol=1e-2)
    wide = linear(x, weight, bias, residual=residual.float())
    assert wide.dtype == torch.float32
    assert torch.equal(wide, linear(x, weight, bias) + residual.float())


@pytest.mark.cpu_only
def test_compile_and_export_keep_pytorchs_layer_in_half_precision():
    x, weight, bias, _ = (t.bfloat16() for t in linear_inputs((9,), K=16, N=8))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    want = linear_reference(x, weight, bias, "relu")
    assert torch.equal(compiled(x, weight, bias, "relu"), want)
    exported = torch.export.export(Layer(weight), (x,)).run_decompositions({})
    assert "mkldnn" not in str(exported.graph)


class Layer(torch.nn.Module):
    """A module with the op."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x):
        return linear(x, self.weight)


def test_a_residual_of_another_dtype_is_added_to_the_result():
    x, weight, bias, residual = (t.requires_grad_() for t in linear_inputs())
    wide = residual.detach().double().requires_grad_()
    out = linear(x, weight, bias, "gelu", wide)
    assert out.dtype == torch.float64
    assert torch.equal(out, linear(x, weight, bias, "gelu") + wide)
    assert all(g is not None for g in torch.autograd.grad(out.sum(), (x, weight, bias, wide)))


@pytest.mark.parametrize("device", ["meta", None])
def test_an_impl_that_is_none(device):
    inputs = [t if device is None else t.to(device) for t in linear_inputs()]
    with pytest.raises(ValueError, match="impl must be 'kernel' or 'reference', got 'fast'"):
        linear(*inputs[:3], impl="fast")


def test_other_devices_take_pytorchs_product():
    inputs = [t.to("meta") for t in linear_inputs()]
    assert linear(*inputs[:3], "gelu", inputs[3]).shape == (2, 7, 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", ["transposed", "steps", "expanded"])
def test_any_strides(change, dtype):
    def strided(t):
        if change == "steps":
            return t.repeat_interleave(2, -1)[..., ::2]
        if change == "expanded" or t.ndim == 1:
            return t[:1].expand_as(t)
        return t.t().contiguous().t()

    tensors = [strided(t) for t in linear_inputs((130,), K=70, N=50, dtype=dtype)]
    dense = [t.contiguous() for t in tensors]
    # PyTorch's own products of half precision take other paths for other strides
    bound = 0 if dtype in CHECKED else 2.0**-5
    for activation, given in (("relu", 4), ("gelu", 3), ("none", 4)):
        called = run(linear, activation, given)
        torch.testing.assert_close(
            called(*tensors[:given]), called(*dense[:given]), rtol=bound, atol=bound
        )


def test_the_last_tiles_read_and_write_nothing_beyond():
    """Rows and columns around a piece of a larger matrix stay, and a NaN there does not enter."""
    x, weight, bias, _ = linear_inputs((40,), K=30, N=45)
    wide = torch.full((40, 64), float("nan"))
    wide[:, :30] = x
    tall = torch.full((64, 30), float("nan"))
    tall[:45] = weight
    assert torch.equal(linear(wide[:, :30], tall[:45], bias), linear(x, weight, bias))
    out = linear(wide[:, :30].t().contiguous().t(), tall.t().contiguous().t()[:45], bias)
    assert torch.equal(out, linear(x, weight, bias))


@pytest.mark.cpu_only
@pytest.mark.parametrize("K", [5, 700, 2300])
def test_a_result_may_be_its_own_residual(K):
    x, weight, _, residual = linear_inputs((37,), K=K, dtype=torch.float64)
    want = linear_reference(x, weight, residual=residual)
    linear_op_(residual, x, weight, None, 0, residual, None)
    torch.testing.assert_close(residual, want)


@pytest.mark.cpu_only
def test_results_do_not_depend_on_the_number_of_threads():
    x, weight, bias, _ = linear_inputs((700,), K=300, N=130)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(linear(x, weight, bias, "gelu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.cpu_only
def test_gelu_keeps_its_digits_below_zero():
    x = torch.linspace(-12, 12, 100_001)[:, None]
    out = linear(x, torch.ones(1, 1), None, "gelu").double()
    want = x.double() * torch.special.log_ndtr(x.double()).exp()
    error = (out - want).abs()
    assert (error <= 3e-7 * want.abs())[x >= -1].all()
    assert (error <= 1e-4 * want.abs())[x >= -6].all()
    assert error[x < -1].max() < 6e-8


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", CHECKED, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values(activation, dtype):
    inf, nan = float("inf"), float("nan")
    values = [-inf, inf, nan, 0.0, 1e-40, -1e-40, 1e-20, 3e38, -3e38, -1e5, -1e4, -90.0, -11.7]
    x = torch.tensor(values, dtype=dtype)[:, None]
    out = linear(x, x.new_ones(37, 1), None, activation)  # whole vectors and the rest of a line
    want = ACTIVATIONS[activation](x.double()).to(dtype).expand(-1, 37)
    torch.testing.assert_close(
        out, want, rtol=3e-7, atol=1e-15 * (dtype == torch.float64), equal_nan=True
    )


def test_nan_stays_in_its_row():
    x, weight, bias, _ = linear_inputs((30,), K=300)
    want = linear(x, weight, bias)
    x[4, 7] = float("nan")
    out = linear(x, weight, bias)
    assert out[4].isnan().all()
    rest = torch.arange(30, device=x.device) != 4
    assert torch.equal(out[rest], want[rest])


@pytest.mark.parametrize(
    ("shape", "K", "N"), [((0,), 4, 5), ((3, 0), 4, 5), ((3,), 0, 5), ((3,), 4, 0)], ids=str
)
def test_empty(shape, K, N):
    inputs = [t.requires_grad_() for t in linear_inputs(shape, K, N)]
    out = linear(*inputs[:3], "none", inputs[3])
    assert torch.equal(out, linear_reference(*inputs[:3], "none", inputs[3]))
    out.sum().backward()
    assert [t.grad.shape for t in inputs] == [t.shape for t in inputs]


BAD = {
    "x 0-d": ((0, lambda t: t[0, 0, 0]), ValueError, r"x must be \[M, K\] float, got \[\]"),
    "x int64": ((0, torch.Tensor.long), TypeError, "x must be .* got .* int64"),
    "weight transposed": ((1, torch.Tensor.t), ValueError, r"weight must be \[N, K\] float with"),
    "bias too long": ((2, lambda t: t.repeat(2)), ValueError, r"bias must be \[N\] float with N"),
    "residual flat": (
        (3, lambda t: t[0]),
        ValueError,
        r"residual must be \[2, 7, 40\], got \[7, 4",
    ),
    "residual a number": ((3, lambda t: 1.0), ValueError, r"residual must be .*, got float"),
    "other dtype": ((1, torch.Tensor.double), TypeError, "weight must be torch.float32 as x, got"),
    "other device": ((1, lambda t: t.to("meta")), ValueError, r"must be on \S+, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    (place, change), error, message = BAD[case]
    inputs = linear_inputs()
    inputs[place] = change(inputs[place])
    with pytest.raises(error, match=message):
        linear(*inputs[:3], residual=inputs[3])


def test_bad_activation():
    with pytest.raises(ValueError, match="activation must be one of none, relu, gelu, got 'tanh'"):
        linear(*linear_inputs()[:3], "tanh")


@pytest.mark.cpu_only
def test_the_raw_op_refuses_what_it_cannot_write():
    x, weight, bias, residual = linear_inputs((7,))
    for bad in (residual.t(), residual[:3], residual.double()):
        with pytest.raises(RuntimeError, match="dense"):
            linear_op_(bad, x, weight, bias, 0, None, None)
    with pytest.raises(RuntimeError, match="activation"):
        linear_op_(residual, x, weight, bias, 3, None, None)
