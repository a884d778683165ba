"""MaskFormer as its users meet it: presets, training and prediction, bad input, compilation."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import segkern
from segkern.models import MaskFormer, MaskFormerConfig
from segkern.structures.outputs import Product
from segkern.structures.targets import Targets
from segkern.training.step import TrainingLoss
from support.inputs import random_targets

LABELS = 7

with torch.device("meta"):
    torch.empty(0)  # torch keeps a list of its constructors, before conftest replaces this one


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return MaskFormer(MaskFormerConfig.tiny(LABELS))


def images(B=2, H=64, W=64):
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(2))


def targets(counts=(2, 3)):
    return Targets.from_lists(*random_targets(counts, LABELS, 64, 64), num_labels=LABELS)


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


PRESETS = [  # backbone, task, dataset, labels, edges, millions of weights in the paper's tables
    ("resnet50", "semantic", None, 150, (512, 2048), 41),
    ("resnet101", "semantic", "cityscapes", 19, (1024, 2048), 60),
    ("swin_tiny", "semantic", None, 150, (512, 2048), 42),
    ("swin_small", "instance", "coco", 80, (800, 1333), 63),
    ("swin_base", "semantic", "ade20k", 150, (640, 2560), 102),
    ("swin_large", "panoptic", None, 133, (800, 1333), 212),
]


@pytest.mark.parametrize("preset", PRESETS, ids=[f"{p[0]} {p[1]}" for p in PRESETS])
def test_presets(preset):
    backbone, task, dataset, labels, edges, millions = preset
    config = MaskFormerConfig.preset(backbone, task=task, dataset=dataset)
    assert (config.num_labels, config.num_queries) == (labels, 100)
    assert (config.shortest_edge, config.longest_edge) == edges
    with torch.device("meta"):
        model = MaskFormer(config)
    assert model.query_decoder.class_embed.out_features == labels + 1
    # the tables count millions without a digit behind them, of ResNets partly with a wider stem
    own = sum(p.numel() for p in model.parameters()) / 1e6
    assert own == pytest.approx(millions, abs=1.0)


def test_training_builds_no_mask_logits_of_all_queries(tiny):
    x, (masks, labels) = images(2, 64, 96), random_targets((2, 1), LABELS, 64, 96)
    out = tiny.train()(x, mask_labels=masks, class_labels=labels)
    assert isinstance(vars(out)["masks_queries_logits"], Product)
    assert out.auxiliary_logits is None
    assert out.class_queries_logits.shape == (2, 8, LABELS + 1)
    asked = tiny(x, mask_labels=masks, class_labels=labels, output_auxiliary_logits=True)
    assert asked.masks_queries_logits.shape == (2, 8, 32, 48)
    shapes = [o["masks_queries_logits"].shape for o in asked.auxiliary_logits]
    assert shapes == [(2, 8, 32, 48)] * 2
    assert tiny.eval()(x, mask_labels=masks, class_labels=labels).masks_queries_logits is not None
    assert tiny(x).loss is None


def test_no_tensor_of_the_loss_holds_all_mask_logits(tiny, monkeypatch):
    """Neither the logits of all queries nor the resized ones of those that are matched."""
    monkeypatch.setattr("segkern.ops._bands.ON_CPU", 2**14)
    model, sizes = MaskFormer(replace(tiny.config, num_queries=64)), []
    given = [t.detach().requires_grad_() for t in model.all_predictions(images())]

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            found = out if isinstance(out, (tuple, list)) else [out]
            # a view of an argument is no memory
            sizes.extend(t.untyped_storage().nbytes() // 4 for t in found if torch.is_tensor(t))
            return out

    with Sizes():
        model.criterion(*given, targets((5, 3)))[0].backward()
    B, R, Q, T, features = 2, 3, 64, 8, given[2]
    assert max(sizes) == features.numel() < B * R * Q * 32 * 32
    assert features.numel() < B * R * T * 64 * 64


@pytest.mark.parametrize("deep", [True, False], ids=["every prediction", "last"])
def test_every_weight_gets_a_gradient(tiny, deep):
    tiny.config.use_auxiliary_loss = deep
    total, losses = tiny.train().loss(images(), targets((2, 0)))
    total.backward()
    assert total.isfinite()
    assert [v.shape for v in losses.values()] == [(3 if deep else 1,)] * 3
    wrong = [
        n for n, p in tiny.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert wrong == []


def test_an_image_does_not_depend_on_its_batch(tiny):
    tiny.double().eval()
    x = images(3).double()
    together = tiny(x).masks_queries_logits
    assert error(together[1:2], tiny(x[1:2]).masks_queries_logits) < 1e-10


def test_dropout_drops_in_training_alone(tiny):
    tiny.double()
    x = images().double()
    want = tiny.eval().predict(x).classes
    layers = tiny.query_decoder.layers
    for layer in layers:
        layer.dropout.p = 0.5
    assert torch.equal(tiny.predict(x).classes, want)
    tiny.train()
    tiny.backbone.eval()
    assert error(tiny.predict(x).classes, want) > 1e-3
    for layer in layers:
        layer.dropout.p = 1e-14  # drops nothing, by the path that could
    assert error(tiny.predict(x).classes, want) < 1e-10


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_stays_near_float32(tiny, how):
    tiny.eval()
    x, (masks, labels) = images(), random_targets((2, 3), LABELS, 64, 64)
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


@pytest.mark.slow
def test_compiles_without_graph_breaks(tiny):
    torch._dynamo.reset()
    x = images()
    with torch.no_grad():
        want = tiny.eval()(x)
        have = torch.compile(tiny, fullgraph=True, backend="aot_eager")(x)
    assert error(want.masks_queries_logits, have.masks_queries_logits) < 1e-3
    want = tiny.loss(x, targets())[0]
    have = torch.compile(tiny.loss, fullgraph=True, backend="aot_eager")(x, targets())[0]
    have.backward()
    assert have.item() == pytest.approx(want.item(), rel=1e-3)
    assert all(p.grad is not None for p in tiny.parameters())


def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(tiny):
    tiny.train()
    found, kept = [], {}
    for enable in (False, True):
        tiny.gradient_checkpointing_enable(enable)
        tiny.zero_grad()
        sizes = kept[enable] = []
        hook = (lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t)
        with torch.autograd.graph.saved_tensors_hooks(*hook):
            loss = tiny.loss(images(), targets())[0]
        loss.backward()
        found.append([p.grad.clone() for p in tiny.parameters()])
    assert len(kept[True]) < len(kept[False])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_step_reads_no_value_on_the_host(tiny):
    """A tensor without numbers has none to be read: `.item()` raises."""
    loss = TrainingLoss(tiny.train())
    given = loss.state_dict(), images(), targets()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights, *batch = pytree.tree_map_only(
            torch.Tensor, lambda x: torch.empty_like(mode.from_tensor(x), device="cuda"), given
        )
        total, losses = torch.func.functional_call(loss, weights, tuple(batch))
    assert total.is_cuda
    assert all(v.is_cuda for v in losses.values())


@pytest.mark.parametrize("task", MaskFormerConfig.tasks)
def test_pictures_are_segmented_for_every_task(tiny, task):
    picture = (torch.rand(50, 70, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    result = segkern.segment(tiny.eval(), picture.numpy(), task=task)
    assert result.task == task
    assert result.segmentation is None or result.segmentation.shape[-2:] == (50, 70)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"pixel_values": torch.zeros(3, 64, 64)}, ValueError, r"pixel_values must be \[B, 3"),
        ({"pixel_values": torch.zeros(1, 1, 64, 64)}, ValueError, r"got \[1, 1, 64, 64\] float32"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64).byte()}, TypeError, "uint8"),
        ({"pixel_values": torch.zeros(0, 3, 64, 64)}, ValueError, "MaskFormer: .* not be empty"),
        ({"mask_labels": [torch.zeros(1, 64, 64)]}, ValueError, "MaskFormer: .* together"),
        (
            {"mask_labels": [torch.zeros(1, 64, 64)], "class_labels": [torch.tensor([LABELS])]},
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
        ({"hidden_dim": 100}, "hidden_dim must be a multiple of 4 and of num_attention_heads"),
        ({"fpn_feature_size": 100}, "fpn_feature_size must be a multiple of 32, got 100"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\], got 1.5"),
        ({"mask_weight": -1.0}, "mask_weight must be >= 0, got -1.0"),
        ({"decoder_layers": 0}, "decoder_layers must be >= 1, got 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=f"MaskFormerConfig: {message}"):
        replace(MaskFormerConfig(), **change)


@pytest.mark.parametrize(
    "wrong", [("vgg",), ("swin_tiny", "depth"), ("resnet50", "semantic", "coco")]
)
def test_unknown_presets_are_named(wrong):
    with pytest.raises(ValueError, match=rf"MaskFormerConfig.preset: .*got {wrong[0]}, "):
        MaskFormerConfig.preset(*wrong)
