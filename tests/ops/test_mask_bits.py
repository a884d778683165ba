"""mask_bits: the packed mask of the keys that a query may attend to."""

import pytest
import torch

from segkern.ops import mask_bits
from segkern.ops.mask_bits import as_features, mask_bits_reference, pack_bits, unpack_bits
from support.comparison import DTYPES
from support.inputs import mask_bits_inputs

CASES = {
    "small": {},
    "one word": {"S": 32},
    "one key": {"S": 1},
    "tail of one": {"S": 33},
    "tail of one after a panel": {"S": 129},
    "one query, one channel": {"Q": 1, "C": 1},
    "many queries": {"B": 1, "Q": 131, "C": 256, "S": 1000},
    "many keys": {"B": 2, "Q": 3, "C": 5, "S": 5000},
    "many channels": {"C": 300},
}


def assert_bits(actual, queries, features, threshold=0.0):
    """Bits equal the exact ones, save where the product is within its rounding of the threshold.

    A sum of C products in precision eps is off by at most C eps sum |a b| (Higham, section 3.1).
    """
    bits, open = actual
    exact_q, exact_f = queries.double(), features.double()
    product = exact_q @ exact_f
    S = features.shape[2]
    flipped = unpack_bits(bits, S) != (product >= threshold)
    eps = torch.finfo(torch.promote_types(queries.dtype, torch.float32)).eps
    rounding = features.shape[1] * eps * (exact_q.abs() @ exact_f.abs())
    assert not (flipped & ((product - threshold).abs() > rounding)).any(), "a bit is wrong"
    assert bits.dtype == open.dtype == torch.int32
    repacked, count = pack_bits(unpack_bits(bits, S))
    assert torch.equal(bits, repacked), "tail bits must be 0"
    assert torch.equal(open, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, dtype):
    inputs = mask_bits_inputs(**CASES[case], dtype=dtype)
    assert_bits(mask_bits(*inputs), *inputs)
    assert_bits(mask_bits_reference(*inputs), *inputs)


@pytest.mark.parametrize("threshold", [-3.0, 0.7, 1e9, -1e9])
def test_threshold(threshold):
    inputs = mask_bits_inputs()
    assert_bits(mask_bits(*inputs, threshold), *inputs, threshold)


def test_a_product_at_the_threshold_is_open():
    queries = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [-1.0, 0.0]]])
    features = torch.full((1, 2, 40), 0.5)
    bits, open = mask_bits(queries, features)
    assert open.tolist() == [[40, 40, 0]]
    assert bits[0].tolist() == [[-1, 255], [-1, 255], [0, 0]]
    assert mask_bits(queries, features, 1.0)[1].tolist() == [[40, 0, 0]]


def test_low_precision_is_compared_before_it_is_rounded():
    queries, features = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[1.0], [2.0**-9]]])
    for dtype in (torch.bfloat16, torch.float16):
        open = mask_bits(queries.to(dtype), features.to(dtype), 1.001)[1]
        assert open.item() == 1, "1 + 2^-9 is 1 in bfloat16, but at least 1.001 in float32"


def test_no_gradient_flows():
    queries, features = (t.requires_grad_() for t in mask_bits_inputs())
    for impl in ("kernel", "reference"):
        assert not any(t.requires_grad for t in mask_bits(queries, features, impl=impl))


def test_autocast_changes_nothing():
    inputs = mask_bits_inputs(C=256, S=1000)
    for impl in ("kernel", "reference"):
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            under = mask_bits(*inputs, impl=impl)
        assert torch.equal(under[0], mask_bits(*inputs, impl=impl)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.segkern.mask_bits, (*mask_bits_inputs(dtype=dtype), 0.0))


def test_compile():
    inputs = mask_bits_inputs()
    compiled = torch.compile(mask_bits, fullgraph=True, backend="aot_eager")
    for actual, want in zip(compiled(*inputs), mask_bits(*inputs)):
        assert torch.equal(actual, want)


BAD = {
    "queries 2-d": (lambda q, f: (q[0], f), ValueError, r"queries must be \[B, Q, C\] float"),
    "queries int64": (lambda q, f: (q.long(), f), TypeError, "queries must be .* got .* int64"),
    "features 4-d": (lambda q, f: (q, f[..., None]), ValueError, r"features must be \[B, C, S\]"),
    "other channels": (lambda q, f: (q, f[:, 1:]), ValueError, "with B = 2, C = 24, got"),
    "other batch": (lambda q, f: (q, f[:1]), ValueError, "with B = 2, C = 24, got"),
    "other dtype": (
        lambda q, f: (q, f.double()),
        TypeError,
        "features must be torch.float32 as queries, got torch.float64",
    ),
    "no tensor": (lambda q, f: (q, None), TypeError, "features must be .* got NoneType"),
    "other device": (lambda q, f: (q, f.to("meta")), ValueError, r"must be on \S+, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        mask_bits(*change(*mask_bits_inputs()))


@pytest.mark.parametrize(
    ("B", "Q", "C", "S"),
    [(0, 3, 4, 40), (2, 0, 4, 40), (2, 3, 4, 0)],
    ids=["no image", "no query", "no key"],
)
def test_empty(B, Q, C, S):
    bits, open = mask_bits(torch.zeros(B, Q, C), torch.zeros(B, C, S))
    assert bits.shape == (B, Q, (S + 31) // 32)
    assert torch.equal(open, torch.zeros(B, Q, dtype=torch.int32))


def test_no_channel_is_a_product_of_zero():
    assert mask_bits(torch.zeros(1, 2, 0), torch.zeros(1, 0, 40))[1].tolist() == [[40, 40]]


def test_non_contiguous():
    queries, features = mask_bits_inputs()
    want = mask_bits(queries, features)[0]
    strided = queries.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(mask_bits(strided, features)[0], want)
    last = features.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(mask_bits(queries, last)[0], want)
    wide = torch.cat((features, features), 2)
    assert torch.equal(mask_bits(queries, wide[:, :, : features.shape[2]])[0], want)


@pytest.mark.parametrize(("C", "h", "w"), [(24, 5, 9), (256, 3, 25), (300, 1, 33)])
def test_channels_last(C, h, w):
    queries, features = mask_bits_inputs(C=C, S=h * w)
    want = mask_bits(queries, features)
    maps = features.unflatten(2, (h, w)).contiguous(memory_format=torch.channels_last)
    last = as_features(maps)
    assert torch.equal(last, features)
    for other in (last, maps.flatten(2)):
        assert all(torch.equal(a, b) for a, b in zip(mask_bits(queries, other), want))


def test_features_of_a_gpu_are_views():
    maps = torch.empty(2, 24, 5, 9, device="meta")
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = maps.contiguous(memory_format=layout)
        features = as_features(maps)
        assert features._base is maps
        assert features.shape == (2, 24, 45)


def test_nan_closes():
    queries, features = mask_bits_inputs()
    queries[0, 0] = float("nan")
    features[:, :, 5] = float("nan")
    bits, open = mask_bits(queries, features)
    assert open[0, 0] == 0
    mask = unpack_bits(bits, features.shape[2])
    assert not mask[:, :, 5].any()
    clean = unpack_bits(mask_bits(*mask_bits_inputs())[0], features.shape[2])
    keep = torch.arange(features.shape[2]) != 5
    assert torch.equal(mask[0, 1:, keep], clean[0, 1:, keep])


def test_pack_and_unpack():
    mask = torch.rand(3, 2, 97) < 0.5
    bits, open = pack_bits(mask)
    assert torch.equal(unpack_bits(bits, 97), mask)
    assert torch.equal(open, mask.sum(-1, dtype=torch.int32))
    one = torch.zeros(64, dtype=torch.bool)
    one[63] = True
    assert pack_bits(one)[0].tolist() == [0, -(2**31)]
