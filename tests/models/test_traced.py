"""torch.jit.trace and torch.export on the models as they are: graphs that are saved, and that take
batches and images of other sizes."""

import io

import pytest
import torch
from test_opening import queries
from test_outputs import KINDS

SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
MODELS = dict(KINDS) | {
    "Mask2Former, Swin": lambda: queries(backbone="swin_tiny", backbone_options=SWIN)
}
LONG = ("Mask2Former", "Mask2Former, Swin", "MaskFormer", "OneFormer", "SegFormer", "Segmenter")
models = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in LONG)) for k in MODELS]
)
SIDE = 96  # the coarsest map of Mask2Former has more than 32 pixels: a size of 1 is one for good


def asked(kind):
    """A model, and images of two sizes and numbers."""
    torch.manual_seed(0)
    model, fixed = MODELS[kind]().eval(), kind == "EoMT"
    sides = ((32, 32), (32, 32)) if fixed else ((SIDE, SIDE), (SIDE + 32, SIDE + 64))
    return model, *(torch.randn(B, 3, *side) for B, side in zip((2, 3), sides))


def assert_same(have, want):
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@models
@torch.no_grad()
def test_a_trace_is_saved_and_takes_other_batches(kind):
    """Its result is a tuple; sides are those that it was traced with, where constants of a size
    are part of a model."""
    model, x, _ = asked(kind)
    traced, file = torch.jit.trace(model, x), io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    again = torch.jit.load(file)
    for images in (x, torch.cat((x, x.flip(0)))[:3]):
        assert_same(again(images), model(images).to_tuple())


@models
@torch.no_grad()
def test_an_exported_model_takes_other_batches_and_sides(kind):
    model, x, other = asked(kind)
    sides = (0,) if kind == "EoMT" else (0, 2, 3)  # which takes one size
    shapes = {"pixel_values": dict.fromkeys(sides, torch.export.Dim.DYNAMIC)}
    program, file = torch.export.export(model, (x,), dynamic_shapes=shapes), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    for images in (x, other):
        have, want = again(images), model(images)
        assert type(have) is type(want)
        assert list(have) == list(want)
        assert_same(have.values(), want.values())
