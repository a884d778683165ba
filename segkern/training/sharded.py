"""Models of which each process holds a part: weights, gradients and the optimizer's state.

    unit     what is gathered together when its turn comes: a block of a backbone, an encoder or a
             decoder; what is in none of them is gathered for the whole step
    gradient as in `parallel`, of which each process then holds its part

Source: FSDP2 of torch (`fully_shard`); ZeRO (Rajbhandari et al., SC 2020), its third stage.
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..runtime.processes import Processes


def units(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model: entries of lists of modules that have parts with weights, the
    innermost ones, without those whose weights are read from outside (`read_from_outside`)."""
    blocks = {
        id(block): block
        for group in model.modules()
        if isinstance(group, (nn.ModuleList, nn.Sequential))
        for block in group
        if not isinstance(block, (nn.ModuleList, nn.Sequential))
        and any(next(part.parameters(), None) is not None for part in block.children())
    }
    for block in blocks.values():
        inner = any(id(part) in blocks for part in block.modules() if part is not block)
        if not inner and not getattr(block, "read_from_outside", False):
            yield block


def shard(model: nn.Module, processes: Processes) -> None:
    """Leaves each process a part of a model's weights, in place; called by all.

    Its parameters become `DTensor`, and calls of its blocks and of itself gather them.

    Args:
        model: on this process's device; the weights of the first process are taken.
        processes: of the run.
    """
    device = next(model.parameters()).device.type
    model.to(memory_format=torch.contiguous_format)  # no other layout can be cut
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)
    mesh = init_device_mesh(device, (processes.count,))
    for unit in units(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def to_fill(model: nn.Module) -> nn.Module:
    """A copy of a model on the CPU, in whose weights is anything: `fill` writes them, and until
    then they take no memory."""
    weights = {
        id(p): nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
        for p in model.parameters()
    }
    return deepcopy(model, weights).cpu()


def fill(whole: nn.Module, model: nn.Module) -> nn.Module:
    """Writes the weights of a model of which each process holds a part into a whole one; called
    by all."""
    whole.load_state_dict({name: _whole(part) for name, part in model.state_dict().items()})
    return whole


def _whole(value):
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
