"""What a model's `forward` returns: an object with Hugging Face's manners, made of tensors that
DDP, FSDP and compile find."""

from dataclasses import dataclass, fields

from torch.utils import _pytree as pytree


def output(cls: type) -> type:
    """A dataclass whose values that are not None are also found by name and by place.

    `out.loss`, `out["loss"]` and `out[0]` are one; `loss, logits = out` takes all of them, as
    `out.to_tuple()`; `keys`, `values` and `items` are those of a dict. What wraps a model sees its
    tensors: as one opaque value DDP would not average their gradients.
    """
    cls = dataclass(cls)
    cls.__getitem__ = _getitem
    cls.__contains__ = lambda out, name: name in _given(out)
    cls.__len__ = lambda out: len(_given(out))
    cls.keys = lambda out: _given(out).keys()
    cls.values = lambda out: _given(out).values()
    cls.items = lambda out: _given(out).items()
    cls.to_tuple = lambda out: tuple(_given(out).values())
    pytree.register_dataclass(cls)
    return cls


def _given(out) -> dict:
    values = {field.name: getattr(out, field.name) for field in fields(out)}
    return {name: value for name, value in values.items() if value is not None}


def _getitem(out, key):
    given = _given(out)
    return given[key] if isinstance(key, str) else tuple(given.values())[key]
