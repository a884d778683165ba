"""segment_map: the kernels against the formula (the original's rules: test_postprocess.py)."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F

from segkern.ops import segment_map
from segkern.ops.mask_bits import unpack_bits
from segkern.ops.segment_map import TASKS, segment_map_reference
from support.comparison import COARSE, DTYPES, assert_within, moved, promote
from support.inputs import segment_map_inputs

INF, NAN = float("inf"), float("nan")
# inputs; padded, image and output size
CASES = {
    "padded, enlarged": ({}, ((64, 96), (60, 83), (131, 201))),
    "as large as the padded input": ({}, ((64, 96),) * 3),
    "shrunk": ({}, ((64, 96), (61, 96), (40, 50))),
    "shrunk far below the logits": ({"h": 70, "w": 90}, ((280, 360), (280, 350), (9, 17))),
    "smaller than the logits at once": ({"h": 40, "w": 50}, ((20, 30), (20, 30), (7, 9))),
    "one axis grows, one shrinks": ({}, ((64, 96), (64, 96), (200, 31))),
    "one pixel of logits": ({"h": 1, "w": 1}, ((4, 4), (3, 4), (5, 70))),
    "one pixel of output": ({}, ((64, 96), (50, 60), (1, 1))),
    "one query, one class": ({"Q": 1, "K": 1}, ((64, 96), (64, 96), (33, 65))),
    "many": ({"B": 1, "Q": 100, "K": 133, "kind": "shapes"}, ((64, 96), (64, 90), (70, 111))),
    "shapes": ({"h": 40, "w": 60, "kind": "shapes"}, ((160, 240), (150, 240), (230, 257))),
}
OPTIONS = {
    "panoptic": ("panoptic", {"threshold": 0.2, "overlap_threshold": 0.3}),
    "instance": ("instance", {"top_k": 20}),
    "semantic": ("semantic", {}),
    "semantic, scores": ("semantic", {"return_scores": True}),
    "semantic, resized scores": ("semantic", {"resize": "scores"}),
    "semantic, resized scores, scores": ("semantic", {"resize": "scores", "return_scores": True}),
}
EASY = CASES["padded, enlarged"][1]
# types other than float32 where a trial does not take seconds, as all do in Triton's interpreter
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LONG = CASES if INTERPRETED else ("many", "shapes", "shrunk far below the logits")
TRIALS = [
    (case, option, dtype)
    for case, option, dtype in itertools.product(CASES, OPTIONS, DTYPES)
    if case not in LONG or dtype == torch.float32 or CASES[case][1] == EASY
]


def stuff_of(K):
    return torch.arange(K) % 3 == 1


def run(function, inputs, task, sizes, **options):
    classes, masks, *features = inputs
    stuff = stuff_of(classes.shape[2] - 1)
    found = function(classes, masks, task, *sizes, *features, stuff=stuff, **options)
    return {name: t for name, t in zip(found._fields, found) if t is not None}


def flips(a, b):
    """How many pixels of the maps differ."""
    return int((a["map"] != b["map"]).sum())


def check(inputs, task, sizes, **options):
    """The kernel's maps, rows and scores against the reference's in float64.

    A pixel may have another value only where one of the reference's runs under random rounding
    gives it another: within rounding of a tie or a threshold. Rows are compared where none did.
    """
    dtype, promoted = inputs[1].dtype, promote(inputs)
    double = dtype == torch.float64
    coarse = COARSE if double else 1.0

    def reference(values=promoted):
        return run(segment_map_reference, values, task, sizes, **options)

    found = run(segment_map, inputs, task, sizes, **options)
    eager, exact = reference(inputs), reference()
    assert found.keys() == exact.keys()
    for name, t in exact.items():
        assert found[name].shape == t.shape, name
        assert found[name].dtype == eager[name].dtype, name
    away = {k: torch.zeros_like(exact[k]) for k in ("scores", "class_scores") if k in exact}
    undecided = torch.zeros_like(exact["map"], dtype=torch.bool)
    for other in moved(reference, dtype if double else torch.float32, coarse=coarse):
        undecided |= other["map"] != exact["map"]
        for name, most in away.items():
            torch.maximum(most, (other[name] - exact[name]).abs() / coarse, out=most)
    differ = found["map"] != exact["map"]
    assert not (differ & ~undecided).any(), "a pixel is another"
    n = int(differ.sum())
    if n == 0 and all(torch.equal(found[k], exact[k]) for k in ("ids", "labels", "areas")):
        for name in ("bits", "slots"):
            assert name not in exact or torch.equal(found[name], exact[name]), name
        if "scores" in exact:
            assert_within(found["scores"], exact["scores"], away["scores"], "scores")
    else:
        assert not double
        assert (found["areas"] - exact["areas"]).abs().sum() <= 2 * n + 4
    if "class_scores" in exact:
        assert_within(
            found["class_scores"], exact["class_scores"], away["class_scores"], "classes"
        )
    return found


@pytest.mark.parametrize(("case", "option", "dtype"), TRIALS, ids=str)
def test_forward(case, option, dtype):
    sizes, geometry = CASES[case]
    task, options = OPTIONS[option]
    check(segment_map_inputs(**sizes, dtype=dtype), task, geometry, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_embeddings_and_features(option, dtype):
    g = torch.Generator().manual_seed(1)
    classes, _ = segment_map_inputs(dtype=dtype)
    embed = torch.randn(2, 13, 9, generator=g).to(dtype)
    features = torch.randn(2, 9, 16, 24, generator=g).to(dtype)
    task, options = OPTIONS[option]
    found = check([classes, embed, features], task, EASY, **options)
    masks = torch.einsum("bqc,bchw->bqhw", embed.double(), features.double())
    assert flips(found, run(segment_map, [classes.double(), masks], task, EASY, **options)) <= 2


def test_larger_maps_flip_a_pixel_in_a_hundred_thousand_at_most():
    """Counted over about three million pixels; one in ten million lies within a rounding."""
    sizes = ((256, 512), (250, 500), (600, 900))
    inputs = segment_map_inputs(B=1, Q=30, K=20, h=64, w=128)
    for option in ("panoptic", "instance", "semantic", "semantic, resized scores"):
        task, options = OPTIONS[option]
        found = run(segment_map, inputs, task, sizes, **options)
        exact = run(segment_map_reference, promote(inputs), task, sizes, **options)
        assert flips(found, exact) <= 1e-5 * found["map"].numel()
        if task == "instance":
            words = found["bits"] ^ exact["bits"]
            assert unpack_bits(words, 900).sum() <= 1e-5 * 20 * 600 * 900


def test_masks_in_bits_are_those_of_the_rows():
    inputs = segment_map_inputs()
    found = segment_map(*inputs, "instance", *EASY, top_k=30, stuff=stuff_of(7))
    masks = unpack_bits(found.bits, EASY[2][1])
    for b in range(2):
        rows = [r for r in range(30) if found.ids[b, r] > 0]
        assert rows == list(range(len(rows)))
        assert 0 < len(rows) < 30
        assert found.ids[b, rows].tolist() == [r + 1 for r in rows]
        for r in rows:
            assert masks[b, found.slots[b, r]].sum() == found.areas[b, r]
        covered = torch.zeros(EASY[2], dtype=torch.int32)
        for r in reversed(rows):
            covered[masks[b, found.slots[b, r]]] = r + 1
        assert torch.equal(covered, found.map[b])
        assert (found.scores[b, : len(rows)].diff() <= 0).all()
        assert (found.slots[b, len(rows) :] == -1).all()
        assert (found.areas[b, len(rows) :] == 0).all()


def test_areas_are_those_of_the_map():
    inputs = segment_map_inputs()
    found = segment_map(*inputs, "panoptic", *EASY, None, stuff_of(7), 0.2, 0.2)
    for b in range(2):
        for i in range(1, int(found.ids[b].max()) + 1):
            rows = found.ids[b] == i
            assert (found.map[b] == i).sum() == found.areas[b, rows].sum() > 0
            assert len(set(found.labels[b, rows].tolist())) == 1
    found = segment_map(*inputs, "semantic", *EASY)
    for b in range(2):
        assert torch.equal(found.areas[b], found.map[b].flatten().long().bincount(minlength=7))


# what is left out must not change the result


def flat_masks(values, h=16, w=24):
    """Mask logits that are constant over the map, one value a query."""
    return torch.tensor(values)[None, :, None, None].expand(1, -1, h, w).contiguous()


def probabilities_to_logits(p):
    """class logits [1, Q, K+1] whose softmax is [p, the rest]."""
    p = torch.tensor(p)
    return torch.cat((p, 1 - p.sum(-1, keepdim=True)), -1).log()[None]


def test_queries_that_add_little_still_decide():
    """Two classes level but for a hundred queries that add a hundred thousandth each to one."""
    p = [[0.4, 0.4, 0.1], [0.4, 0.4, 0.1]] + 100 * [[1e-7, 1e-5, 1e-7]]
    masks = flat_masks([3.0, 2.0] + 100 * [0.0])
    found = segment_map(probabilities_to_logits(p), masks, "semantic", *EASY)
    assert (found.map == 1).all()
    # and on one side of the map only
    masks[:, 2:, :, :12] = -60.0
    for impl in ("kernel", "reference"):
        found = segment_map(probabilities_to_logits(p), masks, "semantic", *EASY, impl=impl)
        assert (found.map[..., 120:] == 1).all()
        assert (found.map[..., :80] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_equal_classes_the_first(dtype):
    classes, masks = segment_map_inputs(K=6, dtype=dtype)
    classes[..., 1] += 3  # it wins somewhere, whatever was drawn
    classes[..., 3] = classes[..., 5] = classes[..., 1]
    found = segment_map(classes, masks, "semantic", *EASY)
    assert (found.map == 1).any()
    assert not ((found.map == 3) | (found.map == 5)).any()


def test_of_equal_queries_the_first():
    classes, masks = segment_map_inputs(Q=12)
    classes[:, 6:], masks[:, 6:] = classes[:, :6], masks[:, :6]
    found = segment_map(classes, masks, "panoptic", *EASY, None, None, 0.1, 0.0)
    assert (found.areas[:, :6] > 0).any()
    assert (found.areas[:, 6:] == 0).all()


@pytest.mark.parametrize("hidden", ["whole", "stripes"])
def test_own_area_counts_where_a_query_cannot_win(hidden):
    """Query 1 wins the left quarter; its mask goes on under query 0, so its share is too small."""
    classes = probabilities_to_logits([[0.95, 0.02], [0.02, 0.85]])
    masks = flat_masks([9.0, 5.0], 16, 64)
    masks[:, 0, :, :16] = -9.0
    if hidden == "stripes":
        masks[:, 1, :, 16::4] = -5.0
    sizes = ((64, 256),) * 3
    kept = segment_map(classes, masks, "panoptic", *sizes, overlap_threshold=0.2)
    assert kept.ids.tolist() == [[1, 2]]
    lost = segment_map(classes, masks, "panoptic", *sizes, overlap_threshold=0.45)
    assert lost.ids.tolist() == [[1, -1]]
    assert (lost.map[..., :60] == 0).all()
    check([classes.double(), masks.double()], "panoptic", sizes, overlap_threshold=0.45)


@pytest.mark.parametrize("task", TASKS)
def test_blocks_that_are_decided_at_once(task):
    """Constant logits, edges at a block's border, and a line one pixel wide."""
    classes, _ = segment_map_inputs(B=1, Q=4, kind="shapes", dtype=torch.float64)
    masks = torch.full((1, 4, 32, 64), -9.0, dtype=torch.float64)
    masks[:, 0], masks[:, 1, 8:], masks[:, 2, :, 31] = 2.0, 9.0, 9.0
    for out in ((128, 256), (32, 64)):
        check([classes, masks], task, ((128, 256), (128, 256), out))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
@pytest.mark.parametrize("task", TASKS)
def test_faint_and_confident_logits(task, scale):
    classes, masks = segment_map_inputs(dtype=torch.float64)
    check([classes, masks * scale], task, EASY)
    check([classes.float(), masks.float() * scale], task, EASY)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_nan_is_outside_and_infinity_far(task, impl):
    classes, masks = segment_map_inputs(kind="shapes")
    want = masks.clone()
    masks[0, 1, 3:7] = NAN
    want[0, 1, 3:7] = -1e30
    masks[0, 2, :, 5:9], want[0, 2, :, 5:9] = INF, 1e30
    masks[1, 3], want[1, 3] = -INF, -1e30
    a = run(segment_map, [classes, masks], task, EASY, impl=impl)
    b = run(segment_map, [classes, want], task, EASY, impl=impl)
    for name, t in b.items():
        assert torch.equal(a[name], t), name
    c = run(segment_map_reference, [classes, masks], task, EASY)
    assert flips(a, c) <= 2


@pytest.mark.parametrize("task", TASKS)
def test_empty(task):
    classes, masks = segment_map_inputs()
    for c, m in ((classes[:0], masks[:0]), (classes[:, :0], masks[:, :0])):
        found, want = (run(f, [c, m], task, EASY) for f in (segment_map, segment_map_reference))
        assert found.keys() == want.keys()
        for name, t in want.items():
            assert torch.equal(found[name], t), name
        assert (found["map"] == 0).all()


def test_no_query_kept_and_no_thing():
    classes, masks = segment_map_inputs()
    found = segment_map(classes, masks, "panoptic", *EASY, threshold=1.0)
    assert (found.map == 0).all()
    assert (found.ids == -1).all()
    found = segment_map(classes, masks, "instance", *EASY, stuff=torch.ones(7, dtype=torch.bool))
    assert (found.map == 0).all()
    assert (found.ids == -1).all()
    assert (found.bits == 0).all()


@pytest.mark.parametrize("task", TASKS)
def test_strides_do_not_matter(task):
    inputs = segment_map_inputs()
    want = run(segment_map, inputs, task, EASY)
    last = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    larger = [F.pad(t, (0, 5)).narrow(-1, 0, t.shape[-1]) for t in inputs]
    for strided in (last, larger):
        assert not any(t.is_contiguous() for t in strided)
        found = run(segment_map, strided, task, EASY)
        for name, t in want.items():
            assert torch.equal(found[name], t), name


@pytest.mark.cpu_only
@pytest.mark.parametrize("task", TASKS)
def test_the_number_of_threads_does_not_matter(task):
    inputs = segment_map_inputs(Q=30)
    two = run(segment_map, inputs, task, EASY)
    torch.set_num_threads(1)
    one = run(segment_map, inputs, task, EASY)
    for name, t in two.items():
        assert torch.equal(one[name], t), name


@pytest.mark.parametrize("task", TASKS)
def test_no_gradient_and_no_autocast(task):
    inputs = segment_map_inputs()
    want = run(segment_map, inputs, task, EASY)
    inputs = [t.requires_grad_() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        for impl in ("kernel", "reference"):
            found = run(segment_map, inputs, task, EASY, impl=impl)
            assert not any(t.requires_grad for t in found.values())
            assert flips(found, want) <= 2
            assert "scores" not in want or found["scores"].dtype == torch.float32


def test_opcheck():
    classes, masks = segment_map_inputs()
    ops, sizes = torch.ops.segkern, [64, 96, 60, 83, 131, 201]
    scores, labels = classes.softmax(-1)[..., :-1].max(-1)
    torch.library.opcheck(ops.segment_map, (scores, labels, stuff_of(7), masks, None, sizes, 0.5))
    embed, features = torch.randn(2, 13, 8), torch.randn(2, 8, 16, 24)
    torch.library.opcheck(ops.segment_map, (scores, labels, None, embed, features, sizes, 0.5))
    weights = classes.softmax(-1)[..., :-1]
    for flags in ((False, False), (True, True)):
        torch.library.opcheck(ops.segment_map_semantic, (weights, masks, None, sizes, *flags))
    queries = torch.tensor([[3, 0, -1], [1, 12, 2]])
    torch.library.opcheck(ops.segment_map_instance, (queries, masks.bfloat16(), None, sizes))
    bits, _, _ = ops.segment_map_instance(queries, masks, None, sizes)
    torch.library.opcheck(ops.segment_map_cover, (bits, torch.tensor([[1, 0], [-1, 2]]), 201))


@pytest.mark.parametrize("task", TASKS)
def test_compile(task):
    inputs = segment_map_inputs()
    compiled = torch.compile(segment_map, fullgraph=True, backend="aot_eager")
    want = run(segment_map, inputs, task, EASY)
    for name, t in run(compiled, inputs, task, EASY).items():
        assert torch.equal(t, want[name]), name


def test_bad_places_are_not_read():
    """Labels, queries and slots out of range, as a raw call may bring them."""
    classes, masks = segment_map_inputs()
    ops, sizes = torch.ops.segkern, [64, 96, 60, 83, 131, 201]
    labels = torch.tensor([[2**40], [-5]]).expand(2, 13)
    ops.segment_map(classes[..., 0].exp(), labels, stuff_of(7), masks, None, sizes, 0.0)
    bits, areas, _ = ops.segment_map_instance(torch.tensor([[13], [-2]]), masks, None, sizes)
    assert (bits == 0).all()
    assert (areas == 0).all()
    assert (ops.segment_map_cover(bits - 1, torch.tensor([[1], [-7]]), 201) == 0).all()
    scores = torch.tensor([[INF, NAN] + 11 * [1e38]]).expand(2, 13)
    ops.segment_map(scores, labels, None, masks, None, sizes, 0.0)
    with pytest.raises(RuntimeError, match="the image within the padded input"):
        ops.segment_map_instance(torch.tensor([[1], [2]]), masks, None, [9, 9, 10, 9, 5, 5])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_class_logits_that_are_not_finite_do_no_harm(task, value):
    """postprocess refuses them; here the maps hold some label, and the other image is right."""
    classes, masks = segment_map_inputs()
    want = run(segment_map, [classes, masks], task, EASY)
    classes[0] = value
    found = run(segment_map, [classes, masks], task, EASY)
    assert found["map"].min() >= 0
    assert found["map"].max() <= 7 * 13
    assert torch.equal(found["map"][1], want["map"][1])


def replaced(place, change):
    return lambda i: [change(t) if k == place else t for k, t in enumerate(i)]


BAD = {
    "class logits 2-d": (
        replaced(0, lambda t: t[0]),
        {},
        ValueError,
        r"class_logits must be \[B, Q, K\+1\] float",
    ),
    "class logits int": (replaced(0, lambda t: t.long()), {}, TypeError, "float, got .* int64"),
    "no class": (replaced(0, lambda t: t[..., :1]), {}, ValueError, "must have K >= 1"),
    "masks of other queries": (
        replaced(1, lambda t: t[:, 1:]),
        {},
        ValueError,
        "with B = 2, Q = ",
    ),
    "masks of no row": (replaced(1, lambda t: t[:, :, :0]), {}, ValueError, "must have h, w >= 1"),
    "masks elsewhere": (replaced(1, lambda t: t.to("meta")), {}, ValueError, "on cpu, got meta"),
    "features without embeddings": (
        lambda i: i,
        {"features": torch.randn(2, 8, 16, 24)},
        ValueError,
        r"masks must be \[B, Q, C\] float",
    ),
    "features of other channels": (
        replaced(1, lambda t: t[..., 0]),
        {"features": torch.randn(2, 8, 16, 24)},
        ValueError,
        "features must be .* with B = 2, C = 16, got",
    ),
    "stuff int": (lambda i: i, {"stuff": torch.zeros(7)}, TypeError, r"stuff must be \[K\] bool"),
    "stuff of other classes": (
        lambda i: i,
        {"stuff": torch.zeros(8, dtype=torch.bool)},
        ValueError,
        "stuff must be .* with K = 7, got",
    ),
    "output of no row": (lambda i: i, {"output_size": (0, 9)}, ValueError, "output_size must be"),
    "image beyond the padding": (
        lambda i: i,
        {"image_size": (65, 9)},
        ValueError,
        r"image_size must fit into padded_size \(64, 96\), got \(65, 9\)",
    ),
    "task": (lambda i: i, {"task": "x"}, ValueError, "task must be one of panoptic, instance"),
    "resize": (lambda i: i, {"resize": "scores"}, ValueError, "resize must be"),
    "top_k": (lambda i: i, {"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    "scores": (lambda i: i, {"return_scores": True}, ValueError, "it is for semantic, got True"),
    "impl": (lambda i: i, {"impl": "fast"}, ValueError, "impl must be 'kernel' or 'reference'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, options, error, message = BAD[case]
    names = ("padded_size", "image_size", "output_size")
    arguments = {"task": "panoptic"} | dict(zip(names, EASY)) | options
    with pytest.raises(error, match=message):
        segment_map(*change(segment_map_inputs()), **arguments)
