"""Roles of parameters: which belong to the backbone, which decay, which are matrices."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class Role(NamedTuple):
    """Of a parameter.

    Attributes:
        backbone: belongs to the part that starts from pretrained weights.
        decayed: weight decay is for it.
        matrix: the weight of a linear layer inside a block, which Muon may step.
        depth: levels of the backbone between it and the backbone's end; 0 elsewhere.
    """

    backbone: bool
    decayed: bool
    matrix: bool
    depth: int = 0


def parameter_roles(
    model: nn.Module,
    backbone: nn.Module,
    blocks: Iterable[nn.Module],
    undecayed: Iterable[Tensor] = (),
) -> dict[str, Role]:
    """The roles of all parameters of a model, by name, in the model's order.

    Args:
        model: whose parameters.
        backbone: its part that starts from pretrained weights; `levels`, where it has them, are
            the names in it of the modules at which its levels end, in order.
        blocks: its parts whose linear layers are matrices.
        undecayed: parameters that do not decay, besides those of norms and embeddings.
    """
    depths = _depths(backbone)
    matrices = {
        id(m.weight) for part in blocks for m in part.modules() if isinstance(m, nn.Linear)
    }
    free = {id(p) for p in undecayed}
    for module in model.modules():
        if isinstance(module, (*_NORMS, nn.Embedding)):
            free |= {id(p) for p in module.parameters(recurse=False)}
    return {
        name: Role(id(p) in depths, id(p) not in free, id(p) in matrices, depths.get(id(p), 0))
        for name, p in model.named_parameters()
    }


def _depths(backbone: nn.Module) -> dict[int, int]:
    """Of each parameter of a backbone, by its id, how many levels come after its own.

    Parameters stand in the order of the network, so that one belongs to the level that ends next;
    those after the last end belong to the last level.
    """
    parameters = list(backbone.named_parameters())
    ends = [
        max(i for i, (name, _) in enumerate(parameters) if name.startswith(f"{level}."))
        for level in getattr(backbone, "levels", ())
    ]
    return {
        id(p): max(0, sum(end >= i for end in ends) - 1) for i, (_, p) in enumerate(parameters)
    }
