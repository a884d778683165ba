"""Inference by many threads on one model, while it is in training mode, and what a view shares."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import segkern
from segkern.models import Mask2Former, Mask2FormerConfig, Segmenter, SegmenterConfig
from segkern.runtime.modes import evaluated

SMALL = {"num_queries": 8, "encoder_layers": 1, "decoder_layers": 1, "dim_feedforward": 32}
SMALL |= {"shortest_edge": 64, "longest_edge": 128, "dropout": 0.5}
SWIN = {"embed_dim": 24, "depths": (2, 1, 2, 2), "num_heads": (1, 2, 3, 6)}
PIXELS = {"image_size": (32, 32), "embed_dim": 64, "depth": 2, "num_heads": 1, "dropout": 0.5}
MODELS = {
    "Swin": lambda: Mask2Former(
        Mask2FormerConfig(3, "swin_tiny", False, SWIN, drop_path_rate=0.5, **SMALL)
    ),
    "timm's ResNet": lambda: Mask2Former(Mask2FormerConfig(3, "resnet18", **SMALL)),
    "Segmenter": lambda: Segmenter(SegmenterConfig(3, drop_path_rate=0.5, **PIXELS)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    torch.manual_seed(1)
    return MODELS[request.param]()


def picture(i):
    sizes = [(64, 64), (40, 72), (64, 48)]
    return np.random.default_rng(i).integers(0, 255, (*sizes[i % 3], 3), dtype=np.uint8)


def scores(model, i):
    return segkern.segment(model, picture(i), task="semantic", return_scores=True).scores


def test_threads_may_share_a_model_in_training_mode(model):
    wanted = [scores(model.eval(), i) for i in range(8)]
    modes = {m: m.training for m in model.train().modules()}
    next(iter(model.children())).eval()
    modes |= {m: m.training for m in model.modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(lambda i: scores(model, i), range(8))):
            assert torch.equal(found, wanted[i]), i
    assert {m: m.training for m in model.modules()} == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_view_shares_weights_buffers_and_hooks(model):
    view = evaluated(model.train())
    assert view is not model
    assert not any(m.training for m in view.modules())
    assert all(m.training for m in model.modules())
    for one, other in ((model.parameters(), view.parameters()), (model.buffers(), view.buffers())):
        assert all(a is b for a, b in zip(one, other, strict=True))
    seen = []
    hook = next(model.children()).register_forward_hook(lambda *_: seen.append(1))
    scores(model, 0)
    hook.remove()
    assert seen == [1]
    first = next(m for m in model.modules() if getattr(m, "bias", None) is not None)
    before = scores(model, 0)
    first.bias = nn.Parameter(first.bias + torch.randn_like(first.bias))
    assert dict(view.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert any(p is first.bias for p in view.parameters())
    assert not torch.equal(scores(model, 0), before)
    assert evaluated(model.eval()) is model


class Odd(nn.Module):
    """Modules where they are easily missed: in a list, a dict, a method and a parametrization."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.line = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.listed, self.named = [self.drop], {"norm": self.norm}
        self.seen = []

    def forward(self, x):
        return self.last(self.named["norm"](self.line(self.listed[0](x))))

    def last(self, x):
        self.seen.append(len(x))
        return nn.functional.dropout(x, training=self.training)


@pytest.mark.parametrize("change", ["nothing", "a method of the instance", "compiled"])
def test_modules_that_are_held_in_other_ways(change):
    model = Odd()
    if change == "a method of the instance":
        model.last = MethodType(Odd.last, model)
    if change == "compiled":
        model.compile(backend="eager")
    x = torch.randn(5, 4)
    wanted = deepcopy(model).eval()(x)
    state = deepcopy(model.state_dict())
    assert torch.equal(evaluated(model.train())(x), wanted)
    assert model.seen[-1] == 5
    assert all(map(torch.equal, model.state_dict().values(), state.values()))


def test_positions_are_kept_for_these_weights_alone():
    model = Segmenter(SegmenterConfig(3, **PIXELS)).eval().encoder
    with torch.no_grad():
        kept = model.positions(3, 3)
        assert model.positions(3, 3) is kept
        model.pos_embed = nn.Parameter(2 * model.pos_embed)
        torch.testing.assert_close(model.positions(3, 3), 2 * kept)
        model.pos_embed.data = model.pos_embed / 4
        torch.testing.assert_close(model.positions(3, 3), kept / 2)


def test_what_torch_compile_made_runs_as_the_module_it_was_made_of():
    torch.manual_seed(1)
    model = MODELS["timm's ResNet"]().eval()
    wanted = scores(model, 0)
    model.backbone = torch.compile(model.backbone, backend="eager")
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    assert torch.equal(scores(model, 0), wanted)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert evaluated(torch.compile(model, backend="eager")).backbone.training is False


def test_what_torch_jit_compiled_is_refused_in_training_mode():
    model = nn.Sequential(torch.jit.script(nn.Dropout()), nn.ReLU())
    with pytest.raises(ValueError, match=r"torch.jit compiled.*: call model.eval\(\) first"):
        evaluated(model.train())
    assert evaluated(model.eval()) is model
