"""Norms over the images of all processes, while they train; what two compute is in
test_many_processes.py."""

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

from segkern.runtime.processes import Processes
from segkern.training.batch_norm import synchronised


def test_in_evaluation_each_process_is_by_itself():
    """Of the model and of copies of it, whose statistics are their own: without a group, moments
    over all would be an error here."""
    model, x = nn.Sequential(nn.BatchNorm2d(3)), torch.randn(2, 3, 4, 4)
    with synchronised(model, Processes(0, 2)):
        copied = deepcopy(model).eval()
        copied[0].running_mean += 1
        model.eval()
        for one in (model, copied):
            want = F.batch_norm(x, one[0].running_mean, one[0].running_var, eps=one[0].eps)
            assert torch.allclose(one(x), want)
        assert not torch.allclose(model(x), copied(x))
    assert "forward" not in vars(model[0])
