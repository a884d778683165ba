"""Mask2Former as its users meet it: presets, training and prediction, bad input, compilation."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from segkern.models import Mask2Former, Mask2FormerConfig
from segkern.nn.position import pixel_centres, sine_position
from segkern.structures.outputs import Product
from segkern.structures.targets import Targets
from support.inputs import random_targets

LABELS = 7

with torch.device("meta"):
    torch.empty(0)  # torch keeps a list of its constructors, before conftest replaces this one


@pytest.fixture
def tiny():
    return Mask2Former(Mask2FormerConfig.tiny(LABELS))


def images(B, H, W):
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(2))


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


# --- configurations -------------------------------------------------------------------------

PRESETS = [  # backbone, task, dataset, labels, queries, millions of weights in the paper's tables
    ("resnet50", "panoptic", None, 133, 100, 44),
    ("resnet101", "instance", "coco", 80, 100, 63),
    ("swin_tiny", "panoptic", None, 133, 100, 47.4),
    ("swin_small", "semantic", None, 150, 100, 68.8),
    ("swin_base", "semantic", "cityscapes", 19, 100, 107),
    ("swin_base_in21k", "instance", "cityscapes", 8, 100, 107),
    ("swin_large", "panoptic", "ade20k", 150, 200, 215.5),
]


@pytest.mark.parametrize(
    ("backbone", "task", "dataset", "labels", "queries", "millions"),
    PRESETS,
    ids=[f"{p[0]} {p[1]}" for p in PRESETS],
)
def test_presets(backbone, task, dataset, labels, queries, millions):
    config = Mask2FormerConfig.preset(backbone, task=task, dataset=dataset)
    assert (config.num_labels, config.num_queries) == (labels, queries)
    with torch.device("meta"):
        model = Mask2Former(config)
    assert model.query_decoder.class_embed.out_features == labels + 1
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_initial_sampling_offsets_point_in_the_heads_directions():
    layer = Mask2Former(Mask2FormerConfig.tiny(3)).pixel_decoder.layers[0].attn
    bias = layer.sampling_offsets.bias.view(8, 3, 4, 2)
    assert torch.allclose(bias[0, 1], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]), atol=1e-6)
    assert torch.allclose(bias[3, 2, 1], torch.tensor([-2.0, 2.0]), atol=1e-6)
    assert not layer.sampling_offsets.weight.any()


# --- behaviour ------------------------------------------------------------------------------


def test_training_builds_no_mask_logits_of_all_queries(tiny):
    x, (masks, labels) = (
        images(
            2,
            64,
            96,
        ),
        random_targets((2, 1), LABELS, 64, 96),
    )
    out = tiny.train()(x, mask_labels=masks, class_labels=labels)
    assert isinstance(vars(out)["masks_queries_logits"], Product)
    assert out.auxiliary_logits is None
    assert out.class_queries_logits.shape == (2, 8, LABELS + 1)
    asked = tiny(x, mask_labels=masks, class_labels=labels, output_auxiliary_logits=True)
    assert asked.masks_queries_logits.shape == (2, 8, 32, 48)
    assert [o["masks_queries_logits"].shape for o in asked.auxiliary_logits] == [
        (2, 8, 32, 48)
    ] * 3
    assert tiny.eval()(x, mask_labels=masks, class_labels=labels).masks_queries_logits is not None
    assert tiny(x).loss is None


def test_every_weight_gets_a_gradient(tiny):
    targets = Targets.from_lists(*random_targets((2, 0), LABELS, 64, 64), num_labels=LABELS)
    total, losses = tiny.train().loss(images(2, 64, 64), targets)
    total.backward()
    assert total.isfinite()
    assert [v.shape for v in losses.values()] == [(4,)] * 3
    assert [
        n for n, p in tiny.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []


def test_each_training_loss_draws_new_points(tiny):
    targets = Targets.from_lists(*random_targets((2, 1), LABELS, 64, 64), num_labels=LABELS)
    x = images(2, 64, 64)
    tiny.eval()
    assert torch.equal(tiny.loss(x, targets)[0], tiny.loss(x, targets)[0])
    tiny.criterion.train()
    assert not torch.equal(tiny.loss(x, targets)[0], tiny.loss(x, targets)[0])


def test_an_image_does_not_depend_on_its_batch(tiny):
    tiny.double().eval()
    x = images(3, 64, 64).double()
    together = tiny(x).masks_queries_logits
    assert error(together[1:2], tiny(x[1:2]).masks_queries_logits) < 1e-10


def test_constants_kept_in_inference_mode_serve_training_later(tiny):
    x, targets = (
        images(
            1,
            48,
            80,
        ),
        random_targets((1,), LABELS, 48, 80),
    )
    with torch.inference_mode():
        tiny.eval()(x)
    tiny.train()(x, mask_labels=targets[0], class_labels=targets[1]).loss.backward()
    assert sine_position(((3, 5),), 64, x.device, x.dtype) is sine_position(
        ((3, 5),), 64, x.device, x.dtype
    )


def test_reference_points_are_pixel_centres():
    points = pixel_centres(((1, 2), (2, 1)), torch.device("cpu"), torch.float64)
    assert points.tolist() == [[[[0.25, 0.5]], [[0.75, 0.5]], [[0.5, 0.25]], [[0.5, 0.75]]]]


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_stays_near_float32(tiny, how):
    tiny.eval()
    x, (masks, labels) = (
        images(
            2,
            64,
            64,
        ),
        random_targets((2, 3), LABELS, 64, 64),
    )
    want = tiny(x, mask_labels=masks, class_labels=labels)
    if how == "weights":
        tiny.bfloat16()
        have = tiny(x.bfloat16(), mask_labels=masks, class_labels=labels)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            have = tiny(x, mask_labels=masks, class_labels=labels)
    have.loss.backward()
    assert have.loss.item() == pytest.approx(want.loss.item(), rel=0.05)
    assert have.masks_queries_logits.isfinite().all()


def test_nan_pixels_do_not_stop_a_prediction(tiny):
    x = images(1, 64, 64)
    x[0, 0, 5, 5] = float("nan")
    assert tiny.eval()(x).masks_queries_logits.shape == (1, 8, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)]
)
def test_compiles_without_graph_breaks(tiny, backend):
    torch._dynamo.reset()
    x = images(2, 64, 64)
    targets = Targets.from_lists(*random_targets((2, 3), LABELS, 64, 64), num_labels=LABELS)
    with torch.no_grad():
        want = tiny.eval()(x)
        have = torch.compile(tiny, fullgraph=True, backend=backend)(x)
    assert error(want.masks_queries_logits, have.masks_queries_logits) < 1e-3
    want = tiny.loss(x, targets)[0]
    have = torch.compile(tiny.loss, fullgraph=True, backend=backend)(x, targets)[0]
    have.backward()
    assert have.item() == pytest.approx(want.item(), rel=1e-3)
    assert all(p.grad is not None for p in tiny.parameters())


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient():
    tiny = Mask2Former(replace(Mask2FormerConfig.tiny(LABELS), encoder_layers=6))
    x = images(2, 64, 64)
    targets = Targets.from_lists(*random_targets((2, 3), LABELS, 64, 64), num_labels=LABELS)
    tiny.train()
    found, kept = [], {}
    for enable in (False, True):
        tiny.gradient_checkpointing_enable(enable)
        tiny.criterion.seed.zero_()
        tiny.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss = tiny.loss(x, targets)[0]
        kept[enable] = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
        loss.backward()
        found.append([p.grad.clone() for p in tiny.parameters()])
    assert 0 < kept[True] < 0.9 * kept[False]
    assert all(torch.equal(a, b) for a, b in zip(*found))


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"pixel_values": torch.zeros(3, 64, 64)}, ValueError, r"pixel_values must be \[B, 3"),
        ({"pixel_values": torch.zeros(1, 1, 64, 64)}, ValueError, r"got \[1, 1, 64, 64\] float32"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64).byte()}, TypeError, "uint8"),
        ({"pixel_values": torch.zeros(0, 3, 64, 64)}, ValueError, "must not be empty"),
        ({"mask_labels": [torch.zeros(1, 64, 64)]}, ValueError, "together"),
        ({"class_labels": [torch.zeros(1).long()]}, ValueError, "together"),
        (
            {
                "mask_labels": [torch.zeros(1, 64, 64)],
                "class_labels": [torch.tensor([LABELS])],
            },
            ValueError,
            f"{LABELS}",
        ),
    ],
)
def test_bad_arguments_are_named(tiny, arguments, kind, message):
    with pytest.raises(kind, match=message):
        tiny(**({"pixel_values": torch.zeros(1, 3, 64, 64)} | arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 0}, "num_labels must be >= 1, got 0"),
        ({"hidden_dim": 100}, "hidden_dim must be a multiple of 32"),
        ({"feature_size": 128}, "feature_size must equal hidden_dim"),
        ({"importance_sample_ratio": 1.5}, r"importance_sample_ratio must be in \[0, 1\]"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(Mask2FormerConfig(), **change)


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match="got vgg, coco/panoptic"):
        Mask2FormerConfig.preset("vgg")
