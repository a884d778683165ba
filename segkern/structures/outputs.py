"""What a model's `forward` returns: a dict with Hugging Face's manners, whose tensors DDP, FSDP
and compile find.

Letters: B image, Q query, K class, M channels, h w size of the maps.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ops.upscale import masks_of


class Product(NamedTuple):
    """Mask logits that no one has read yet.

    Attributes:
        embeddings: [B, Q, M].
        features: [B, M, h, w].
    """

    embeddings: Tensor
    features: Tensor

    def tensor(self) -> Tensor:
        """[B, Q, h, w]."""
        return masks_of(self.embeddings, self.features.permute(0, 2, 3, 1))


class Resized(NamedTuple):
    """Class logits of pixels that no one has read yet.

    Attributes:
        maps: [B, K, h, w].
        size: (H, W) that they are resized to, bilinearly.
        image: (H, W), at most that, of which pixels there are.
    """

    maps: Tensor
    size: tuple[int, int]
    image: tuple[int, int]

    def tensor(self) -> Tensor:
        """[B, K, *image]."""
        H, W = self.image
        return F.interpolate(self.maps, size=self.size, mode="bilinear")[:, :, :H, :W]


def output(cls: type[dict]) -> type[dict]:
    """Makes a dataclass of a dict, which holds those of its fields that are not None.

    `out.loss`, `out["loss"]` and `out[0]` are one, `out[:2]` are the first two, and
    `out.to_tuple()` are all; iterated are the names, as of any dict. A `Product` or `Resized` is
    computed when it is first read, by whichever way. What wraps a model sees the tensors: in one
    opaque value DDP would not find what to average.

    Args:
        cls: its fields are None by default.
    """
    cls = dataclass(init=False, eq=False)(cls)
    for field in fields(cls):
        setattr(cls, field.name, _property(field.name))
    for method in (_init, _getitem, _setitem, _iter, _len, _contains, _reduce):
        setattr(cls, f"__{method.__name__[1:]}__", method)
    cls.to_tuple = lambda out: tuple(out.values())
    for name in ("keys", "values", "items", "get"):
        setattr(cls, name, getattr(Mapping, name))
    for name in ("pop", "popitem", "setdefault", "update", "clear", "__delitem__"):
        setattr(cls, name, _refuse)
    for name in ("__eq__", "__ne__", "__hash__"):  # tensors are not compared
        setattr(cls, name, getattr(object, name))
    pytree.register_pytree_node(
        cls,
        lambda out: (list(_given(out).values()), list(_given(out))),
        lambda values, names: cls(zip(names, values)),
        serialized_type_name=f"segkern.{cls.__name__}",
        flatten_with_keys_fn=lambda out: (
            [(pytree.MappingKey(name), value) for name, value in _given(out).items()],
            list(_given(out)),
        ),
    )
    return cls


def returned(out: dict, return_dict: bool | None) -> dict | tuple:
    """An output as it is asked for: as a tuple where `return_dict` is False, and where a model is
    traced by `torch.jit`, which takes no other."""
    return out.to_tuple() if return_dict is False or torch.jit.is_tracing() else out


def _property(name: str) -> property:
    def read(out):
        value = vars(out).get(name)
        if isinstance(value, (Product, Resized)):
            value = vars(out)[name] = value.tensor()
        return value

    def write(out, value):
        vars(out)[name] = value

    return property(read, write)


def _given(out) -> dict:
    """The values that are not None, in the order of the fields; none is computed."""
    values = {field.name: vars(out).get(field.name) for field in fields(out)}
    return {name: value for name, value in values.items() if value is not None}


def _init(out, given: Mapping | Iterable[tuple] = (), /, **values):
    for name, value in {**dict(given), **values}.items():
        out[name] = value


def _getitem(out, key):
    if not isinstance(key, str):
        names = tuple(_given(out))[key]
        return getattr(out, names) if isinstance(names, str) else tuple(out[n] for n in names)
    if key not in _given(out):
        raise KeyError(key)
    return getattr(out, key)


def _setitem(out, name: str, value):
    if name not in (field.name for field in fields(out)):
        raise KeyError(f"{type(out).__name__} has no {name}")
    setattr(out, name, value)


def _refuse(out, *args, **kwargs):
    raise TypeError(f"{type(out).__name__}: set a value, or to None what shall not be there")


def _iter(out) -> Iterator[str]:
    return iter(_given(out))


def _len(out) -> int:
    return len(_given(out))


def _contains(out, name) -> bool:
    return name in _given(out)


def _reduce(out):
    return type(out), (_given(out),)
