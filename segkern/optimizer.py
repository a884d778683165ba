"""What a training step does with the gradient: optimizers, parameter groups, schedules."""

import math

import torch
from torch import Tensor, nn


def build_optimizer(model: nn.Module, config) -> torch.optim.Optimizer:
    """The optimizer of a `TrainConfig`; its rates are tensors on the device."""
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    capturable = groups[0]["params"][0].is_cuda
    return torch.optim.AdamW(groups, fused=True, capturable=capturable)


def parameter_groups(model: nn.Module, config) -> list[dict]:
    """Parameters by rate and decay: norms, embeddings and position tables do not decay."""
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.Embedding)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            free = isinstance(module, norms) or name == "relative_position_bias_table"
            decay = 0.0 if free else config.weight_decay
            factor = config.backbone_lr_factor if path.startswith("backbone") else 1.0
            if parameter.requires_grad:
                groups.setdefault((factor, decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": decay,
            "factor": factor,
            "lr": torch.tensor(config.lr * factor, device=parameters[0].device),
        }
        for (factor, decay), parameters in groups.items()
    ]


def learning_rate(step: int, config) -> float:
    """The learning rate of a `TrainConfig` at a step, from 0."""
    share = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    gone = step / config.steps
    if config.schedule == "cosine":
        share *= 0.5 * (1 + math.cos(math.pi * gone))
    elif config.schedule == "poly":
        share *= (1 - gone) ** 0.9
    else:
        share *= 0.1 ** ((gone >= 8 / 9) + (gone >= 26 / 27))
    return config.min_lr + (config.lr - config.min_lr) * share
