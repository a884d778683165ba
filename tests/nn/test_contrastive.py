"""The contrastive loss: its formula, and two processes that give what one gives."""

import pytest
import torch
import torch.nn.functional as F

from segkern.nn.contrastive import ContrastiveLoss
from support.processes import in_two_processes


def batch(part=slice(None)):
    data = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(3)).double()
    return (x[part].clone().requires_grad_() for x in data)


def contrasted(rank=None):
    """The loss of a process's part of a batch, of all of it for None, and its gradients."""
    queries, texts = batch() if rank is None else batch(slice(2 * rank, 2 * rank + 2))
    loss = ContrastiveLoss().double()
    value = loss(queries, texts)
    value.backward()
    return value.item(), queries.grad.tolist(), texts.grad.tolist(), loss.logit_scale.grad.item()


def test_it_is_the_mean_cross_entropy_both_ways():
    queries, texts = batch()
    cosine = F.cosine_similarity(queries.flatten(1)[:, None], texts.flatten(1)[None], dim=2)
    logs = cosine / 0.07
    want = -(logs.log_softmax(1).diagonal() + logs.log_softmax(0).diagonal()).mean()
    assert ContrastiveLoss(0.07).double()(queries, texts).item() == pytest.approx(
        want.item(), 1e-7
    )


def test_the_scale_is_at_most_100():
    loss = ContrastiveLoss()
    at_most = []
    for log in (4.7, 9.0):
        loss.logit_scale.data.fill_(log)
        at_most.append(loss(*(x.float() for x in batch())).item())
    assert at_most[0] == at_most[1]


def test_half_precision_is_compared_in_float32():
    queries, texts = (x.bfloat16() for x in batch())
    with torch.autocast("cpu", torch.bfloat16):
        found = ContrastiveLoss()(queries, texts)
    assert found.dtype == torch.float32
    assert found.item() == ContrastiveLoss()(queries.float(), texts.float()).item()


def test_two_processes_give_the_loss_and_gradients_of_their_joined_batch(tmp_path):
    value, *gradients, of_scale = contrasted()
    found = in_two_processes(contrasted, tmp_path)
    parts = [found[rank] for rank in (0, 1)]
    assert (parts[0][0] + parts[1][0]) / 2 == pytest.approx(value, rel=1e-12)
    # DDP takes the mean over processes; an image's own gradient is in its process alone
    for i, want in enumerate(gradients, 1):
        have = torch.tensor(parts[0][i] + parts[1][i]) / 2
        torch.testing.assert_close(have, torch.tensor(want))
    assert (parts[0][3] + parts[1][3]) / 2 == pytest.approx(of_scale, rel=1e-12)


def test_in_evaluation_a_process_waits_for_no_other(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    loss = ContrastiveLoss().double()
    with pytest.raises(ValueError, match="process group"):
        loss(*batch())
    assert loss.eval()(*batch()).item() == pytest.approx(contrasted_before(loss), rel=1e-12)


def contrasted_before(loss):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.is_initialized", lambda: False)
        return loss(*batch()).item()
