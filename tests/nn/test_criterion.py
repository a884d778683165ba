"""Criterion: equality with transformers' loss, invariances and edges."""

import pytest
import torch
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as peer

from segkern.nn.criterion import Criterion
from segkern.ops import random_points, unpack_bits
from segkern.ops.point_sample import MATCHING
from segkern.structures.targets import Targets
from support.comparison import promote
from support.inputs import random_targets
from support.void import random_void

B, R, Q, K, M, P = 2, 3, 6, 4, 8, 40


def setting(counts=(3, 2), dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    class_logits = torch.randn(B, R, Q, K + 1, generator=g)
    mask_embed = torch.randn(B, R, Q, M, generator=g)
    features = torch.randn(B, M, 9, 12, generator=g)
    targets = Targets.from_lists(*random_targets(counts, K, 36, 48), num_labels=K, ids=[4, 9])
    return [*promote([class_logits, mask_embed, features], dtype), targets]


def criterion(**options):
    return Criterion(K, num_points=P, **options).double()


def padded(targets, slots):
    """The same targets with more padding, whose contents must not matter."""
    more = slots - targets.labels.shape[1]
    labels = torch.nn.functional.pad(targets.labels, (0, more), value=99)
    masks = torch.nn.functional.pad(targets.masks, (0, 0, 0, 0, 0, more), value=1)
    return Targets(labels, masks, targets.count, targets.ids)


WEIGHTS = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}


def transformers_losses(class_logits, mask_logits, masks, labels, ids, monkeypatch):
    """Losses of each prediction by transformers, whose torch.rand gives our points.

    Of each prediction it matches image by image, then draws the candidates and the random rest of
    all matched pairs, image by image.
    """
    theirs = peer.Mask2FormerLoss(
        Mask2FormerConfig(num_labels=K, train_num_points=P), WEIGHTS
    ).double()
    state = {}

    def rand(n, points, two, device=None):
        state["calls"] += 1
        if state["calls"] <= B:
            slots = [(ids[state["calls"] - 1], state["r"], MATCHING)]
        else:
            pairs = enumerate(state["matched"])
            slots = [(ids[b], state["r"], t) for b, (_, ts) in pairs for t in ts.tolist()]
        assert n == len(slots)
        skip = 3 * P if state["calls"] == B + 2 else 0
        slots = torch.tensor(slots, dtype=torch.int64).view(-1, 3)
        return random_points(torch.tensor([0]), slots, skip + points)[:, skip:].double()

    def matcher(*inputs, match=theirs.matcher.forward):
        state["matched"] = match(*inputs)
        return state["matched"]

    monkeypatch.setattr(theirs.matcher, "forward", matcher)
    monkeypatch.setattr(peer.torch, "rand", rand)
    for r in range(R):
        state.update(calls=0, r=r)
        yield theirs(mask_logits[:, r], class_logits[:, r], masks, labels)


@pytest.mark.parametrize("impl", ["kernel", "reference"])
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (Q + 3, 1)], ids=str)
def test_losses_and_gradients_equal_transformers(counts, impl, monkeypatch):
    *values, targets = setting(counts)
    ours, theirs = ([v.clone().requires_grad_() for v in values] for _ in range(2))
    loss, losses = criterion(impl=impl)(*ours, targets)
    loss.backward()

    masks, labels = random_targets(counts, K, 36, 48)
    class_logits, mask_embed, features = theirs
    mask_logits = torch.einsum("brqm,bmhw->brqhw", mask_embed, features)
    masks = [m.double() for m in masks]
    total = 0
    for r, want in enumerate(
        transformers_losses(class_logits, mask_logits, masks, labels, [4, 9], monkeypatch)
    ):
        for name, weight in WEIGHTS.items():
            torch.testing.assert_close(losses[name][r], want[name], rtol=1e-8, atol=1e-12)
            total = total + weight * want[name]
    torch.testing.assert_close(loss, total, rtol=1e-8, atol=0)
    total.backward()
    for have, want in zip(ours, theirs):
        assert (have.grad - want.grad).norm() <= 1e-8 * want.grad.norm()


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (0, 0), (Q + 3, 1)], ids=str)
def test_kernels_equal_references(counts):
    *values, targets = setting(counts)
    leaves = [[v.clone().requires_grad_() for v in values] for _ in range(2)]
    results = []
    for impl, inputs in zip(("kernel", "reference"), leaves):
        loss, losses = criterion(impl=impl)(*inputs, targets)
        loss.backward()
        results.append([loss, *losses.values(), *(v.grad for v in inputs)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_void_in_matching_and_losses():
    """Kernels as references; what masks hold there changes nothing, and without it they differ."""
    *values, targets = setting()
    void = random_void(B, 36, 48)
    pixels = unpack_bits(void, 48)[:, None]
    other = targets.masks.where(~pixels, 1 - targets.masks)
    results = []
    for impl, masks in (("kernel", targets.masks), ("kernel", other), ("reference", other)):
        leaves = [v.clone().requires_grad_() for v in values]
        loss, losses = criterion(impl=impl)(*leaves, targets._replace(masks=masks, void=void))
        loss.backward()
        results.append([loss, *losses.values(), *(v.grad for v in leaves)])
    for one, two, reference in zip(*results):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, reference, rtol=1e-10, atol=1e-12)
    assert criterion()(*values, targets)[0] != results[0][0]


def test_a_target_within_void_costs_its_class_alone():
    *values, targets = setting((1, 1))
    void = random_void(B, 36, 48, share=1.0)
    _, losses = criterion()(*values, targets._replace(void=void))
    assert losses["loss_mask"].tolist() == losses["loss_dice"].tolist() == [0.0] * R


def test_padding_does_not_matter():
    *values, targets = setting()
    got, want = (criterion()(*values, t) for t in (padded(targets, 16), targets))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_order_of_the_batch_does_not_matter():
    *values, targets = setting()
    parts = {k: v.flip(0) for k, v in targets._asdict().items() if v is not None}
    swapped = Targets(**parts)
    got = criterion()(*(v.flip(0) for v in values), swapped)
    torch.testing.assert_close(got, criterion()(*values, targets), rtol=1e-12, atol=0)


def test_each_target_gets_its_own_query():
    *values, targets = setting((Q + 3, 2))
    query_of_target, target_of_query = criterion().match(*values, targets)
    assert (target_of_query[0] >= 0).all()  # more targets than queries: every query is taken
    for r in range(R):
        found = query_of_target[1, r, :2]
        assert sorted(target_of_query[1, r, found].tolist()) == [0, 1]
        assert (query_of_target[1, r, 2:] == -1).all()


def test_no_target_leaves_the_class_loss_alone():
    *values, targets = setting((0, 0))
    loss, losses = criterion()(*values, targets)
    assert losses["loss_mask"].tolist() == losses["loss_dice"].tolist() == [0.0] * R
    nothing = torch.nn.functional.cross_entropy(
        values[0].flatten(0, 2), torch.full((B * R * Q,), K)
    )
    torch.testing.assert_close(loss, 2 * R * nothing)


def test_seed_advances_in_training_only():
    *values, targets = setting()
    loss = criterion()
    first = loss.train()(*values, targets)[0]
    second = loss(*values, targets)[0]
    assert loss.seed.item() == 2
    assert first != second
    loss.eval()
    assert loss(*values, targets)[0] == loss(*values, targets)[0]
    assert loss.seed.item() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits(dtype):
    *values, targets = setting(dtype=torch.float32)
    want, _ = Criterion(K, num_points=P)(*values, targets)
    leaves = [v.to(dtype).requires_grad_() for v in values]
    got, losses = Criterion(K, num_points=P)(*leaves, targets)
    got.backward()
    assert {v.dtype for v in losses.values()} == {torch.float32}
    torch.testing.assert_close(got, want, rtol=0.05, atol=0)
    assert all(v.grad.isfinite().all() for v in leaves)


def test_logits_that_are_not_finite_do_not_stop_the_matching():
    *values, targets = setting()
    values[0][0, 0] = float("nan")
    loss, _ = criterion()(*values, targets)
    assert loss.isnan()


def test_compiles_as_one_graph():
    *values, targets = setting()
    loss = criterion()
    want = loss(*values, targets)
    loss.seed.zero_()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*values, targets)
    torch.testing.assert_close(got, want)
