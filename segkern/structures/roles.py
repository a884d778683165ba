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
    """

    backbone: bool
    decayed: bool
    matrix: bool


def parameter_roles(
    model: nn.Module,
    backbone: nn.Module,
    blocks: Iterable[nn.Module],
    undecayed: Iterable[Tensor] = (),
) -> dict[str, Role]:
    """The roles of all parameters of a model, by name, in the model's order.

    Args:
        model: whose parameters.
        backbone: its part that starts from pretrained weights.
        blocks: its parts whose linear layers are matrices.
        undecayed: parameters that do not decay, besides those of norms and embeddings.
    """
    of_backbone = {id(p) for p in backbone.parameters()}
    matrices = {
        id(m.weight) for part in blocks for m in part.modules() if isinstance(m, nn.Linear)
    }
    free = {id(p) for p in undecayed}
    for module in model.modules():
        if isinstance(module, (*_NORMS, nn.Embedding)):
            free |= {id(p) for p in module.parameters(recurse=False)}
    return {
        name: Role(id(p) in of_backbone, id(p) not in free, id(p) in matrices)
        for name, p in model.named_parameters()
    }
