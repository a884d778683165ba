"""Optimizers, their parameter groups, and schedules of the learning rate."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MuonAndAdamW:
    """Muon for the matrices of the blocks, AdamW for all else, as one optimizer.

    Both take the same rate: Muon's steps are scaled to the size of AdamW's. Its rate is a number
    of the host, so that its step is no part of a CUDA graph.
    Source: Muon (Jordan et al., 2024), as torch.optim has it; the scale: Liu et al., 2025.

    Args:
        groups: of `parameter_groups`; those with "matrices" go to Muon.
        momentum: of Muon.
    """

    def __init__(self, groups: list[dict], momentum: float):
        capturable = groups[0]["params"][0].is_cuda
        hidden = [group | {"lr": group["lr"].cpu()} for group in groups if group["matrices"]]
        rest = [group for group in groups if not group["matrices"]]
        self.parts = []  # one alone where the parameters of the other are frozen
        if hidden:
            muon = torch.optim.Muon(hidden, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        if rest:
            self.parts.append(torch.optim.AdamW(rest, fused=True, capturable=capturable))

    @property
    def param_groups(self) -> list[dict]:
        """Of both."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer of torch."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        """Of both, each on its own parameters."""
        for part in self.parts:
            part.step()


def build_optimizer(model: nn.Module, config) -> torch.optim.Optimizer | MuonAndAdamW:
    """The optimizer of a `TrainConfig`; its rates are tensors."""
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        whole = not hasattr(groups[0]["params"][0], "to_local")  # none is fused for DTensor
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=whole or None)
    if config.optimizer == "muon":
        return MuonAndAdamW(groups, config.momentum)
    capturable = groups[0]["params"][0].is_cuda
    return torch.optim.AdamW(groups, fused=True, capturable=capturable)


def freeze(model: nn.Module, parts: Sequence[str]) -> list[nn.Parameter]:
    """Takes parts of a model out of training: no gradients, and the mode of evaluation.

    Args:
        model: in training mode.
        parts: names of modules in it.

    Returns:
        the parameters that had gradients before, for who wants to give them back.

    Raises:
        ValueError: no such part, or nothing is left to train.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for name in parts:
        if name not in dict(model.named_modules()) or not name:
            known = [name for name, part in model.named_children() if [*part.parameters()]]
            raise ValueError(
                f"train: freeze must name parts of the model: {', '.join(known)}, or parts of "
                f"these, got {name!r}"
            )
        model.get_submodule(name).requires_grad_(False).eval()
    frozen = [p for p in trained if not p.requires_grad]
    if len(frozen) == len(trained):
        raise ValueError(f"train: freeze must leave a part to train, got {', '.join(parts)}")
    return frozen


def parameter_groups(model: nn.Module, config) -> list[dict]:
    """Parameters by rate and decay, as `model.parameter_roles` has them; for Muon the matrices
    are groups of their own."""
    roles = model.parameter_roles()
    groups: dict[tuple[float, float, bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        role = roles[name]
        factor = config.backbone_lr_factor if role.backbone else 1.0
        factor *= config.backbone_level_decay**role.depth
        decay = config.weight_decay if role.decayed else 0.0
        matrix = role.matrix and config.optimizer == "muon"
        if parameter.requires_grad:
            later = role.backbone and config.backbone_warmup > 0
            key = factor, decay, matrix, later
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": decay,
            "factor": factor,
            "matrices": matrices,
            "later": later,
            "lr": torch.tensor(config.lr * factor, device=parameters[0].device),
        }
        for (factor, decay, matrices, later), parameters in groups.items()
    ]


def backbone_share(step: int, config) -> float:
    """Share of its rate that the backbone has at a step, from 0."""
    if not config.backbone_warmup:
        return 1.0
    return min(max((step + 1 - config.warmup) / config.backbone_warmup, 0.0), 1.0)


def learning_rate(step: int, config) -> float:
    """The learning rate of a `TrainConfig` at a step, from 0."""
    share = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    gone = step / config.steps
    if config.schedule == "cosine":
        share *= 0.5 * (1 + math.cos(math.pi * gone))
    elif config.schedule == "poly":
        share *= (1 - gone) ** config.power
    elif config.schedule == "thirds":
        share *= 0.1 if gone >= 2 / 3 else 0.5 if gone >= 1 / 3 else 1.0
    else:
        share *= 0.1 ** ((gone >= 8 / 9) + (gone >= 26 / 27))
    return config.min_lr + (config.lr - config.min_lr) * share
