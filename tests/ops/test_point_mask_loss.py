"""point_mask_loss: losses and gradients at the points that the reference chooses."""

import pytest
import torch

from segkern.ops import point_mask_loss, random_points, unpack_bits
from segkern.ops._void import void_cells
from segkern.ops.point_mask_loss import point_mask_loss_reference
from segkern.ops.point_sample import point_sample_reference
from support.comparison import DTYPES, compare
from support.inputs import point_mask_loss_inputs
from support.void import counts_by_hand, random_void

FEW = (40, 3.0, 0.75)  # points, oversample ratio, importance ratio
CASES = {
    "usual": ({}, FEW),
    "one slot": ({"B": 1, "R": 1, "T": 1}, FEW),
    "one point": ({}, (1, 3.0, 1.0)),
    "all important": ({}, (33, 2.0, 1.0)),
    "all random": ({}, (33, 2.0, 0.0)),
    "no oversampling": ({}, (50, 1.0, 0.75)),
    "map of one pixel": ({"h": 1, "w": 1, "H": 4, "W": 4}, FEW),
    "mask of whole words": ({"H": 29, "W": 48}, FEW),
    "mask smaller than map": ({"h": 33, "w": 20, "H": 5, "W": 3}, FEW),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case, dtype):
    sizes, settings = CASES[case]
    inputs = [*point_mask_loss_inputs(**sizes, dtype=dtype), *settings]
    inputs[2][0, 0, 0] = True
    compare(point_mask_loss, point_mask_loss_reference, inputs, [0])


VOID = {  # share of the pixels, settings
    "some": (0.3, FEW),
    "nearly all": (0.95, FEW),  # fewer candidates that count than are to be taken
    "all": (1.0, FEW),
    "some, all important": (0.3, (33, 1.0, 1.0)),
    "some, all random": (0.3, (33, 2.0, 0.0)),
    "some, more candidates": (0.6, (500, 3.0, 0.75)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VOID)
def test_void_losses_and_gradients(case, dtype):
    share, settings = VOID[case]
    inputs = [*point_mask_loss_inputs(dtype=dtype), *settings, random_void(share=share)]
    inputs[2][0, 0, 0] = True
    compare(point_mask_loss, point_mask_loss_reference, inputs, [0])


def test_void_cuts_points_out():
    """The loss by hand: of the candidates that count the k most uncertain, and the random rest."""
    logits, masks, active, ids, seed = point_mask_loss_inputs(B=1, R=1, T=1, dtype=torch.float64)
    void, active = random_void(B=1), torch.ones_like(active)
    points = random_points(seed, torch.stack((ids, ids * 0, ids * 0), -1), 130)
    counts = counts_by_hand(points, void, 45)[0]
    points = points.double()
    candidates, rest = points[:, :120][:, counts[:120]], points[:, 120:][:, counts[120:]]
    order = point_sample_reference(logits[0], candidates)[0, 0].abs().argsort()
    chosen = torch.cat((candidates[:, order[:30]], rest), 1)
    assert 30 < chosen.shape[1] < 40
    x = point_sample_reference(logits[0], chosen)
    t = point_sample_reference(masks.double(), chosen)
    want = torch.nn.functional.binary_cross_entropy_with_logits(x, t)
    for impl in ("kernel", "reference"):
        bce, dice = point_mask_loss(logits, masks, active, ids, seed, *FEW, void=void, impl=impl)
        torch.testing.assert_close(bce.squeeze(), want, rtol=1e-12, atol=0)
        s = x.sigmoid()
        want_dice = 1 - (2 * (s * t).sum() + 1) / (s.sum() + t.sum() + 1)
        torch.testing.assert_close(dice.squeeze(), want_dice, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["kernel", "reference"])
def test_void_pixels_do_not_count(impl, dtype):
    """Nothing that masks or logits hold there, even NaN, is seen; their gradient is exactly 0."""
    logits, masks, *rest = point_mask_loss_inputs(h=31, w=45, dtype=dtype)
    void = random_void()
    pixels = unpack_bits(void, 45)[:, None]  # [B, 1, H, W]
    other = masks.where(~pixels, 1 - masks)
    results = []
    for x, m in ((logits, masks), (logits.masked_fill(pixels[:, None], float("nan")), other)):
        x = x.requires_grad_()
        loss = point_mask_loss(x, m, *rest, 400, 3.0, 0.75, void, impl)
        results.append((*loss, *torch.autograd.grad(loss[0].sum() + loss[1].sum(), x)))
    for a, b in zip(*results):
        assert torch.equal(a, b)
    grad = results[0][2]
    assert (grad.masked_select(pixels[:, None]) == 0).all()
    assert (grad != 0).any()


def test_void_of_no_pixel_changes_no_bit():
    inputs, results = point_mask_loss_inputs(), []
    inputs[0].requires_grad_()
    for void in (None, random_void(share=0.0)):
        loss = point_mask_loss(*inputs, *FEW, void)
        results.append((*loss, *torch.autograd.grad(loss[0].sum() + loss[1].sum(), inputs[0])))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_as_many_points_as_in_the_paper():
    compare(
        point_mask_loss,
        point_mask_loss_reference,
        point_mask_loss_inputs(B=1, R=1, T=2, dtype=torch.float64),
        [0],
    )


LARGE = {
    "map, float32": ({"h": 300, "w": 200, "H": 10, "W": 12}, FEW, torch.float32),
    "map, float64": ({"h": 300, "w": 200, "H": 10, "W": 12}, FEW, torch.float64),
    "wide map": ({"h": 2, "w": 20000}, FEW, torch.float32),
    "tall map": ({"h": 20000, "w": 2}, FEW, torch.float32),
    "points": ({}, (40000, 3.0, 0.75), torch.float64),
}


@pytest.mark.parametrize("case", LARGE)
def test_more_than_fits_in_the_shared_memory_of_a_gpu(case):
    sizes, settings, dtype = LARGE[case]
    inputs = [*point_mask_loss_inputs(**{"B": 1, "R": 1, "T": 1, **sizes}, dtype=dtype), *settings]
    inputs[2][:] = True
    compare(point_mask_loss, point_mask_loss_reference, inputs, [0])


LESS = {  # settings whose list of important points alone is larger than 99 KB
    "usual": FEW,
    "points without halves of keys": (61400, 3.0, 0.75),
    "important points": (52000, 1.0, 0.95),
}


@pytest.mark.parametrize("kilobytes", [99, 163])
@pytest.mark.parametrize("case", LESS)
def test_gpus_with_less_shared_memory(case, kilobytes, monkeypatch):
    monkeypatch.setenv("SEGKERN_SHARED_KB", str(kilobytes))  # read by the emulated kernels alone
    inputs = [*point_mask_loss_inputs(B=1, R=1, T=1, dtype=torch.float64), *LESS[case]]
    inputs[2][:] = True
    compare(point_mask_loss, point_mask_loss_reference, inputs, [0])


def test_gradcheck():
    sizes = {"B": 1, "R": 2, "T": 2, "h": 3, "w": 4}
    logits, *rest = point_mask_loss_inputs(**sizes, dtype=torch.float64)
    rest[1][:] = True

    def losses(x):  # all random: the choice of points does not move with the logits
        return point_mask_loss(x, *rest, 30, 1.0, 0.0)

    assert torch.autograd.gradcheck(losses, logits.requires_grad_())


def test_opcheck():
    inputs = point_mask_loss_inputs()
    torch.library.opcheck(torch.ops.segkern.point_mask_loss, (*inputs, 120, 30, 10))
    kept = torch.ops.segkern.point_mask_loss(*inputs, 120, 30, 10)[2:]
    grads = torch.randn(2, 2, 3, 4).unbind()
    arguments = (*grads, *kept, *inputs, 120, 30, 10)
    torch.library.opcheck(torch.ops.segkern.point_mask_loss_backward, arguments)
    cells = void_cells(random_void(), 45)
    torch.library.opcheck(torch.ops.segkern.point_mask_loss, (*inputs, 120, 30, 10, cells))
    arguments = (*arguments, cells)
    torch.library.opcheck(torch.ops.segkern.point_mask_loss_backward, arguments)


def test_compile():
    (logits, *rest), void = point_mask_loss_inputs(), random_void()
    logits.requires_grad_()

    def loss(x):
        return sum(v.sum() for v in point_mask_loss(x, *rest, *FEW, void))

    out = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(out, loss(logits))
    torch.testing.assert_close(
        torch.autograd.grad(out, logits), torch.autograd.grad(loss(logits), logits)
    )


BAD = {
    "logits 4-d": (
        lambda i: i.__setitem__(0, i[0][0]),
        ValueError,
        r"mask_logits must be \[B, R, T, h, w\]",
    ),
    "logits int": (
        lambda i: i.__setitem__(0, i[0].long()),
        TypeError,
        "mask_logits must be .* float",
    ),
    "masks float": (
        lambda i: i.__setitem__(1, i[1].float()),
        TypeError,
        "masks must be .* bool or uint8",
    ),
    "masks of other T": (
        lambda i: i.__setitem__(1, i[1][:, 1:]),
        ValueError,
        "masks must be .* T = 4",
    ),
    "active int": (lambda i: i.__setitem__(2, i[2].long()), TypeError, "active must be .* bool"),
    "ids of other batch": (
        lambda i: i.__setitem__(3, i[3][:1]),
        ValueError,
        "sample_ids must be .* B = 2",
    ),
    "seed of two": (lambda i: i.__setitem__(4, i[4].repeat(2)), ValueError, r"seed must be \[1\]"),
    "no points": (lambda i: i.append(0), ValueError, "num_points must be >= 1, got 0"),
    "undersampling": (
        lambda i: i.extend([10, 0.5]),
        ValueError,
        "oversample_ratio must be >= 1, got 0.5",
    ),
    "void bool": (
        lambda i: i.extend([*FEW, torch.zeros(2, 31, 2, dtype=torch.bool)]),
        TypeError,
        r"void must be \[B, H, ceil\(W/32\)\] int32, got \[2, 31, 2\] bool",
    ),
    "void of other W": (
        lambda i: i.extend([*FEW, random_void(W=65)]),
        ValueError,
        r"void must be .* with B = 2, H = 31, ceil\(W/32\) = 2, got \[2, 31, 3\]",
    ),
    "importance": (lambda i: i.extend([10, 3, 1.5]), ValueError, r"must be in \[0, 1\], got 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    inputs = point_mask_loss_inputs()
    change(inputs)
    with pytest.raises(error, match=message):
        point_mask_loss(*inputs)


@pytest.mark.parametrize(
    "sizes", [{"B": 0}, {"R": 0}, {"T": 0}], ids=["no image", "no prediction", "no target"]
)
def test_empty(sizes):
    inputs = point_mask_loss_inputs(**sizes)
    for loss in point_mask_loss(*inputs, *FEW):
        assert loss.shape == inputs[2].shape


def test_inactive_slots_are_zero_and_not_read():
    logits, masks, active, *rest = point_mask_loss_inputs()
    want = point_mask_loss(logits, masks, active, *rest, *FEW)
    logits = logits.where(active[..., None, None], float("nan")).requires_grad_()
    got = point_mask_loss(logits, masks, active, *rest, *FEW)
    for g, w in zip(got, want):
        assert torch.equal(g, w)
        assert (g[~active] == 0).all()
    (grad,) = torch.autograd.grad(sum(g.sum() for g in got), logits)
    assert (grad[~active] == 0).all()
    assert (grad[active] != 0).any()


@pytest.mark.parametrize("n", [40, 4000])
def test_ties_go_to_the_point_drawn_first(n):
    logits, masks, active, ids, seed = point_mask_loss_inputs(B=1, R=1, T=1, dtype=torch.float64)
    flat, active = torch.zeros_like(logits), torch.ones_like(active)  # every sample is exactly 0
    points = random_points(seed, torch.stack((ids, ids * 0, ids * 0), -1), 3 * n + n // 4)
    chosen = torch.cat((points[:, : 3 * n // 4], points[:, 3 * n :]), 1).double()
    t = point_sample_reference(masks.double(), chosen)
    want = 1 - (t.sum() + 1) / (n / 2 + t.sum() + 1)
    got = point_mask_loss(flat, masks, active, ids, seed, n, 3.0, 0.75)[1]
    torch.testing.assert_close(got.squeeze(), want, rtol=1e-12, atol=0)


def test_a_slot_does_not_depend_on_the_batch():
    logits, masks, active, ids, seed = point_mask_loss_inputs()
    swapped = [x.flip(0) for x in (logits, masks, active, ids)]
    for got, want in zip(
        point_mask_loss(*swapped, seed, *FEW),
        point_mask_loss(logits, masks, active, ids, seed, *FEW),
    ):
        assert torch.equal(got.flip(0), want)


def test_non_contiguous_and_bool_masks():
    logits, masks, *rest = point_mask_loss_inputs()
    want = point_mask_loss(logits, masks, *rest, *FEW)
    strided = logits.transpose(3, 4).contiguous().transpose(3, 4)
    got = point_mask_loss(
        strided, masks.bool().transpose(2, 3).contiguous().transpose(2, 3), *rest, *FEW
    )
    for g, w in zip(got, want):
        assert torch.equal(g, w)


def test_seed_may_advance_before_the_gradient_is_taken():
    logits, *rest, seed = point_mask_loss_inputs(dtype=torch.float64)
    logits.requires_grad_()
    (want,) = torch.autograd.grad(point_mask_loss(logits, *rest, seed, *FEW)[0].sum(), logits)
    loss = point_mask_loss(logits, *rest, seed, *FEW)[0].sum()
    seed += 1
    assert torch.equal(torch.autograd.grad(loss, logits)[0], want)


def test_nan_logits_give_nan_losses():
    logits, masks, active, *rest = point_mask_loss_inputs(dtype=torch.float32)
    active[0, 0, 0] = True
    logits[0, 0, 0] = float("nan")
    assert point_mask_loss(logits, masks, active, *rest, *FEW)[0][0, 0, 0].isnan()


def gradient(logits, *rest, scale=1.0):
    logits = logits.detach().requires_grad_()
    bce, dice = point_mask_loss(logits, *rest, *FEW)
    return torch.autograd.grad(scale * (bce + 2 * dice).sum(), logits)[0]


def test_gradient_of_nan_is_nan_where_it_is_used():
    logits, masks, active, *rest = point_mask_loss_inputs()
    active[0, 0, 0] = True
    want = gradient(logits, masks, active, *rest)
    logits[0, 0, 0] = float("nan")
    got = gradient(logits, masks, active, *rest)
    assert got[0, 0, 0].isnan().sum() >= (want[0, 0, 0] != 0).sum() / 2
    got[0, 0, 0] = want[0, 0, 0]
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_has_the_scale_of_the_loss(dtype):
    inputs = point_mask_loss_inputs(dtype=dtype)
    want = gradient(*inputs)
    assert torch.equal(want, gradient(*inputs))
    for scale in (2.0**-60, 2.0**60):
        assert torch.equal(gradient(*inputs, scale=scale), want * scale)
    assert (gradient(*inputs, scale=0.0) == 0).all()


RAW = {
    "masks of another batch": (1, lambda m: m[:1], "wrong sizes"),
    "active of other T": (2, lambda a: a[:, :, 1:], "wrong sizes"),
    "masks int64": (1, lambda m: m.long(), "wrong dtype"),
    "cells of other H": (8, lambda c: c[:, 1:], "wrong cells"),
    "more important than drawn": (6, lambda k: 200, "more important points than candidates"),
}


@pytest.mark.parametrize("case", RAW)
def test_raw_op_does_not_leave_its_tensors(case):
    place, change, message = RAW[case]
    arguments = [*point_mask_loss_inputs(), 120, 30, 10, void_cells(random_void(), 45)]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.segkern.point_mask_loss(*arguments)


def test_backward_may_get_any_marks():
    """More marks than points: what is too much is left out, nothing is written beside."""
    inputs = point_mask_loss_inputs()
    bce, dice, sums, marks, packed = torch.ops.segkern.point_mask_loss(*inputs, 120, 30, 10)
    arguments = (bce, dice, sums, marks.fill_(-1), packed, *inputs, 120, 30, 10)
    grad = torch.ops.segkern.point_mask_loss_backward(*arguments)
    assert grad.isfinite().all()


@pytest.mark.parametrize("W", [45, 48], ids=["odd", "whole"])
def test_a_gpu_packs_the_masks_once(W):
    """Forward leaves their bits, tiles of 4 x 8 pixels; backward reads nothing else of them."""
    logits, masks, active, *rest = point_mask_loss_inputs(W=W)
    masks = masks * torch.tensor([1, 2, 128, 255], dtype=torch.uint8)[:, None, None]
    active[:, :, 1] = False
    arguments = (logits, masks, active, *rest, 120, 30, 10)
    bce, dice, *kept = torch.ops.segkern.point_mask_loss(*arguments)
    if kept[2].numel() == 0:  # the C++ kernel, which reads them as they are
        assert logits.device.type == "cpu"
        return
    pixels = torch.nn.functional.pad(masks != 0, (0, -W % 8, 0, -31 % 4))
    tiles = pixels.unflatten(3, (-1, 8)).unflatten(2, (-1, 4)).transpose(3, 4).flatten(4)
    words = (tiles.long() << torch.arange(32)).sum(-1)
    read = active.any(1)
    assert torch.equal(kept[2][read].long() & 0xFFFFFFFF, words[read])
    grads = torch.ones_like(bce), torch.ones_like(dice)
    want = torch.ops.segkern.point_mask_loss_backward(*grads, *kept, *arguments)
    masks.fill_(7)
    assert torch.equal(torch.ops.segkern.point_mask_loss_backward(*grads, *kept, *arguments), want)


def test_half_maps_choose_the_points_of_their_values():
    logits, *rest = point_mask_loss_inputs(dtype=torch.bfloat16)
    for got, want in zip(
        point_mask_loss(logits, *rest, *FEW), point_mask_loss(logits.float(), *rest, *FEW)
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
