"""Binary cross entropy of pixels against PyTorch's, which forms the truth of every class."""

import pytest
import torch
import torch.nn.functional as F

from segkern.nn import pixel_bce as module
from segkern.nn.pixel_bce import pixel_bce


def inputs(K=4, dtype=torch.float64, void=255):
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, K, 9, 12, generator=g, dtype=torch.float64)
    labels = torch.randint(K, (2, 7, 11), generator=g)
    labels[:, ::3, ::2] = void
    return logits.to(dtype).requires_grad_(), labels


def plain(logits, labels, void=255):
    """Mean over classes of labelled pixels."""
    z = logits[:, :, : labels.shape[1], : labels.shape[2]].movedim(1, -1)[labels != void]
    truth = F.one_hot(labels[labels != void], logits.shape[1]).to(z.dtype)
    return F.binary_cross_entropy_with_logits(z, truth)


@pytest.mark.parametrize("rows", [1, 3, 100], ids=lambda n: f"{n} rows at once")
@pytest.mark.parametrize(("K", "void"), [(1, 255), (4, 255), (300, 65535)], ids=str)
def test_value_and_gradient_are_pytorchs(K, void, rows, monkeypatch):
    monkeypatch.setattr(module, "rows_at_once", lambda *_: rows)
    logits, labels = inputs(K, void=void)
    found, wanted = pixel_bce(logits, labels), plain(logits, labels, void)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(2 * x, logits)[0] for x in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-16)


def test_the_sum_is_divided_by_what_is_given():
    logits, labels = inputs()
    count = (labels != 255).sum()
    torch.testing.assert_close(
        pixel_bce(logits, labels, torch.tensor(17.0)), plain(logits, labels) * count / 17
    )


def test_without_labelled_pixels_it_is_nothing():
    logits, labels = inputs()
    loss = pixel_bce(logits, torch.full_like(labels, 255))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_no_number(label):
    logits, labels = inputs()
    labels[0, 0, 1] = label
    loss = pixel_bce(logits, labels)
    loss.backward()
    assert loss.isnan()
    assert logits.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_precisions_sum_in_float32(dtype):
    logits, labels = inputs(dtype=dtype)
    loss = pixel_bce(logits, labels)
    exact = plain(logits.detach().double(), labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
