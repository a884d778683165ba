"""Inputs for each op and random targets: what tests and benchmarks measure on.

They are made on the CPU, so that they are the same numbers everywhere, and then moved.
"""

import functools
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from segkern.ops.mask_bits import pack_bits

SEED = 0  # shifts the seed of whatever is made here; pytest's --seed sets it


def moved(values, device: torch.device | str):
    """The same values with every tensor on `device`; walks lists and tuples."""
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, (list, tuple)):
        return type(values)(moved(v, device) for v in values)
    return values


def _made_on_cpu(make: Callable) -> Callable:
    """Gives `make` an argument `device`, where its tensors end (None is the default device), and
    shifts its `seed` by SEED."""
    own = inspect.signature(make).parameters["seed"].default

    @functools.wraps(make)
    def made(*args, device: torch.device | str | None = None, seed: int = own, **kwargs):
        with torch.device("cpu"):
            values = make(*args, seed=seed + 1000 * SEED, **kwargs)
        return moved(values, torch.get_default_device() if device is None else device)

    return made


@_made_on_cpu
def point_sample_inputs(
    B=2, C=3, h=17, w=23, P=50, dtype=torch.float32, seed=0, spread=0.2
) -> list[Tensor]:
    """features [B, C, h, w], points [B, P, 2] that leave the map by up to `spread` of its size."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(B, C, h, w, generator=g).to(dtype)
    points = torch.rand(B, P, 2, generator=g) * (1 + 2 * spread) - spread
    return [
        features,
        points.to(torch.float64 if dtype == torch.float64 else torch.float32),
    ]


@_made_on_cpu
def point_mask_loss_inputs(
    B=2, R=3, T=4, h=9, w=12, H=31, W=45, dtype=torch.float32, seed=0
) -> list[Tensor]:
    """mask_logits [B, R, T, h, w], masks [B, T, H, W], active [B, R, T], ids [B], seed [1]."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, R, T, h, w, generator=g)
    masks = (torch.rand(B, T, H, W, generator=g) > 0.6).byte()
    active = torch.rand(B, R, T, generator=g) > 0.3
    sample_ids = torch.randint(0, 10**6, (B,), generator=g)
    key = torch.tensor([0x123456789AB])
    return [logits.to(dtype), masks, active, sample_ids, key]


@_made_on_cpu
def random_targets(counts: Sequence[int], labels: int, H: int, W: int, seed: int = 3) -> tuple:
    """Smooth random shapes, as Hugging Face's lists.

    Returns:
        masks, for each image [T_b, H, W] float32 of 0 and 1; labels, [T_b] int64 below `labels`.
    """
    g = torch.Generator().manual_seed(seed)
    masks, classes = [], []
    for n in counts:
        coarse = torch.randn(n, 1, 5, 5, generator=g)
        smooth = (
            torch.nn.functional.interpolate(coarse, (H, W), mode="bicubic")
            if n
            else coarse.new_empty(0, 1, H, W)
        )
        masks.append((smooth[:, 0] > 0.3).float())
        classes.append(torch.randint(labels, (n,), generator=g))
    return masks, classes


@_made_on_cpu
def ms_deform_attn_inputs(
    B=2,
    H=3,
    D=8,
    P=2,
    shapes=((5, 7), (3, 4)),
    Q=11,
    one_image=False,
    one_level=False,
    spread=1.5,
    margin=0.0,
    dtype=torch.float32,
    seed=0,
) -> list:
    """value, shapes, reference, offsets, logits of ms_deform_attn.

    Args:
        Q: queries; None for one a pixel, with its centre as the reference (the encoder's case).
        spread: standard deviation of the offsets in pixels; samples leave the maps.
        margin: moves samples that lie nearer than this to the kinks of bilinear sampling (pixel
            centres) to that distance, for the comparison of gradients.
    """
    g = torch.Generator().manual_seed(seed)
    L, S = len(shapes), sum(h * w for h, w in shapes)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    if Q is None:
        Q = S
        centres = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1)
            for h, w in shapes
        ]
        reference = torch.cat(centres)[None, :, None].repeat(B, 1, L, 1).double()
    else:
        size = (1 if one_image else B, Q, 1 if one_level else L, 2)
        reference = torch.rand(size, generator=g, dtype=torch.float64)
    reference = reference[:1] if one_image else reference
    sides = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]  # [L, 1, 2]
    offsets = torch.randn(B, Q, H, L, P, 2, generator=g, dtype=torch.float64) * spread
    if margin:
        start = reference[:, :, None, :, None] * sides - 0.5
        place = start + offsets
        low = place.floor()
        offsets = low + (place - low).clamp(margin, 1 - margin) - start
    value = torch.randn(B, S, H, D, generator=g)
    logits = torch.randn(B, Q, H, L, P, generator=g)
    return [
        value.to(dtype),
        tuple(shapes),
        reference.to(exact),
        offsets.to(exact),
        logits.to(dtype),
    ]


@_made_on_cpu
def mask_bits_inputs(B=2, Q=13, C=24, S=70, dtype=torch.float32, seed=0):
    """queries [B, Q, C], features [B, C, S], standard normal."""
    g = torch.Generator().manual_seed(seed)
    queries, features = torch.randn(B, Q, C, generator=g), torch.randn(B, C, S, generator=g)
    return [queries.to(dtype), features.to(dtype)]


@_made_on_cpu
def feed_forward_inputs(shape=(2, 7), C=12, F=40, dtype=torch.float32, seed=0) -> list[Tensor]:
    """x [*shape, C], weight1 [F, C], bias1 [F], weight2 [C, F], bias2 [C]."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((*shape, C), 1), ((F, C), C), ((F,), 1), ((C, F), F), ((C,), 1)
    return [(torch.randn(s, generator=g) * n**-0.5).to(dtype) for s, n in sizes]


@_made_on_cpu
def linear_inputs(shape=(2, 7), K=12, N=40, dtype=torch.float32, seed=0) -> list[Tensor]:
    """x [*shape, K], weight [N, K], bias [N], residual [*shape, N]."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((*shape, K), 1), ((N, K), max(K, 1)), ((N,), 1), ((*shape, N), 1)
    return [(torch.randn(s, generator=g) * n**-0.5).to(dtype) for s, n in sizes]


@_made_on_cpu
def masked_attn_inputs(
    B=2,
    Q=13,
    S=70,
    H=3,
    D=16,
    density=0.2,
    compact=True,
    dtype=torch.float32,
    seed=0,
) -> list[Tensor]:
    """q [B, Q, H, D], k and v [B, S, H, D], bits, open.

    Args:
        density: share of the keys that a row may attend to; 0 closes all rows.
        compact: the open keys of a row form a disc on a map of about sqrt(S) x sqrt(S) pixels,
            as masks of objects do; else they are scattered.
    """
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, H, D, generator=g).to(dtype) for n in (Q, S, S))
    side = max(1, round(S**0.5))
    pixel = torch.arange(S)
    place = torch.stack((pixel % side, pixel // side), -1)  # [S, 2]
    centre = torch.rand(B, Q, 1, 2, generator=g) * side
    distance = (place - centre).square().sum(-1) if compact else torch.rand(B, Q, S, generator=g)
    nearest = distance.argsort(-1).argsort(-1)  # rank of each key
    bits, open = pack_bits(nearest < round(density * S))
    return [q, k, v, bits, open]


@_made_on_cpu
def linear_assignment_inputs(
    N=5, Q=12, T=7, kind="uniform", dtype=torch.float32, seed=0
) -> list[Tensor]:
    """cost [N, Q, T] of one `kind`, n_targets [N] from 0 to T; every problem can be solved.

    Args:
        kind: "uniform"; "integers" (0 to 4, many ties); "constant rows"; "small" and "large"
            (1e-12 and 1e12 times); "forbidden" (a third of the pairs +inf); "degenerate"
            (a_q + b_t + noise, the costs of an untrained model); "constant".
    """
    g = torch.Generator().manual_seed(seed)
    cost = torch.rand(N, Q, T, generator=g)
    counts = torch.randint(0, T + 1, (N,), generator=g)
    if kind == "integers":
        cost = torch.randint(0, 5, (N, Q, T), generator=g).float()
    elif kind == "constant rows":
        cost = torch.randn(N, Q, 1, generator=g).expand(N, Q, T).clone()
    elif kind in ("small", "large"):
        cost = (cost - 0.5) * (1e-12 if kind == "small" else 1e12)
    elif kind == "forbidden":
        open_ = torch.rand(N, Q, T, generator=g) > 1 / 3
        # every diagonal that a full assignment may need stays open
        open_ |= torch.arange(Q)[:, None] % T == torch.arange(T) % Q if T else open_
        cost = cost.masked_fill(~open_, float("inf"))
    elif kind == "degenerate":
        a, b = torch.rand(N, Q, 1, generator=g), torch.rand(N, 1, T, generator=g)
        cost = a + b + 0.05 * cost
    elif kind == "constant":
        cost = torch.full((N, Q, T), -2.5)
    elif kind != "uniform":
        raise ValueError(f"linear_assignment_inputs: no kind '{kind}'")
    return [cost.to(dtype), counts]


@_made_on_cpu
def matching_cost_inputs(
    B=2,
    R=3,
    Q=7,
    K=5,
    C=8,
    h=9,
    w=11,
    T=4,
    H=33,
    W=41,
    P=60,
    dtype=torch.float32,
    seed=0,
) -> list[Tensor]:
    """The seven tensors of matching_cost: targets are ellipses, the first image has all T."""
    g = torch.Generator().manual_seed(seed)
    class_logits = 2 * torch.randn(B, R, Q, K + 1, generator=g)
    mask_embed = 2 * torch.randn(B, R, Q, C, generator=g) / C**0.5
    features = 2 * torch.randn(B, C, h, w, generator=g)
    labels = torch.randint(0, K, (B, T), generator=g)
    y, x = torch.meshgrid(torch.linspace(0, 1, H), torch.linspace(0, 1, W), indexing="ij")
    centre, radius = torch.rand(2, B, T, 2, 1, 1, generator=g)
    away = ((x - centre[:, :, 0]) ** 2 + (y - centre[:, :, 1]) ** 2).sqrt()
    masks = (away < 0.1 + 0.4 * radius[:, :, 0]).to(torch.uint8)
    points = torch.rand(B, R, P, 2, generator=g)
    n_targets = torch.randint(0, T + 1, (B,), generator=g)
    n_targets[:1] = T
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [t.to(dtype) for t in (class_logits, mask_embed, features)]
    others = (labels, masks, points.to(exact), n_targets)
    return [*tensors, *others]


@_made_on_cpu
def segment_map_inputs(
    B=2, Q=13, K=7, h=16, w=24, kind="noise", dtype=torch.float32, seed=0
) -> list[Tensor]:
    """class_logits [B, Q, K+1] and mask_logits [B, Q, h, w].

    Args:
        kind: "noise": smooth random maps, unsure classes: an untrained model. "shapes": discs with
            steep edges, two queries in three sure of a class, the others of none: a trained one.
    """
    g = torch.Generator().manual_seed(seed)
    classes = 2 * torch.randn(B, Q, K + 1, generator=g)
    if kind == "noise":
        coarse = 6 * torch.randn(B, Q, (h + 15) // 16 + 1, (w + 15) // 16 + 1, generator=g)
        masks = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")
    elif kind == "shapes":
        sure = torch.where(torch.rand(B, Q, generator=g) < 2 / 3, 0, K)
        sure += (sure == 0) * torch.randint(0, K, (B, Q), generator=g)
        classes = 0.5 * classes + 10 * torch.nn.functional.one_hot(sure, K + 1)
        y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
        centre, radius = torch.rand(2, B, Q, 2, 1, 1, generator=g)
        away = ((x - centre[:, :, 0]) ** 2 + (y - centre[:, :, 1]) ** 2).sqrt()
        masks = (80 * (0.05 + 0.3 * radius[:, :, 0] - away)).clamp(-12, 12)
        masks = masks + 0.3 * torch.randn(masks.shape, generator=g)
    else:
        raise ValueError(f"segment_map_inputs: no kind '{kind}'")
    return [classes.to(dtype), masks.to(dtype)]


@_made_on_cpu
def resize_argmax_inputs(
    B=2, K=7, h=5, w=6, H=37, W=50, windows=1, dtype=torch.float32, seed=0
) -> list[Tensor]:
    """maps [B, K, h, w], normal; rows [H, h] and columns [W, w] of a bilinear resize, of which
    `windows` stand side by side and share the result's columns."""
    maps = torch.randn(B, K, h, w, generator=torch.Generator().manual_seed(seed)).to(dtype)
    exact = torch.promote_types(dtype, torch.float32)

    def bilinear(n, out):
        eye = torch.eye(n, dtype=exact)[None]
        return torch.nn.functional.interpolate(eye, size=out, mode="linear")[0].mT

    return [maps, bilinear(h, H), bilinear(w // windows, W).repeat(1, windows) / windows]


@_made_on_cpu
def window_attn_inputs(
    B=2, h=9, w=12, H=3, D=16, window=4, shift=0, dtype=torch.float32, seed=0
) -> list:
    """qkv [B, h, w, 3, H, D], qkv_bias [3, H, D] (sigma 1/4) and bias [H, S, S], normal; window
    and shift."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, h, w, 3, H, D), (3, H, D), (H, window**2, window**2)
    qkv, qkv_bias, bias = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return [qkv, qkv_bias / 4, bias, window, shift]


@_made_on_cpu
def neighborhood_attn_inputs(
    B=2, h=9, w=12, H=3, D=16, kernel=3, dilation=1, dtype=torch.float32, seed=0
) -> list:
    """q, k and v [B, h, w, H, D], views of one tensor, and bias [H, 2 K - 1, 2 K - 1], normal;
    kernel and dilation, numbers or pairs."""
    g = torch.Generator().manual_seed(seed)
    tall, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    qkv = torch.randn(B, h, w, 3, H, D, generator=g).to(dtype)
    bias = torch.randn(H, 2 * tall - 1, 2 * wide - 1, generator=g).to(dtype)
    return [*qkv.unbind(3), bias, kernel, dilation]


@_made_on_cpu
def conv3x3_inputs(B=2, C=6, K=5, h=7, w=10, dtype=torch.float32, seed=0) -> list[Tensor]:
    """x [B, C, h, w], normal, channels last; weight [K, C, 3, 3], so that the sums are about 1."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, h, w, C, generator=g).permute(0, 3, 1, 2)
    weight = torch.randn(K, C, 3, 3, generator=g) / (3 * max(C, 1) ** 0.5)
    return [x.to(dtype), weight.to(dtype)]


@_made_on_cpu
def group_norm_inputs(
    B=2, C=12, h=7, w=10, up=None, dtype=torch.float32, seed=0, mean=0.0
) -> list[Tensor]:
    """x [B, C, h, w] around `mean`, channels last; weight and bias [C]; a map of size `up`, if
    any."""
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(B, *s, C, generator=g).permute(0, 3, 1, 2) for s in ((h, w), up) if s]
    maps[0] = maps[0] + mean
    weight, bias = torch.randn(2, C, generator=g)
    return [t.to(dtype) for t in (maps[0], weight, bias, *maps[1:])]


@_made_on_cpu
def resize_sum_inputs(
    B=2, E=6, sizes=((7, 10), (4, 5), (2, 3)), dtype=torch.float32, seed=0
) -> list[Tensor]:
    """bias [E] and maps [B, E, *size], normal, channels last."""
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(B, *size, E, generator=g).permute(0, 3, 1, 2) for size in sizes]
    return [t.to(dtype) for t in (torch.randn(E, generator=g), *maps)]


@_made_on_cpu
def dwconv3x3_gelu_inputs(B=2, h=7, w=10, C=6, dtype=torch.float32, seed=0) -> list[Tensor]:
    """x [B, h, w, C], weight [C, 1, 3, 3] and bias [C], so that the sums are about 1."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, h, w, C), (C, 1, 3, 3), (C,)
    x, weight, bias = (torch.randn(s, generator=g) for s in shapes)
    return [x.to(dtype), (weight / 3).to(dtype), (bias / 2).to(dtype)]


@_made_on_cpu
def attention_inputs(B=2, Q=5, S=70, H=3, D=8, dtype=torch.float32, seed=0) -> list[Tensor]:
    """q [B, Q, H, D] and k and v [B, S, H, D], normal."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, Q, H, D), (B, S, H, D), (B, S, H, D)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


@_made_on_cpu
def upscale_inputs(B=2, h=3, w=5, C=6, Q=None, dtype=torch.float32, seed=0) -> list:
    """x [B, h, w, C], the weights of a transposed convolution, depthwise filters and a norm, so
    that sums are about 1; eps, large enough for maps that are nearly constant; and embeddings [B,
    Q, C] where there is a Q."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    near = C**-0.5
    made = [normal(B, h, w, C), normal(C, C, 2, 2, scale=near), normal(C, scale=0.5)]
    made += [normal(C, 1, 3, 3, scale=0.5), 1 + normal(C, scale=0.2), normal(C, scale=0.2), 1e-3]
    return made if Q is None else [*made, normal(B, Q, C, scale=near)]


@_made_on_cpu
def query_layer_inputs(
    B=2, Q=20, C=32, H=2, F=40, M=24, more=True, dtype=torch.float32, seed=0
) -> list[Tensor]:
    """x and attended [B, Q, C], position [Q, C], normal; the tensors of a layer and of its
    prediction, `more` with the next query's, so that sums are about 1."""
    g = torch.Generator().manual_seed(seed)

    def linear(n, c):
        return [torch.randn(n, c, generator=g) / max(c, 1) ** 0.5, torch.randn(n, generator=g) / 4]

    def norm():
        return [1 + torch.randn(C, generator=g) / 4, torch.randn(C, generator=g) / 4]

    rows = [torch.randn(B, Q, C, generator=g) for _ in range(2)] + [torch.randn(Q, C, generator=g)]
    layer = linear(C, C) + norm() + linear(C, C) + linear(C, C) + linear(C, C) + linear(C, C)
    layer += norm() + linear(F, C) + linear(C, F) + norm()
    prediction = norm() + linear(C, C) + linear(C, C) + linear(M, C) + (linear(C, C) * more)
    return [t.to(dtype) for t in (*rows, *layer, *prediction)]
