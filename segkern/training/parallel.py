"""A step in several processes: each on its part of the batch, with the gradients of all.

    gradient = mean over processes of the gradients of each

What the losses divide by is agreed on before the step (`distributed.together`), so that this mean
is the gradient of the joined batch.
"""

import contextlib
from collections.abc import Iterator
from inspect import signature

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ..runtime.processes import Processes

# before a capture in a CUDA graph: in the first of them DDP builds its buckets and NCCL connects
WARMUP = 11


def replicated(loss: nn.Module) -> DistributedDataParallel:
    """The loss of a model that every process holds, whose backward joins the gradients of all.

    Args:
        loss: on this process's device; the weights of the first process are taken by all.
    """
    known = signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options = {buffers: False, "gradient_as_bucket_view": True}  # they differ by version of torch
    if not next(loss.parameters()).is_cuda:
        return DistributedDataParallel(loss, **options)
    # made on another stream than the default one, it can be captured in a CUDA graph
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        loss = DistributedDataParallel(loss, **options)
    current.wait_stream(side)
    return loss


@contextlib.contextmanager
def joining(loss: nn.Module, now: bool) -> Iterator[None]:
    """Inside, a backward joins the gradients of all processes, or, for the earlier parts of a
    batch, adds to this process's own."""
    if hasattr(loss, "set_requires_gradient_sync"):  # an FSDPModule, which takes long to import
        loss.set_requires_gradient_sync(now)
    apart = isinstance(loss, DistributedDataParallel) and not now
    with loss.no_sync() if apart else contextlib.nullcontext():
        yield


class RunningStatistics:
    """The statistics that batch norms keep for inference: the mean of those of all processes.

    Args:
        model: in training mode.
        processes: of the run.
    """

    def __init__(self, model: nn.Module, processes: Processes):
        self.count, self.kept = processes.count, []
        for norm in model.modules():
            if isinstance(norm, _BatchNorm) and norm.training and norm.running_mean is not None:
                self.kept += [norm.running_mean, norm.running_var]

    @torch.no_grad()
    def join(self) -> None:
        """Called by all, after a step."""
        if not self.kept or self.count == 1:
            return
        found = torch.cat([x.flatten() for x in self.kept])
        dist.all_reduce(found)
        parts = (found / self.count).split([x.numel() for x in self.kept])
        torch._foreach_copy_(self.kept, [x.view_as(y) for x, y in zip(parts, self.kept)])


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, where it is a DTensor of several; in its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def reseed(seed: int, step: int, rank: int) -> None:
    """Seeds what a process draws in a step, such as dropout, unless it is the first, whose
    generators go on as those of one process: each draws other numbers, and a resumed run has them
    again."""
    if rank:
        (mixed,) = np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed >> 1))
