"""A training step: what it does to the weights, precisions, compilation."""

import copy
import json

import pytest
import torch

from segkern.data.collate import Batch
from segkern.models import Mask2Former, Mask2FormerConfig
from segkern.structures.targets import Targets
from segkern.training.config import TrainConfig
from segkern.training.loop import train
from segkern.training.optimizer import build_optimizer
from segkern.training.step import Step
from support.inputs import random_targets

RATE = 1e-3
SMALL_SWIN = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8)}


def network(backbone="resnet_digits"):
    torch.manual_seed(0)
    config = Mask2FormerConfig.tiny(5)
    config.train_num_points, config.decoder_layers, config.num_queries = 48, 2, 6
    if backbone == "swin_tiny":
        config.backbone, config.backbone_options = backbone, SMALL_SWIN
        config.drop_path_rate = 0.3
    return Mask2Former(config).train()


def batch(side=64, counts=(3, 1), seed=0):
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
    targets = Targets.from_lists(*random_targets(counts, 5, side, side), num_labels=5)
    return Batch(x, targets)


def stepper(model, precision="fp32", graphs=False, clip=0.1, optimizer="adamw"):
    config = TrainConfig(lr=RATE, optimizer=optimizer)
    return Step(model, build_optimizer(model, config), clip, precision, graphs)


def same(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


def test_is_loss_backward_clip_and_optimizer():
    ours, plain = network(), network()
    step = stepper(ours)
    optimizer = build_optimizer(plain, TrainConfig(lr=RATE))
    for i in range(2):
        loss, losses = step(batch(seed=i), RATE)
        assert not loss.requires_grad
        optimizer.zero_grad()
        want, parts = plain.loss(batch(seed=i).pixel_values, batch(seed=i).targets)
        want.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        assert torch.equal(loss, want)
        assert all(torch.equal(losses[name], parts[name]) for name in parts)
    same(ours, plain)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_half_precision_keeps_float32_weights_near_those_of_float32(precision, optimizer):
    start, half, single = network(), network(), network()
    run = stepper(half, precision, optimizer=optimizer)
    if precision == "fp16":
        run.scaler = torch.amp.GradScaler(run.device, init_scale=256.0)  # no step is left out
    stepper(single, optimizer=optimizer)(batch(), RATE)
    run(batch(), RATE)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    moves = [
        torch.cat([(p - q).flatten() for p, q in zip(m.parameters(), start.parameters())])
        for m in (half, single)
    ]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.8


def test_fp16_leaves_out_a_step_whose_gradient_overflows_and_lowers_the_scale():
    model, start = network(), network()
    run = stepper(model, "fp16")
    run.scaler = torch.amp.GradScaler(run.device, init_scale=2.0**40)
    run(batch(), RATE)
    same(model, start)
    assert run.scaler.get_scale() == 2.0**39


def test_fp16_resumes_with_its_scale(tmp_path):
    from test_loop import PulledPlug, config, same

    from segkern.data import Digits

    settings = {"precision": "fp16", "checkpoint_every": 2}
    whole = train(config(tmp_path / "whole", **settings), progress=False)
    first = config(tmp_path / "cut", **settings)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(first, dataset=PulledPlug(Digits(first.data), 4 * 2), progress=False)
    data = Digits(first.data)
    again = train(first, resume=tmp_path / "cut", dataset=data, progress=False)
    same(whole.model.state_dict(), again.model.state_dict())


@pytest.mark.slow
def test_the_compiled_loss_has_the_gradients_of_the_eager_one():
    eager = network("swin_tiny")
    eager.backbone.eval()  # dropped branches are drawn differently
    compiled, data = copy.deepcopy(eager), batch()
    torch._dynamo.reset()
    loss = torch.compile(compiled.loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for model, function in ((eager, eager.loss), (compiled, loss)):
            model.zero_grad()
            value, _ = function(data.pixel_values, data.targets)
            value.backward()
            model.value = value.detach()
    torch.testing.assert_close(compiled.value, eager.value)
    assert compiled.criterion.seed == eager.criterion.seed == 2
    pairs = [(p.grad, q.grad) for p, q in zip(compiled.parameters(), eager.parameters())]
    whole = torch.cat([g.flatten() for _, g in pairs]).norm()
    for got, want in pairs:
        assert (got - want).norm() <= 1e-3 * (want.norm() + 1e-3 * whole)


@pytest.mark.slow
def test_kernels_and_references_train_alike(monkeypatch, tmp_path):
    """Step by step on digits, with an optimizer that does not amplify what rounding moves, and
    without points that are chosen by it."""
    from segkern.data import DigitsConfig
    from segkern.ops import _library

    def losses(impl):
        model = Mask2FormerConfig.tiny(11)
        model.train_num_points, model.importance_sample_ratio = 64, 0.0
        settings = TrainConfig(
            output=tmp_path / impl,
            steps=30,
            batch_size=4,
            lr=3e-3,
            optimizer="sgd",
            clip=1.0,
            log_every=1,
            tensorboard=False,
            data=DigitsConfig(level="easy"),
            model=model,
        )
        train(settings, progress=False)
        lines = (settings.output / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    kernel = losses("kernel")
    monkeypatch.setattr(_library, "use_kernel", lambda *_: False)
    apart = sorted(abs(a - b) / b for a, b in zip(kernel, losses("reference")))
    # a bit of a mask or a choice of queries may turn with a rounding, and moves a step's loss more
    assert apart[len(apart) // 2] < 1e-3
    assert apart[-1] > 0  # they are not the same
    assert kernel[-1] < 0.97 * kernel[0]
