"""The two decoders of Mask2Former against transformers' modules, as they are, on the same weights.

pixel decoder: four maps of a backbone to mask features and three levels. query decoder: these to
queries and masks; transformers makes the mask logits of all predictions on the way, and gradients
start at the queries on both sides, so that neither side's mask products are in the backward.
"""

import _models
import pytest
import torch
from _measure import DEVICE, PASSES, Work, pick, step

IMPLS = ("segkern", "transformers")
CASES = pick(  # model, height, width, batch, dtype
    [("tiny", 64, 64, 1, "float32")],
    [("swin_tiny", 512, 512, 1, "float32")],
    [
        ("swin_tiny", 800, 1344, 1, "bfloat16"),
        ("swin_tiny", 1024, 1024, 8, "bfloat16"),
        ("swin_tiny", 1024, 1024, 1, "bfloat16"),
    ],
)


def pixel_decoder(ours, theirs, maps):
    decoder = theirs.model.pixel_level_module.decoder

    def transformers(*maps):
        out = decoder(list(maps), return_dict=True)
        return out.mask_features, *out.multi_scale_features

    functions = {
        "segkern": lambda *maps: ours.pixel_decoder(list(maps))[:2],
        "transformers": transformers,
    }
    return functions, maps, {"segkern": ours.pixel_decoder, "transformers": decoder}


def query_decoder(ours, theirs, maps):
    with torch.no_grad():
        features, pixels, shapes = ours.pixel_decoder(maps)
    decoder = theirs.model.transformer_module

    def transformers(features, pixels):
        levels = pixels.split([h * w for h, w in shapes], 1)
        levels = [x.mT.unflatten(2, size) for x, size in zip(levels, shapes)]
        out = decoder(levels, features, output_hidden_states=True)
        return tuple(out.intermediate_hidden_states)

    functions = {
        "segkern": lambda features, pixels: ours.query_decoder(pixels, shapes, features),
        "transformers": transformers,
    }
    return (
        functions,
        [features, pixels],
        {"segkern": ours.query_decoder, "transformers": decoder},
    )


MODULES = {"pixel decoder": pixel_decoder, "query decoder": query_decoder}


def build(module, model, height, width, batch, dtype, backward):
    folder = _models.weights(model)
    ours, theirs = (_models.open_model(impl, folder, DEVICE) for impl in IMPLS)
    maps = [
        torch.randn(batch, channels, height // stride, width // stride, device=DEVICE)
        for channels, stride in zip(ours.backbone.channels, ours.backbone.strides)
    ]
    functions, inputs, modules = MODULES[module](ours, theirs, maps)

    def cast(impl):
        def run(*tensors):
            with torch.autocast(DEVICE, getattr(torch, dtype), enabled=dtype != "float32"):
                return functions[impl](*tensors)

        return run

    if backward:
        return Work({i: step(cast(i), inputs, list(modules[i].parameters())) for i in functions})
    return Work({i: torch.no_grad()(lambda i=i: cast(i)(*inputs)) for i in functions})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "{} {}x{} B={} {}".format(*c))
def test_modules(case, module, direction, impl, measured):
    _, height, width, batch, dtype = case

    def work():
        return build(module, *case, direction != "forward")

    named = f"{height}x{width} B={batch}{PASSES[direction]}"
    measured(module.replace(" ", "_"), named, dtype, impl, work)
