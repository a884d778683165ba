"""The Triton kernels, compiled ahead of time for GPUs that are not there.

The launchers run on meta tensors of real shapes, their launches are compiled and not run: what is
checked is what a user's first call compiles. `make interpret` checks what the kernels compute.
"""

import contextlib
import os
from importlib import import_module

import pytest
import torch

from segkern.ops import _library
from segkern.ops._checks import exact_dtype
from support.comparison import DTYPES
from support.cubin import REGISTERS, SHARED_LIMIT, usage
from support.inputs import query_layer_inputs

pytest.importorskip("triton", reason="no Triton on this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("decorated for the interpreter", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _NoDevice:
    """The driver of an architecture, as far as a compilation asks."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def set_current_device(self, device):
        pass


@contextlib.contextmanager
def compiling(arch):
    """Launches within are compiled for `arch` and gathered in the list that this gives."""
    from segkern.kernels import _launch

    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    with pytest.MonkeyPatch.context() as patch:
        kind = _launch.kind_of(SHARED_LIMIT[arch], arch // 10)
        patch.setattr(_launch, "ASSUMED", _launch.ASSUMED._replace(kind=kind))
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(driver, "_active", _NoDevice(arch))  # reset_active() would need a GPU
        yield compiled


def launch(op, *args):
    return getattr(import_module(f"segkern.kernels.{_library.TRITON[op]}"), op)(*args)


def meta(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")


def masked_attn(dtype, B=2, Q=100, S=4096, H=8, D=32):
    q, k, v = meta(dtype, B, Q, H, D), meta(dtype, B, S, H, D), meta(dtype, B, S, H, D)
    mask = meta(torch.int32, B, Q, (S + 31) // 32), meta(torch.int32, B, Q)
    out, norm = launch("masked_attn", q, k, v, *mask, D**-0.5)
    grad = meta(dtype, B, Q, H * D)
    launch("masked_attn_backward", grad, q, k, v, *mask, out, norm, D**-0.5)


def mask_bits(dtype, B=2, Q=100, C=256, S=4096):
    """Features whose keys lie side by side, and whose channels do."""
    queries = meta(dtype, B, Q, C)
    launch("mask_bits", queries, meta(dtype, B, C, S), 0.0)
    launch("mask_bits", queries, meta(dtype, B, S, C).mT, 0.0)


def point_sample(dtype, B=2, C=256, h=64, w=96, P=12544):
    points = meta(exact_dtype(meta(dtype)), B, P, 2)
    launch("point_sample", meta(dtype, B, C, h, w), points)
    launch("point_sample", meta(torch.uint8, B, C, h, w), points)
    for deterministic in (False, True):
        launch("point_sample_backward", meta(dtype, B, C, P), points, h, w, deterministic)


def random_points(dtype, N=20, n=12544):
    launch("random_points", meta(torch.int64, 1), meta(torch.int64, N, 3), n)


def matching_cost(dtype, B=2, R=10, Q=100, K=133, C=256, h=64, w=96, T=20, H=256, W=384, P=12544):
    """With a number of targets that count and without, without one of points and with."""
    values = (
        meta(dtype, B, R, Q, K + 1),
        meta(dtype, B, R, Q, C),
        meta(dtype, B, C, h, w),
        meta(torch.int64, B, T),
        meta(torch.uint8, B, T, H, W),
        meta(exact_dtype(meta(dtype)), B, R, P, 2),
    )
    launch("matching_cost", *values, meta(torch.int64, B), 2.0, 5.0, 5.0)
    launch("matching_cost", *values, None, 2.0, 5.0, 5.0, meta(torch.int64, B, R))


def segment_map(dtype, B=2, Q=100, K=133, h=128, w=192, out=(480, 640), C=256, n=100):
    """Every task; logits and, once, embeddings; both ways to resize for semantic."""
    exact, masks = exact_dtype(meta(dtype)), meta(dtype, B, Q, h, w)
    sizes = [512, 768, 500, 700, *out]
    rows = meta(exact, B, Q), meta(torch.int64, B, Q)
    launch("segment_map", *rows, meta(torch.bool, K), masks, None, sizes, 0.8)
    product = meta(dtype, B, Q, C), meta(dtype, B, C, h, w)
    launch("segment_map", *rows, None, *product, sizes, 0.8)
    weights = meta(exact, B, Q, K)
    for resized in (False, True):
        for asked in (False, True):
            launch("segment_map_semantic", weights, masks, None, sizes, resized, asked)
    launch("segment_map_instance", meta(torch.int64, B, n), masks, None, sizes)
    bits, order = (B, n, out[0], (out[1] + 31) // 32), meta(torch.int64, B, n)
    launch("segment_map_cover", meta(torch.int32, *bits), order, out[1])


def group_norm(dtype, B=2, C=256, h=128, w=192, H=64, W=96, groups=32):
    """Both ends of a pyramid's step, as under autocast; with their gradients."""
    x, exact = meta(dtype, B, h, w, C), exact_dtype(meta(dtype))
    weights = meta(exact, C), meta(exact, C)
    for relu, up in ((True, None), (False, meta(exact, B, H, W, C))):
        out, *moments = launch("group_norm", x, *weights, groups, 1e-5, relu, up)
        size = (None, None) if up is None else ([H, W], exact)
        launch("group_norm_backward", out, x, *weights, *moments, groups, relu, *size)


def norm_relu(dtype, B=2, C=256, h=128, w=192):
    x, exact = meta(dtype, B, h, w, C).permute(0, 3, 1, 2), exact_dtype(meta(dtype))
    norm = [meta(exact, C)] * 4
    for other in ((None, []), (x, []), (x, norm)):
        y = launch("norm_relu", x, norm, 1e-5, *other, 1e-5)
        frozen = None, norm, 1e-5, None, other[1], 1e-5
        launch("norm_relu_backward", y, y, other[0] is not None, *frozen)
    launch("norm_relu_backward", y, y, True, x, norm, 1e-5, x, norm, 1e-5)  # norms that train


def query_layer(dtype, B=1, Q=100, C=256, H=8, F=2048, M=256):
    """With a next query and without, by the same kernels."""
    inputs = query_layer_inputs(B, Q, C, H, F, M, dtype=dtype, device="meta")
    (x, attended, position), layer, prediction = inputs[:3], inputs[3:23], inputs[23:]
    for tensors in (prediction, prediction[:8]):
        launch("query_prediction", x, position, tensors, 1e-5)
        launch("query_layer", x, attended, position, layer, tensors, H, 1e-5)


def window_attn(dtype, B=2, h=100, w=168, H=6, D=32, window=7, shift=3):
    exact, S = exact_dtype(meta(dtype)), window * window
    qkv, biases = meta(dtype, B, h, w, 3, H, D), (meta(exact, 3, H, D), meta(exact, H, S, S))
    options = window, shift, D**-0.5
    grad = launch("window_attn", qkv, *biases, *options)
    launch("window_attn_backward", grad, qkv, *biases, *options)


def neighborhood_attn(dtype, B=2, h=100, w=168, H=6, D=32, kernel=7, dilation=2):
    """Views of one projection, as a layer has them."""
    exact, side = exact_dtype(meta(dtype)), 2 * kernel - 1
    qkv, bias = meta(dtype, B, h, w, 3, H, D).unbind(3), meta(exact, H, side, side)
    options = [kernel] * 2, [dilation] * 2, D**-0.5
    grad = launch("neighborhood_attn", *qkv, bias, *options)
    launch("neighborhood_attn_backward", grad, *qkv, bias, *options)


def resize_argmax(dtype, B=2, K=150, h=32, w=40, H=512, W=640):
    exact = exact_dtype(meta(dtype))
    launch("resize_argmax", meta(dtype, B, K, h, w), meta(exact, H, h), meta(exact, W, w))


def resize_sum(dtype, B=2, E=256, side=128, levels=3):
    """The head's maps, and as many as there can be."""
    sides = [max(side >> l, 1) for l in range(levels + 1)]
    maps, bias = [meta(dtype, B, s, s, E) for s in sides], meta(dtype, E)
    out = launch("resize_sum", maps, bias, True)
    launch("resize_sum", [out] * 8, None, False)
    launch("resize_sum_backward", out, [s for s in sides[1:] for _ in "hw"])


def dwconv3x3_gelu(dtype, B=2, h=128, w=128, C=128):
    x, filters, bias = meta(dtype, B, h, w, C), meta(dtype, 9, C), meta(dtype, C)
    out = launch("dwconv3x3_gelu", x, filters, bias)
    launch("dwconv3x3_gelu_backward", out, x, filters, bias)


OPS = (masked_attn, mask_bits, point_sample, matching_cost, segment_map, group_norm, norm_relu)
OPS += (query_layer, window_attn, random_points, resize_argmax, resize_sum, dwconv3x3_gelu)
OPS += (neighborhood_attn,)
# sizes of one call after another, none of which may compile anew after the first two
SIZES = {
    masked_attn: [{"S": s, "Q": q} for s in (1024, 1330, 4096, 16801) for q in (100, 77, 200)],
    mask_bits: [{"S": s, "B": b} for s in (1024, 1330, 4096, 16801) for b in (2, 3, 16)],
    point_sample: [{"P": p, "h": h} for p in (12544, 101, 37632) for h in (64, 51, 200)],
    query_layer: [{"Q": q, "B": b} for q in (100, 77, 16, 1) for b in (1, 2, 5)],
    random_points: [{"N": i, "n": n} for i in (20, 16, 1) for n in (12544, 7, 1)],
    matching_cost: [{"T": t, "B": b} for t in (16, 20, 24, 100, 33) for b in (2, 3, 16)],
    segment_map: [
        {"h": h, "out": out, "Q": q, "K": k}
        for out in ((480, 640), (500, 333), (1, 1))
        for h in (128, 125)
        for q, k in ((100, 133), (1, 1), (300, 19))
    ],
    group_norm: [{"B": b, "h": h, "H": 2 * h - 1} for b in (2, 1, 16) for h in (128, 17, 1)],
    norm_relu: [{"B": b, "h": h} for b in (2, 1) for h in (128, 17)],
    resize_argmax: [
        {"K": k, "h": h, "W": w} for k in (150, 16, 1) for h, w in ((32, 640), (9, 1))
    ],
    resize_sum: [{"B": b, "side": side} for b in (2, 1, 5) for side in (128, 17, 1)],
    dwconv3x3_gelu: [{"B": b, "h": h} for b in (2, 1, 5) for h in (128, 17, 1)],
    window_attn: [
        {"h": h, "H": heads, "shift": shift, "B": b}
        for h, shift in ((100, 3), (64, 0), (7, 3))
        for heads, b in ((3, 1), (6, 2), (24, 16))
    ],
    neighborhood_attn: [
        {"h": h, "H": heads, "kernel": kernel, "dilation": dilation, "B": b}
        for h, kernel, dilation in ((100, 7, 1), (64, 7, 8), (220, 11, 16), (16, 3, 2))
        for heads, b in ((3, 1), (6, 2), (24, 16))
    ],
}
CHECKED = 86, 90  # by `make check`: of the least and of the most shared memory


def slow(arch):
    """Marks of what is compiled for `arch`; `make long` has those that CHECKED leaves out."""
    return [pytest.mark.slow] if arch in CHECKED else [pytest.mark.slow, pytest.mark.long]


def marked(values):
    return pytest.param(*values, marks=slow(values[-1]))


# what is made for sm_89 differs from sm_86 in nothing but the name; kernels without tuning tables
# are alike on all GPUs of some generations
ALIKE = (random_points, resize_argmax, group_norm, norm_relu)  # no tuning: one kernel for all
ALIKE += (resize_sum, dwconv3x3_gelu)
ARCHITECTURES = [*((op, arch) for arch in (80, 90, 100) for op in OPS if op not in ALIKE)]
ARCHITECTURES += [
    (op, arch)
    for arch in (86, 120)
    for op in (masked_attn, mask_bits, matching_cost, window_attn, neighborhood_attn)
]
ARCHITECTURES.append((query_layer, 86))
VARIANTS = [(op, arch, dtype) for op, arch in ARCHITECTURES for dtype in DTYPES]
# in other precisions query_layer's reference runs; float16 differs in the name of an instruction
VARIANTS = [v for v in VARIANTS if v[0] != query_layer or v[2] == torch.bfloat16]
VARIANTS = [v for v in VARIANTS if v[2] != torch.float16 or v[0] not in (window_attn, segment_map)]
VARIANTS += [(op, 90, torch.bfloat16) for op in ALIKE]
VARIANTS += [(op, 86, torch.float32) for op in ALIKE if op != random_points]
VARIANTS += [(op, 100, torch.float64) for op in ALIKE if op != random_points]
VARIANTS += [(op, 89, torch.bfloat16) for op in (masked_attn, mask_bits)]


def named(variant):
    op, arch, dtype = variant
    quick = arch == 90 and dtype == torch.bfloat16
    name = f"{op.__name__}-{str(dtype).removeprefix('torch.')}-{arch}"
    return pytest.param(*variant, id=name, marks=() if quick else slow(arch))


def assert_fits(compiled, arch, folder, spills=0):
    """Every kernel has the shared memory it needs, and the registers but for bytes a thread that
    may spill: none, but where a test says so."""
    assert compiled
    for kernel in {id(k): k for k in compiled}.values():
        path = folder / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        (used,) = usage(path)
        assert kernel.metadata.shared <= SHARED_LIMIT[arch], (kernel.metadata, used)
        assert used["registers"] * 32 * kernel.metadata.num_warps <= REGISTERS, (
            kernel.metadata,
            used,
        )
        assert used["local"] <= spills, (kernel.metadata, used)


@pytest.mark.parametrize(("op", "arch", "dtype"), map(named, VARIANTS))
def test_compiles_and_fits(op, arch, dtype, tmp_path):
    with compiling(arch) as compiled:
        op(dtype)
    assert_fits(compiled, arch, tmp_path)


# channels a head, and queries: 200 are more than the gradients take at once
HEADS = [(D, Q, a) for D, Q in ((64, 200), (72, 100), (256, 100)) for a in (80, 86, 90, 100, 120)]
HEADS = [*HEADS, (32, 200, 90), (32, 200, 100)]
HEADS = [pytest.param(*h, marks=() if h == (64, 200, 90) else slow(h[-1])) for h in HEADS]


@pytest.mark.parametrize(("D", "Q", "arch"), HEADS)
def test_other_heads(D, Q, arch, tmp_path):
    with compiling(arch) as compiled:
        masked_attn(torch.bfloat16, D=D, Q=Q)
    assert_fits(compiled, arch, tmp_path)


QUICK = 86  # where rows are fewest, which the oldest supported Triton cannot multiply
WIDE_HEADS = [pytest.param(a, marks=() if a == QUICK else slow(a)) for a in (80, 86, 90, 100, 120)]


@pytest.mark.parametrize("arch", WIDE_HEADS)
def test_wide_heads_in_float32(arch, tmp_path):
    """Of 256 channels, which ordinary units multiply; older Tritons spill within 99 KB."""
    from segkern.kernels.masked_attn_backward import FEWER

    with compiling(arch) as compiled:
        masked_attn(torch.float32, D=256, Q=200)
    spills = 0 if FEWER or SHARED_LIMIT[arch] > 99 * 1024 else 720
    assert_fits(compiled, arch, tmp_path, spills)


WIDE = [(torch.float32, 128, 7, arch) for arch in (80, 86, 90, 100, 120)]
WIDE += [(torch.float32, 64, 7, 100), (torch.float32, 72, 7, 86)]
WIDE += [(torch.bfloat16, 128, 7, arch) for arch in (86, 90, 100, 120)]
WIDE += [(torch.bfloat16, 64, 7, 90), (torch.bfloat16, 128, 12, 90)]


@pytest.mark.parametrize(("dtype", "D", "window", "arch"), map(marked, WIDE))
def test_windows_of_wide_heads(dtype, D, window, arch, tmp_path):
    with compiling(arch) as compiled:
        window_attn(dtype, H=2, D=D, window=window, shift=window // 2)
    assert_fits(compiled, arch, tmp_path)


WIDE = [(torch.float32, 64, arch) for arch in (80, 86, 90, 100, 120)]
WIDE += [(torch.float32, 128, arch) for arch in (86, 90, 100)]
WIDE += [(torch.bfloat16, D, arch) for D in (64, 128) for arch in (86, 90, 100)]


@pytest.mark.parametrize(("dtype", "D", "arch"), map(marked, WIDE))
def test_neighbors_of_wide_heads(dtype, D, arch, tmp_path):
    with compiling(arch) as compiled:
        neighborhood_attn(dtype, H=2, D=D, kernel=11)
    assert_fits(compiled, arch, tmp_path)


WIDE = [(dtype, arch) for dtype in DTYPES[::2] for arch in (80, 86, 90, 100, 120)]


@pytest.mark.parametrize(("dtype", "arch"), map(marked, WIDE))
def test_wide_windows(dtype, arch, tmp_path):
    with compiling(arch) as compiled:
        window_attn(dtype, window=12, shift=6)
    assert_fits(compiled, arch, tmp_path)


GPUS = {  # bytes of shared memory that a block may ask for, major capability: kind
    "A100": (166912, 8, "163 KB"),
    "Orin": (166912, 8, "163 KB"),
    "RTX 3090": (101376, 8, "99 KB"),
    "RTX 4090": (101376, 8, "99 KB"),
    "RTX 5090": (101376, 12, "99 KB"),
    "H200": (232448, 9, "227 KB"),
    "B200": (232448, 10, "227 KB, 10.x"),
}


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_has_its_tables(gpu):
    from segkern.kernels import (
        _launch,
        mask_bits,
        masked_attn_backward,
        matching_cost,
        window_attn,
    )
    from segkern.kernels.masked_attn import FORWARD

    *has, kind = GPUS[gpu]
    assert _launch.kind_of(*has) == kind
    windows = window_attn.FORWARD, window_attn.BACKWARD
    for table in (mask_bits.TABLE, FORWARD, masked_attn_backward.BACKWARD, *windows):
        assert {(kind, 2), (kind, 4), (kind, 8)} <= table.keys()
    assert {(kind, "half"), (kind, "single")} <= matching_cost.TABLE.keys()


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_a_new_size_compiles_nothing(op):
    variants = []
    with compiling(90) as compiled:
        for sizes in SIZES[op]:
            op(torch.bfloat16, **sizes)
            variants.append(len({kernel.hash for kernel in compiled}))
    assert variants[-1] <= ALLOWED.get(op, variants[0]), variants


def test_launches_of_a_decoder_layer():
    """Nothing but the mask (here from features of two layouts), attention and its gradients."""
    with compiling(90) as compiled:
        mask_bits(torch.bfloat16)
        masked_attn(torch.bfloat16)
    names = [kernel.metadata.name for kernel in compiled]
    assert names == ["_mask_bits", "_mask_bits", "forward", "join", "backward", "add"]


# mask_bits reads 8, 4, 2 or 1 keys at a time, whichever divides their number, or channels;
# more queries than masked_attn's gradients take at once are another kernel
ALLOWED = {mask_bits: 5, masked_attn: 5}
