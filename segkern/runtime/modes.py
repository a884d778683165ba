"""A model in evaluation mode, without a change to the model, which others may be using."""

from types import MethodType

import torch
from torch import nn

_SHARED = nn.Module().__dict__.keys() - {"_modules"}  # parameters, buffers, hooks


def evaluated(model: nn.Module) -> nn.Module:
    """The model in evaluation mode: itself, where all of it is, or else a view of it.

    A view has module objects of its own, and shares all that they hold: parameters, buffers and
    hooks, also those that come or change later. So threads may train, and evaluate, one model at
    the same time. It is made anew for each use, in a few milliseconds, as the modules' settings
    may have changed.

    Args:
        model: in whatever mode. What torch.compile made of a module runs as that module.

    Raises:
        ValueError: a part that torch.jit compiled, of which there is no view, is in training mode.
    """
    own = list(model.modules())
    if not any(m.training for m in own):
        return model
    scripted = [m for m in own if isinstance(m, torch.jit.ScriptModule)]
    if any(m.training for m in scripted):
        raise ValueError(
            "the model holds modules that torch.jit compiled, which show no other mode than their "
            "own: call model.eval() first"
        )
    twins = {m: object.__new__(type(m)) for m in own if m not in scripted and m is _made_of(m)}
    for module, twin in twins.items():
        held = module.__dict__
        turned = {name: _within(held[name], twins) for name in held.keys() - _SHARED}
        # what torch.compile put in the place of a call runs the module that it was made of
        twin.__dict__.update(held | turned, training=False, _compiled_call_impl=None)
    return twins[_made_of(model)]


def _made_of(module: nn.Module) -> nn.Module:
    """The module itself, or that which `torch.compile(module)` was given."""
    while type(module).__name__ == "OptimizedModule":  # whose package takes long to import
        module = module._orig_mod
    return module


def _within(value, twins: dict[nn.Module, nn.Module]):
    """A value of a module as its twin holds it: modules and bound methods are the twins'."""
    if isinstance(value, nn.Module):
        return twins.get(_made_of(value), value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _within(value.__self__, twins))
    if type(value) in (list, tuple) and any(isinstance(x, nn.Module) for x in value):
        return type(value)(_within(x, twins) for x in value)
    if type(value) is dict and any(isinstance(x, nn.Module) for x in value.values()):
        return {name: _within(x, twins) for name, x in value.items()}
    return value
