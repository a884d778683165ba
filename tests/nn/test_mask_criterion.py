"""Criterion of whole masks: equality with transformers' loss, void, padding and edges."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from transformers.models.maskformer import modeling_maskformer as peer

from segkern.nn import mask_criterion
from segkern.nn.mask_criterion import FullMaskCriterion
from segkern.ops import _bands, unpack_bits
from segkern.structures.targets import Targets
from support.comparison import promote
from support.cuda import Copies
from support.inputs import random_targets
from support.void import random_void

B, R, Q, K, M = 2, 3, 6, 4, 8
SIZE = 35, 46
NAMES = ("loss_cross_entropy", "loss_mask", "loss_dice")


def setting(counts=(3, 2), dtype=torch.float64, maps=(9, 12)):
    g = torch.Generator().manual_seed(1)
    class_logits = torch.randn(B, R, Q, K + 1, generator=g)
    mask_embed = torch.randn(B, R, Q, M, generator=g)
    features = torch.randn(B, M, *maps, generator=g)
    targets = Targets.from_lists(*random_targets(counts, K, *SIZE), num_labels=K)
    return [*promote([class_logits, mask_embed, features], dtype), targets]


def leaves_of(values):
    return [v.clone().requires_grad_() for v in values]


@pytest.fixture(params=["one band", "bands"])
def bands(request, monkeypatch):
    """All rows at once, and a few at a time, whose number does not divide the maps'."""
    if request.param == "bands":
        monkeypatch.setattr(_bands, "ON_CPU", 2 * B * R * Q * 46)


def transformers_losses(class_logits, mask_logits, counts, weights):
    """The three losses of each prediction, R dicts."""
    masks, labels = random_targets(counts, K, *SIZE)
    matcher = peer.MaskFormerHungarianMatcher(*(weights[i] for i in (0, 1, 2)))
    theirs = peer.MaskFormerLoss(K, matcher, dict(zip(NAMES, weights)), 0.1).double()
    masks = [m.double() for m in masks]
    return [theirs(mask_logits[:, r], class_logits[:, r], masks, labels) for r in range(R)]


@pytest.mark.parametrize("whole", [False, True], ids=["factors", "mask logits"])
@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (Q + 3, 1)], ids=str)
def test_losses_and_gradients_equal_transformers(counts, whole, bands):
    *values, targets = setting(counts)
    ours, theirs = leaves_of(values), leaves_of(values)
    weights = (1.0, 20.0, 1.0)
    class_logits, mask_embed, features = ours
    if whole:
        mask_embed, features = torch.einsum("brqm,bmhw->brqhw", mask_embed, features), None
    loss, losses = FullMaskCriterion(K).double()(class_logits, mask_embed, features, targets)
    loss.backward()

    mask_logits = torch.einsum("brqm,bmhw->brqhw", *theirs[1:])
    total = 0
    for r, want in enumerate(transformers_losses(theirs[0], mask_logits, counts, weights)):
        for name, weight in zip(NAMES, weights):
            torch.testing.assert_close(losses[name][r], want[name], rtol=1e-8, atol=1e-12)
            total = total + weight * want[name]
    torch.testing.assert_close(loss, total, rtol=1e-8, atol=0)
    total.backward()
    for have, want in zip(ours, theirs):
        assert (have.grad - want.grad).norm() <= 1e-8 * want.grad.norm()


@pytest.mark.parametrize("maps", [(9, 12), SIZE], ids=["resized", "of the masks' size"])
def test_gradients_of_the_mask_losses_are_those_of_autograd(maps, bands):
    logits = setting(maps=maps)[2][:, :, None].expand(-1, -1, 2, -1, -1)[:, :R].contiguous()
    _, masks, *_ = Targets.from_lists(*random_targets((2, 2), K, *SIZE))
    void = random_void(B, *SIZE)

    def run(x):
        return mask_criterion.mask_losses(x, masks, void)

    assert torch.autograd.gradcheck(run, [logits.requires_grad_()], fast_mode=True)


def plain_cost(values, targets):
    """Focal and dice cost [B, R, Q, T] on the counted pixels, one pair at a time."""
    void = unpack_bits(targets.void, SIZE[1])
    x = torch.einsum("brqm,bmhw->brqhw", *values[1:])
    h, w = x.shape[3:]
    rows = (torch.arange(h) * SIZE[0] / h).long()
    columns = (torch.arange(w) * SIZE[1] / w).long()
    out = x.new_zeros(2, *x.shape[:3], targets.masks.shape[1])
    for b in range(B):
        keep = ~void[b][rows][:, columns]
        for t, mask in enumerate(targets.masks[b].bool()):
            inside = mask[rows][:, columns][keep]
            for r in range(R):
                for q in range(Q):
                    z = x[b, r, q][keep]
                    p = z.sigmoid()
                    right = p.where(inside, 1 - p)
                    focal = (0.75 - 0.5 * inside.double()) * (1 - right) ** 2 * -right.log()
                    out[0, b, r, q, t] = focal.mean()
                    overlap, total = p[inside].sum(), p.sum() + inside.sum()
                    out[1, b, r, q, t] = 1 - (2 * overlap + 1) / (total + 1)
    return out


def test_void_pixels_have_no_weight(bands):
    """In costs as by hand; what masks hold there changes nothing in loss and gradient."""
    *values, targets = setting()
    targets = targets._replace(void=random_void(B, *SIZE))
    costs = mask_criterion.mask_costs(*values[1:], targets, True, True)
    torch.testing.assert_close(torch.stack(costs), plain_cost(values, targets))
    pixels = unpack_bits(targets.void, SIZE[1])[:, None]
    results = []
    for masks in (targets.masks, targets.masks.where(~pixels, 1 - targets.masks)):
        leaves = leaves_of(values)
        loss, losses = FullMaskCriterion(K).double()(*leaves, targets._replace(masks=masks))
        loss.backward()
        results.append([loss, *losses.values(), *(v.grad for v in leaves)])
    assert all(torch.equal(one, two) for one, two in zip(*results))
    assert FullMaskCriterion(K).double()(*values, targets._replace(void=None))[0] != loss


def test_a_target_within_void_costs_its_class_alone():
    *values, targets = setting((1, 1))
    void = random_void(B, *SIZE, share=1.0)
    _, losses = FullMaskCriterion(K).double()(*values, targets._replace(void=void))
    assert losses["loss_mask"].tolist() == losses["loss_dice"].tolist() == [0.0] * R


def test_padding_does_not_matter():
    *values, targets = setting()
    more = 16 - targets.labels.shape[1]
    padded = targets._replace(
        labels=torch.nn.functional.pad(targets.labels, (0, more), value=99),
        masks=torch.nn.functional.pad(targets.masks, (0, 0, 0, 0, 0, more), value=1),
    )
    got, want = (FullMaskCriterion(K).double()(*values, t) for t in (padded, targets))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("left_out", NAMES)
def test_a_weight_of_0_leaves_its_term_out(left_out):
    *values, targets = setting()
    weights = dict(zip(NAMES, (1.0, 20.0, 1.0))) | {left_out: 0.0}
    loss, losses = FullMaskCriterion(K, *weights.values()).double()(*values, targets)
    assert losses.keys() == weights.keys() - {left_out}
    logits = torch.einsum("brqm,bmhw->brqhw", *values[1:])
    parts = transformers_losses(values[0], logits, (3, 2), tuple(weights.values()))
    want = sum(weights[name] * part[name] for part in parts for name in NAMES)
    torch.testing.assert_close(loss, want, rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits(dtype):
    *values, targets = setting(dtype=torch.float32)
    want, _ = FullMaskCriterion(K)(*values, targets)
    leaves = [v.to(dtype).requires_grad_() for v in values]
    got, losses = FullMaskCriterion(K)(*leaves, targets)
    got.backward()
    assert {v.dtype for v in losses.values()} == {torch.float32}
    torch.testing.assert_close(got, want, rtol=0.05, atol=0)
    assert all(v.grad.isfinite().all() for v in leaves)


def test_no_target_leaves_the_class_loss_alone():
    *values, targets = setting((0, 0))
    _, losses = FullMaskCriterion(K).double()(*values, targets)
    assert losses["loss_mask"].tolist() == losses["loss_dice"].tolist() == [0.0] * R
    assert losses["loss_cross_entropy"].min() > 0


def test_logits_that_are_not_finite_do_not_stop_the_matching():
    *values, targets = setting()
    values[1][0, 0] = float("nan")
    assert FullMaskCriterion(K).double()(*values, targets)[0].isnan()


def test_nothing_waits_for_a_value_and_nothing_is_copied_to_a_gpu():
    """A value that the host reads raises here; a copy of ordinary memory could not be captured."""
    *values, targets = setting()
    given = [*values, targets._replace(void=random_void(B, *SIZE))]
    criterion = FullMaskCriterion(K).double()
    with FakeTensorMode() as mode:
        *values, targets = pytree.tree_map_only(
            torch.Tensor, lambda x: torch.empty_like(mode.from_tensor(x), device="cuda"), given
        )
        criterion.empty_weight = values[0].new_empty(K + 1)
        logits = values[2][:, :, None].expand(-1, -1, 2, -1, -1).requires_grad_()
        with Copies() as copies:
            loss, _ = criterion(*(v.requires_grad_() for v in values), targets)
            each = mask_criterion.mask_losses(logits, targets.masks[:, :2], targets.void)
            grad = each[0].grad_fn.apply(*each)[0]  # backward itself: its engine wants a GPU
    assert loss.is_cuda
    assert grad.is_cuda
    assert grad.shape == logits.shape
    assert not copies.seen


def test_compiles_as_one_graph():
    *values, targets = setting()
    loss = FullMaskCriterion(K).double()
    want = loss(*values, targets)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*values, targets)
    torch.testing.assert_close(got, want)
