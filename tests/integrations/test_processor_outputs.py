"""`Processor`'s results: those of transformers where these are right, and each of their faults."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segkern import Processor, postprocess
from support.processors import KINDS, SIDE

K = 4


def blobs(images, queries, size, seed=0, coarse=5):
    """Outputs of certain queries: smooth masks, most of them with a label."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(images, queries, coarse, coarse, generator=g)
    masks = F.interpolate(4 * noise, size=size, mode="bicubic")
    classes = torch.zeros(images, queries, K + 1)
    labels = torch.randint(0, K + 1, (images, queries), generator=g)
    classes.scatter_(2, labels[..., None], 16.0)  # a score of 1 - 4e-7
    return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def both(kind, **fields):
    return KINDS[kind](**fields), Processor(KINDS[kind].__name__, **fields)


# shape of the mask logits and of the results, at which transformers' faults do not show
SHAPES = {
    "mask2former": ((96, 96), (384, 384), {"size": {"height": 384, "width": 384}}),
    "maskformer": ((40, 56), (160, 224), {"size": {"height": 160, "width": 224}}),
    "oneformer": ((40, 56), (160, 224), {"size": {"height": 160, "width": 224}}),
    "eomt": (
        (32, 32),
        (SIDE, SIDE),
        {"size": {"shortest_edge": SIDE, "longest_edge": SIDE}, "do_pad": True},
    ),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_semantic(kind):
    cells, size, fields = SHAPES[kind]
    reference, processor = both(kind, **fields)
    out, sizes = blobs(2, 6, cells), [size, size]
    out.patch_offsets = []
    # where they resize the scores, and not the masks: at the masks' own size
    if kind in ("maskformer", "oneformer"):
        sizes = None
    want = reference.post_process_semantic_segmentation(
        out, target_sizes=sizes, return_segmentation_scores=True
    )
    have = processor.post_process_semantic_segmentation(
        out, target_sizes=sizes, return_segmentation_scores=True
    )
    plain = processor.post_process_semantic_segmentation(out, target_sizes=sizes)
    for x, y, z in zip(have, want, plain, strict=True):
        torch.testing.assert_close(x.segmentation_scores, y.segmentation_scores)
        top = y.segmentation_scores.topk(2, 0).values
        certain = top[0] - top[1] > 1e-4
        assert torch.equal(x.segmentation[certain], y.segmentation[certain])
        assert certain.float().mean() > 0.9
        assert torch.equal(z, x.segmentation)
        assert x.segmentation.dtype == y.segmentation.dtype == torch.int64


@pytest.mark.parametrize("kind", SHAPES)
def test_panoptic(kind):
    cells, size, fields = SHAPES[kind]
    reference, processor = both(kind, **fields)
    out = blobs(3, 8, cells, seed=1)
    # MaskFormer's and OneFormer's resize probabilities, and not logits: at the masks' own size
    sizes = None if kind in ("maskformer", "oneformer") else 3 * [size]
    options = {"overlap_mask_area_threshold": 0.3, "target_sizes": sizes}
    want = reference.post_process_panoptic_segmentation(
        out, **options, **({} if kind == "eomt" else {"label_ids_to_fuse": set()})
    )
    have = processor.post_process_panoptic_segmentation(out, **options)
    for x, y in zip(have, want, strict=True):
        assert len(y["segments_info"]) >= 2
        assert x["segments_info"] == y["segments_info"]
        # theirs, but EoMT's, give a segment what it wins outside its own mask
        own = x["segmentation"] != (-1 if kind == "eomt" else 0)
        assert torch.equal(x["segmentation"][own], y["segmentation"][own].int())
        assert own.float().mean() > 0.4
        if kind == "eomt":
            assert torch.equal(x["segmentation"], y["segmentation"].int())


@pytest.mark.parametrize("kind", ["mask2former", "maskformer", "eomt"])
def test_instance(kind):
    cells, size, fields = SHAPES[kind]
    if kind == "maskformer":
        size = cells
        fields = {"size": {"height": cells[0], "width": cells[1]}}
    reference, processor = both(kind, **fields)
    out = blobs(3, 6, cells, seed=2)
    options = {"threshold": 0.6, "target_sizes": 3 * [size]}
    if kind == "eomt":
        want = reference.post_process_instance_segmentation(out, **options)
        have = processor.post_process_instance_segmentation(out, **options)
        for x, y in zip(have, want, strict=True):
            assert len(y["segments_info"]) > 2
            assert rows(x) == rows(y)
            assert torch.equal(x["segmentation"] >= 0, y["segmentation"] >= 0)
        return
    want = reference.post_process_instance_segmentation(out, return_binary_maps=True, **options)
    have = processor.post_process_instance_segmentation(out, return_binary_maps=True, **options)
    for x, y in zip(have, want, strict=True):
        assert len(y["segments_info"]) > 2
        order = sorted(
            range(len(y["segments_info"])), key=lambda i: -y["segments_info"][i]["score"]
        )
        assert rows(x) == rows(y)
        assert torch.equal(x["segmentation"].sum((1, 2)), y["segmentation"][order].sum((1, 2)))
        assert x["segmentation"].dtype == y["segmentation"].dtype
    maps = processor.post_process_instance_segmentation(out, **options)
    theirs = reference.post_process_instance_segmentation(out, **options)
    runs = processor.post_process_instance_segmentation(
        out, return_coco_annotation=True, **options
    )
    for x, y, z in zip(maps, theirs, runs, strict=True):
        assert torch.equal(x["segmentation"] == -1, y["segmentation"] == -1)
        assert x["segments_info"][0].keys() == y["segments_info"][0].keys()
        assert [s["id"] for s in x["segments_info"]] == list(range(len(x["segments_info"])))
        decoded = torch.full_like(x["segmentation"], -9).flatten()
        for value, told in zip(x["segmentation"].unique(), z["segmentation"]):
            for first, length in zip(told[::2], told[1::2]):
                decoded[first - 1 : first - 1 + length] = value
        assert torch.equal(decoded.view_as(x["segmentation"]), x["segmentation"])


def rows(result):
    """Labels and scores, best first; scores as theirs are rounded."""
    found = [(s["label_id"], round(s["score"], 4)) for s in result["segments_info"]]
    return sorted(found, key=lambda row: (-row[1], row[0]))


def test_run_lengths_are_theirs():
    from transformers.models.mask2former.image_processing_mask2former import (
        convert_segmentation_to_rle,
    )

    from segkern.integrations.processor_outputs import run_lengths

    ids = torch.randint(-1, 3, (7, 9), generator=torch.Generator().manual_seed(0))
    assert run_lengths(ids) == convert_segmentation_to_rle(ids)


@pytest.mark.parametrize("sizes", [None, [(60, 70), (33, 44)]], ids=["own", "given"])
def test_semantic_of_pixels(sizes):
    reference, processor = both("segformer")
    out = SimpleNamespace(logits=torch.randn(2, K, 16, 20, generator=torch.Generator()))
    for scores in (False, True):
        given = {"target_sizes": sizes, "return_segmentation_scores": scores}
        want = reference.post_process_semantic_segmentation(out, **given)
        have = processor.post_process_semantic_segmentation(out, **given)
        for x, y in zip(have, want, strict=True):
            if scores:
                torch.testing.assert_close(x.segmentation_scores, y.segmentation_scores)
                x, y = x.segmentation, y.segmentation
            assert x.dtype == torch.int64
            assert (x == y).float().mean() > 0.999  # ties of float32


def test_windows():
    """Of EoMT: what images were cut into is put together again."""
    fields = {"size": {"shortest_edge": SIDE}, "do_split_image": True}
    reference, processor = both("eomt", **fields)
    sizes = [(61, 150), (200, 64)]
    images = [np.zeros((*size, 3), np.uint8) for size in sizes]
    offsets = processor(images).patch_offsets
    assert [place.tolist() for place in offsets] == [
        place.tolist() for place in reference(images, return_tensors="pt")["patch_offsets"]
    ]
    out = blobs(len(offsets), 5, (32, 32), seed=3)
    out.patch_offsets = offsets
    given = {"target_sizes": sizes, "return_segmentation_scores": True}
    size = reference.size | {"longest_edge": None}  # which their code asks for
    want = reference.post_process_semantic_segmentation(out, size=size, **given)
    have = processor.post_process_semantic_segmentation(out, **given)
    for x, y in zip(have, want, strict=True):
        torch.testing.assert_close(x.segmentation_scores, y.segmentation_scores, rtol=0, atol=1e-5)


# faults of transformers' results (none of them is ours)


def test_no_detour_by_384():
    """transformers resizes mask logits to 384 x 384 first: a fine stripe is lost."""
    reference, processor = both("mask2former", size={"height": 1024, "width": 1024})
    out = blobs(1, 1, (256, 256))
    out.class_queries_logits[:] = torch.tensor([16.0, 0, 0, 0, 0])
    out.masks_queries_logits[:] = -20
    out.masks_queries_logits[..., ::8] = 20
    given = {"target_sizes": [(1024, 1024)], "return_binary_maps": True}
    want = F.interpolate(out.masks_queries_logits, (1024, 1024), mode="bilinear")[0] > 0
    have = processor.post_process_instance_segmentation(out, **given)[0]["segmentation"]
    assert torch.equal(have.bool(), want)
    theirs = reference.post_process_instance_segmentation(out, **given)[0]["segmentation"]
    assert (theirs.bool() != want).float().mean() > 0.01


def test_padding_is_cut_away():
    """transformers stretches it into the result."""
    sizes = [(64, 128), (128, 64)]
    processor = Processor(size={"shortest_edge": 64, "longest_edge": 128})
    batch = processor([np.zeros((*size, 3), np.uint8) for size in sizes])
    assert batch.pixel_values.shape == (2, 3, 128, 128)
    out = blobs(2, 5, (32, 32), seed=4)
    for task in ("semantic", "instance", "panoptic"):
        run = getattr(processor, f"post_process_{task}_segmentation")
        for have, want in zip(
            run(out, target_sizes=sizes),
            postprocess(
                out.class_queries_logits, out.masks_queries_logits, task, (128, 128), sizes, sizes
            ),
        ):
            have = have if task == "semantic" else have["segmentation"]
            assert have.shape == want.segmentation.shape
            if task == "semantic":
                assert torch.equal(have.int(), want.segmentation)


def test_other_sizes_than_the_images_fill_the_logits():
    processor = Processor(size={"shortest_edge": 64, "longest_edge": 128})
    out = blobs(1, 5, (16, 32), seed=4)
    (have,) = processor.post_process_semantic_segmentation(out, target_sizes=[(300, 300)])
    (want,) = postprocess(
        out.class_queries_logits, out.masks_queries_logits, "semantic",
        (16, 32), [(16, 32)], [(300, 300)],
    )  # fmt: skip
    assert torch.equal(have.int(), want.segmentation)


@pytest.mark.parametrize("kind", ["mask2former", "eomt"])
def test_no_two_segments_have_one_id(kind):
    """transformers' ids after a fused label begin again, and the label is listed twice."""
    fields = SHAPES[kind][2]
    processor = Processor(KINDS[kind].__name__, **fields)
    out = blobs(1, 4, (32, 32))
    out.class_queries_logits[:] = 0
    for query, label in enumerate((0, 1, 0, 2)):
        out.class_queries_logits[0, query, label] = 16
    out.masks_queries_logits[:] = -20
    for query in range(4):
        out.masks_queries_logits[0, query, 8 * query : 8 * query + 8] = 20
    size = fields["size"]
    target = (size.get("height", SIDE), size.get("width", SIDE))
    fuse = {"stuff_classes": [0]} if kind == "eomt" else {"label_ids_to_fuse": {0}}
    (found,) = processor.post_process_panoptic_segmentation(out, target_sizes=[target], **fuse)
    first = 0 if kind == "eomt" else 1
    told = [(s["id"] - first, s["label_id"]) for s in found["segments_info"]]
    assert told == [(0, 0), (1, 1), (2, 2)]
    assert found["segmentation"][:: target[0] // 4, 0].sub(first).tolist() == [0, 1, 0, 2]
    if kind == "mask2former":
        assert [s["was_fused"] for s in found["segments_info"]] == [True, False, False]


def test_a_mask_is_one_from_half_its_own_probability_on():
    """transformers compares mask times score with 0.5: a mask of a score below drops out."""
    reference, processor = both("maskformer", size={"height": 32, "width": 32})
    out = blobs(1, 1, (8, 8))
    out.masks_queries_logits[:] = 0.2  # 0.55
    out.class_queries_logits[:] = torch.tensor([2.0, 0, 0, 0, 0])  # 0.65
    given = {"target_sizes": [(32, 32)]}
    assert reference.post_process_panoptic_segmentation(out, **given)[0]["segments_info"] == []
    (found,) = processor.post_process_panoptic_segmentation(out, **given)
    assert [s["id"] for s in found["segments_info"]] == [1]
    assert (found["segmentation"] == 1).all()


@pytest.mark.parametrize("kind", SHAPES)
def test_maps_are_whole_numbers_whether_anything_was_found(kind):
    cells, size, fields = SHAPES[kind]
    processor, out = Processor(KINDS[kind].__name__, **fields), blobs(1, 4, cells)
    for nothing in (False, True):
        if nothing:
            out.class_queries_logits[:] = torch.tensor([0, 0, 0, 0, 16.0])
        for task in ("instance", "panoptic"):
            run = getattr(processor, f"post_process_{task}_segmentation")
            (found,) = run(out, threshold=0.5, target_sizes=[size])
            assert found["segmentation"].dtype == torch.int32
            assert found["segmentation"].shape == size
            none = 0 if kind == "oneformer" or (task, kind) == ("panoptic", "mask2former") else -1
            if (task, kind) == ("panoptic", "maskformer"):
                none = 0
            if nothing:
                assert (found["segmentation"] == none).all()
                assert found["segments_info"] == []
            else:
                assert found["segmentation"].max() > none


FAULTS = {
    "sizes": (
        lambda p, out: p.post_process_semantic_segmentation(out, target_sizes=[(5, 5)]),
        "target_sizes must be 2 pairs",
    ),
    "threshold": (
        lambda p, out: p.post_process_panoptic_segmentation(out, mask_threshold=0.4),
        "mask_threshold must be 0.5",
    ),
    "returns": (
        lambda p, out: p.post_process_instance_segmentation(
            out, return_coco_annotation=True, return_binary_maps=True
        ),
        "must not both be true",
    ),
    "labels": (
        lambda p, out: p.post_process_panoptic_segmentation(out, label_ids_to_fuse={9}),
        r"Processor: label_ids_to_fuse must be labels in \[0, 4\), got \[9\]",
    ),
    "labels of EoMT": (
        lambda p, out: p.post_process_panoptic_segmentation(out, stuff_classes=[4]),
        "Processor: stuff_classes must be labels",
    ),
    "a single size": (
        lambda p, out: p.post_process_instance_segmentation(out, target_sizes=(5, 6)),
        r"Processor: target_sizes must be 2 pairs .* got \(5, 6\)",
    ),
    "a side of 0": (
        lambda p, out: p.post_process_semantic_segmentation(out, target_sizes=[(0, 4), (5, 6)]),
        "target_sizes must be 2 pairs of positive height and width",
    ),
    "half a pixel": (
        lambda p, out: p.post_process_semantic_segmentation(out, target_sizes=[(5.5, 4)] * 2),
        "target_sizes must be 2 pairs",
    ),
    "words": (
        lambda p, out: p.post_process_semantic_segmentation(out, target_sizes=["5x", "4x"]),
        "target_sizes must be 2 pairs",
    ),
    "outputs of SegFormer": (
        lambda p, out: p.post_process_instance_segmentation(
            SimpleNamespace(logits=torch.zeros(1, 3, 8, 8))
        ),
        "outputs must have class_queries_logits, got a SimpleNamespace without",
    ),
    "a tuple": (
        lambda p, out: p.post_process_panoptic_segmentation((torch.zeros(1, 3, 8, 8),)),
        "outputs must have class_queries_logits, got a tuple without",
    ),
    "no logits": (
        lambda p, out: p.post_process_semantic_segmentation({}),
        "outputs must have logits, got a dict without",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_refused(case):
    run, message = FAULTS[case]
    with pytest.raises(ValueError, match=message):
        run(Processor(), blobs(2, 3, (8, 8)))


def test_eomt_needs_the_sizes():
    with pytest.raises(ValueError, match="target_sizes must be given"):
        Processor("EomtImageProcessor").post_process_panoptic_segmentation(blobs(1, 3, (8, 8)))
