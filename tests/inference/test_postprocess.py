"""Post-processing against the original's rules, pixel by pixel."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from segkern.inference.postprocess import postprocess
from segkern.ops.segment_map import TASKS
from segkern.structures.segmentation import Segment
from segkern.structures.settings import Options

FEW = dict.fromkeys(TASKS, Options()) | {"panoptic": Options(0.1, 0.1)}
BIG = 12.0  # a logit: sigmoid and softmax are as good as 0 or 1


def scene(Q=6, K=4, h=12, w=16, B=2, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    classes = 3 * torch.randn(B, Q, K + 1, generator=g, dtype=dtype)
    coarse = 6 * torch.randn(B, Q, 3, 4, generator=g, dtype=dtype)
    return classes, F.interpolate(coarse, (h, w), mode="bilinear")


def resized(masks, padded, image, output):
    """[Q, h, w] -> [Q, *output]: the two resizes and the crop, all queries at once."""
    up = F.interpolate(masks[None], padded, mode="bilinear")[..., : image[0], : image[1]]
    return F.interpolate(up, output, mode="bilinear")[0]


def plain_panoptic(classes, maps, stuff, keep, overlap):
    """The rules of the paper's code, pixel by pixel. [Q, K + 1], [Q, H, W] -> map, {id: label}."""
    Q, H, W = maps.shape
    probabilities = classes.softmax(-1)
    label = probabilities.argmax(-1).tolist()
    score = probabilities.max(-1).values.tolist()
    kept = [q for q in range(Q) if label[q] != classes.shape[1] - 1 and score[q] > keep]
    inside = (maps.sigmoid() >= 0.5).tolist()
    sigmoid = maps.sigmoid()
    owner = [[None] * W for _ in range(H)]
    for y in range(H):
        for x in range(W):
            values = [score[q] * sigmoid[q, y, x].item() for q in kept]
            if values:
                owner[y][x] = kept[values.index(max(values))]
    out, found, fused = torch.zeros(H, W, dtype=torch.int32), {}, {}
    for q in kept:
        won = [(y, x) for y in range(H) for x in range(W) if owner[y][x] == q]
        own = sum(inside[q][y][x] for y in range(H) for x in range(W))
        both = [(y, x) for y, x in won if inside[q][y][x]]
        if not (won and own and both) or len(won) / own < overlap:
            continue
        if label[q] in stuff and label[q] in fused:
            number = fused[label[q]]
        else:
            number = len(found) + 1
            found[number] = label[q]
            if label[q] in stuff:
                fused[label[q]] = number
        for y, x in both:
            out[y, x] = number
    return out, found


SIZES = {
    "same": ((12, 16), (12, 16), (12, 16)),
    "up": ((24, 32), (24, 32), (31, 50)),
    "padded": ((24, 32), (20, 23), (37, 18)),
    "down": ((48, 64), (41, 64), (9, 14)),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("thresholds", [(0.8, 0.8), (0.4, 0.3), (0.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("stuff", [(), (0, 2)], ids=["things", "stuff"])
def test_panoptic_follows_the_paper(sizes, thresholds, stuff):
    segments = 0
    for seed in range(3):
        classes, masks = scene(seed=seed)
        padded, image, output = sizes
        results = postprocess(
            classes, masks, "panoptic", padded, [image] * 2, [output] * 2, stuff, *thresholds
        )
        for c, m, result in zip(classes, masks, results):
            want, found = plain_panoptic(c, resized(m, *sizes), stuff, *thresholds)
            assert result.segmentation.dtype == torch.int32
            assert torch.equal(result.segmentation, want)
            assert {s.id: s.label_id for s in result.segments} == found
            assert [s.area for s in result.segments] == [int((want == i).sum()) for i in found]
            assert all(s.isthing == (s.label_id not in stuff) for s in result.segments)
            segments += len(found)
    assert segments or thresholds[0] == 0.8 or thresholds[1] == 1.0


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_semantic_follows_the_paper(sizes):
    classes, masks = scene()
    padded, image, output = sizes
    for resize in ("masks", "scores"):
        args = classes, masks, "semantic", padded, [image] * 2, [output] * 2
        results = postprocess(*args, resize=resize, return_scores=True)
        plain = postprocess(*args, resize=resize)
        for c, m, result, fast in zip(classes, masks, results, plain):
            if resize == "masks":
                maps = resized(m, *sizes).sigmoid()
                want = torch.einsum("qk,qhw->khw", c.softmax(-1)[:, :-1], maps)
            else:
                maps = resized(m, padded, image, image).sigmoid()
                want = torch.einsum("qk,qhw->khw", c.softmax(-1)[:, :-1], maps)
                want = F.interpolate(want[None], output, mode="bilinear")[0]
            assert torch.equal(result.segmentation, want.argmax(0).int())
            assert torch.equal(fast.segmentation, result.segmentation)
            assert fast.scores is None
            torch.testing.assert_close(result.scores, want, rtol=1e-12, atol=1e-12)
            assert sum(s.area for s in result.segments) == math.prod(output)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("top_k", [1, 7, 24, 100])
@pytest.mark.parametrize("stuff", [(), (1,)], ids=["all", "things"])
def test_instance_follows_the_paper(sizes, top_k, stuff):
    classes, masks = scene()
    Q, K = 6, 4
    padded, image, output = sizes
    results = postprocess(
        classes, masks, "instance", padded, [image] * 2, [output] * 2, stuff, top_k=top_k
    )
    for c, m, result in zip(classes, masks, results):
        maps = resized(m, *sizes)
        probabilities = c.softmax(-1)[:, :-1]
        pairs = [(probabilities[q, k].item(), q, k) for q in range(Q) for k in range(K)]
        want = []
        for p, q, k in sorted(pairs, reverse=True)[:top_k]:
            mask = maps[q] > 0
            certainty = (maps[q].sigmoid() * mask).sum() / (mask.double().sum() + 1e-6)
            if k not in stuff:
                want.append((p * certainty.item(), k, mask))
        want.sort(key=lambda row: -row[0])
        assert result.labels.tolist() == [k for _, k, _ in want]
        torch.testing.assert_close(
            result.scores,
            torch.tensor([s for s, _, _ in want], dtype=torch.float64),
            rtol=1e-12,
            atol=1e-15,
        )
        assert len(result.masks) == len(want)
        assert all(torch.equal(a, b) for a, (_, _, b) in zip(result.masks, want))
        assert result.masks.dense().shape == (len(want), *output)
        assert result.masks.dense().dtype == torch.bool
        assert [s.area for s in result.segments] == [int(b.sum()) for _, _, b in want]


@pytest.mark.parametrize("task", TASKS)
def test_product_of_embeddings_and_features_in_place_of_logits(task):
    g = torch.Generator().manual_seed(5)
    classes, _ = scene(Q=11)
    embed = torch.randn(2, 11, 6, generator=g, dtype=torch.float64)
    features = torch.randn(2, 6, 12, 16, generator=g, dtype=torch.float64)
    args = (task, (24, 32), [(20, 23), (24, 32)], [(37, 18), (31, 50)], (1,))
    few = {"options": FEW[task]}
    whole = postprocess(classes, torch.einsum("bqc,bchw->bqhw", embed, features), *args, **few)
    parts = postprocess(classes, (embed, features), *args, **few)
    for a, b in zip(whole, parts):
        assert torch.equal(a.segmentation, b.segmentation)
        assert [s[:2] for s in a.segments] == [s[:2] for s in b.segments]


def boxes(labels, rectangles, size=(16, 16), K=4, sure=BIG):
    """Queries that are certain of a label each, with masks that are rectangles y0, x0, y1, x1."""
    classes = torch.full((1, len(labels), K + 1), -BIG)
    masks = torch.full((1, len(labels), *size), -BIG)
    for q, (label, (y0, x0, y1, x1)) in enumerate(zip(labels, rectangles)):
        classes[0, q, label] = sure
        masks[0, q, y0:y1, x0:x1] = BIG
    return classes, masks


def at_size(classes, masks, task="panoptic", size=(16, 16), **options):
    return postprocess(classes, masks, task, size, [size], [size], **options)[0]


# Where transformers departs from the paper's code, and we do not.


def test_fault_384_detour_loses_thin_things():
    """A line two pixels wide in a map of 1024 survives."""
    classes, masks = boxes([1], [(0, 500, 1024, 502)], size=(1024, 1024))
    out = at_size(classes, masks, size=(1024, 1024))
    assert out.segments[0].area == 2 * 1024


def test_fault_padding_stretched_into_the_result():
    """The image is the left half of the input: its thing fills the result's width."""
    classes, masks = boxes([1], [(0, 0, 16, 8)])
    (out,) = postprocess(classes, masks, "panoptic", (16, 16), [(16, 8)], [(32, 16)])
    assert (out.segmentation == 1).all()


def test_fault_segment_ids_collide_after_merged_stuff():
    rectangles = [(0, 0, 4, 16), (4, 0, 8, 16), (8, 0, 12, 16), (12, 0, 16, 16)]
    classes, masks = boxes([0, 1, 0, 2], rectangles)
    out = at_size(classes, masks, stuff=(0,))
    assert [s[:2] for s in out.segments] == [(1, 0), (2, 1), (3, 2)]
    assert out.segmentation[:, 0].tolist() == [1] * 4 + [2] * 4 + [1] * 4 + [3] * 4
    assert out.segments[0].area == 2 * 4 * 16


def test_fault_area_counted_on_scores_instead_of_masks():
    """Mask .6 and score .81: the product is under one half, the mask is not."""
    classes = torch.tensor([[[0.81, 0.05, 0.05, 0.05, 0.04]]]).log()
    masks = torch.full((1, 1, 16, 16), math.log(0.6 / 0.4))
    out = at_size(classes, masks)
    assert out.segments[0].area == 256


def test_fault_segment_reaches_beyond_its_mask():
    """Pixels that a query wins with less than one half stay void."""
    classes, masks = boxes([1], [(0, 0, 16, 10)])
    out = at_size(classes, masks)
    assert out.segments[0].area == 160
    assert (out.segmentation[:, 10:] == 0).all()


def test_fault_empty_result_of_another_kind():
    classes, masks = boxes([4], [(0, 0, 16, 16)])  # "no object"
    out = at_size(classes, masks)
    assert out.segments == []
    assert out.segmentation.dtype == torch.int32
    assert (out.segmentation == 0).all()
    assert out.to_json() == {"task": "panoptic", "size": [16, 16], "segments": []}


def test_fault_instances_overwrite_each_other():
    """Overlapping instances keep their masks; the map shows the better one."""
    classes, masks = boxes([1, 2], [(0, 0, 16, 10), (0, 6, 16, 16)])
    classes[0, 1, 2] = -BIG + 2
    out = at_size(classes, masks, "instance", top_k=2)
    assert out.labels.tolist() == [1, 2]
    assert out.masks.dense().sum((1, 2)).tolist() == [160, 160]
    assert out.segmentation[0].tolist() == [1] * 10 + [2] * 6


def test_fault_instance_masks_thresholded_before_they_are_resized():
    """A slanted edge is smooth at the output's size: thresholded first, it would be in steps."""
    slope = torch.arange(8.0)[None, :] - torch.arange(8.0)[:, None] / 2 - 2.25
    classes, _ = boxes([1], [(0, 0, 1, 1)])
    (out,) = postprocess(classes, slope[None, None], "instance", (64, 64), [(64, 64)], [(64, 64)])
    firsts = out.masks[0][8:56].int().argmax(1)
    assert set(firsts.diff().tolist()) <= {0, 1}
    assert firsts.unique().numel() > 20


def test_panoptic_share_counts_every_pixel_won():
    """Void pixels won help a query pass the overlap test, as in the paper."""
    classes, masks = boxes([1, 2], [(0, 0, 16, 8), (0, 0, 16, 6)])
    masks[0, 0, :, :6] = (
        1.0  # query 0 loses six of its eight columns, and wins the eight void ones
    )
    out = at_size(classes, masks, overlap_threshold=0.8)
    assert [s.label_id for s in out.segments] == [1, 2]
    assert out.segments[0].area == 2 * 16


def test_logit_zero_is_inside_for_panoptic_and_outside_for_instance():
    classes, masks = boxes([1], [(0, 0, 16, 16)])
    assert at_size(classes, 0 * masks).segments[0].area == 256
    assert at_size(classes, 0 * masks, "instance", top_k=1).segments[0].area == 0


def test_of_equal_queries_the_first_wins():
    classes, masks = boxes([3, 1, 2], [(0, 0, 16, 16)] * 3)
    assert [s.label_id for s in at_size(classes, masks).segments] == [3]


def test_void_image_and_no_thing():
    classes, masks = boxes([0], [(0, 0, 16, 16)])
    out = at_size(classes, masks, "instance", stuff=(0, 1, 2, 3))
    assert len(out.masks) == 0
    assert out.masks.dense().shape == (0, 16, 16)
    assert out.segments == []
    assert (out.segmentation == 0).all()


def test_half_precision_is_computed_in_float32():
    classes, masks = scene(dtype=torch.float32)
    classes, masks = classes.bfloat16(), masks.bfloat16()
    args = ("instance", (24, 32), [(24, 32)] * 2, [(24, 32)] * 2)
    a, b = postprocess(classes, masks, *args), postprocess(classes.float(), masks.float(), *args)
    assert a[0].scores.dtype == torch.float32
    assert torch.equal(a[0].scores, b[0].scores)


SIZE = ((16, 16), [(16, 16)], [(16, 16)])
BAD = {
    "task": (
        ("cubist", *SIZE),
        {},
        "task must be one of panoptic, instance, semantic, got 'cubist'",
    ),
    "threshold": (
        ("panoptic", *SIZE),
        {"threshold": 1.5},
        r"threshold must be in \[0, 1\], got 1.5",
    ),
    "overlap": (
        ("panoptic", *SIZE),
        {"overlap_threshold": -0.1},
        r"overlap_threshold must be in \[0, 1\], got -0.1",
    ),
    "nan threshold": (
        ("panoptic", *SIZE),
        {"overlap_threshold": math.nan},
        r"overlap_threshold must be in \[0, 1\], got nan",
    ),
    "top_k": (("instance", *SIZE), {"top_k": 0}, "top_k must be at least 1, got 0"),
    "resize": (("panoptic", *SIZE), {"resize": "large"}, 'resize must be "masks" or "scores"'),
    "stuff": (
        ("panoptic", *SIZE),
        {"stuff": (4,)},
        r"stuff must be labels in \[0, 4\), got \[4\]",
    ),
    "image_sizes": (
        ("panoptic", (16, 16), [], [(16, 16)]),
        {},
        "image_sizes must be 1 pairs of positive",
    ),
    "output_sizes": (
        ("panoptic", (16, 16), [(16, 16)], [(0, 3)]),
        {},
        "output_sizes must be 1 pairs of positive",
    ),
    "padded": (
        ("panoptic", (16, 16), [(16, 17)], [(16, 16)]),
        {},
        r"image_sizes must fit into padded_size \(16, 16\)",
    ),
}


@pytest.mark.parametrize(("args", "options", "message"), BAD.values(), ids=BAD.keys())
def test_postprocess_names_what_is_wrong(args, options, message):
    with pytest.raises(ValueError, match=message):
        postprocess(*boxes([1], [(0, 0, 4, 4)]), *args, **options)


def test_postprocess_names_wrong_logits():
    classes, masks = boxes([1], [(0, 0, 4, 4)])
    with pytest.raises(ValueError, match=r"mask_logits must be \[B, Q, h, w\] float"):
        postprocess(classes, masks[0], "panoptic", *SIZE)
    with pytest.raises(ValueError, match=r"mask_logits must be .* with B = 1, Q = 1"):
        postprocess(classes, masks.repeat(1, 2, 1, 1), "panoptic", *SIZE)
    with pytest.raises(TypeError, match=r"class_logits must be .* float, got .* int64"):
        postprocess(classes.long(), masks, "panoptic", *SIZE)
    with pytest.raises(ValueError, match="class_logits must be finite"):
        postprocess(classes * math.nan, masks, "panoptic", *SIZE)


# JSON


def test_json_round_trip():
    from pycocotools import mask as coco

    classes, masks = scene(dtype=torch.float32)
    for task in TASKS:
        (out, _) = postprocess(
            classes,
            masks,
            task,
            (24, 32),
            [(20, 23)] * 2,
            [(37, 18)] * 2,
            (1,),
            options=FEW[task],
        )
        out.names = {0: "zero", 3: "three"}
        read = json.loads(json.dumps(out.to_json()))
        assert read["size"] == [37, 18]
        assert len(read["segments"]) == len(out.segments) > 0
        for i, (row, s) in enumerate(zip(read["segments"], out.segments)):
            assert isinstance(row["segmentation"]["counts"], str)
            decoded = torch.from_numpy(coco.decode(row["segmentation"])).bool()
            assert torch.equal(decoded, out.mask(i))
            assert row["area"] == int(decoded.sum()) == s.area
            assert row["label"] == {0: "zero", 3: "three"}.get(s.label_id, str(s.label_id))
            assert row["bbox"] == coco.toBbox(row["segmentation"]).tolist()


def test_above_keeps_the_better_instances():
    classes, masks = scene()
    out = postprocess(classes, masks, "instance", (12, 16), [(12, 16)] * 2, [(12, 16)] * 2)[0]
    cut = out.scores[5].item()
    few = out.above(cut)
    assert len(few.masks) == len(few.segments) == 6
    assert few.segmentation.max() <= 6
    assert all(torch.equal(a, b) for a, b in zip(few.masks, out.masks))
    assert out.above(0.0).segments == out.segments
    assert isinstance(few.segments[0], Segment)
