"""The one check of tensor arguments (kind, shape letters, device) and its one message."""

import torch
from torch import Tensor

KINDS = {
    "float": lambda t: t.is_floating_point(),
    "int64": lambda t: t.dtype == torch.int64,
    "int32": lambda t: t.dtype == torch.int32,
    "bool": lambda t: t.dtype == torch.bool,
    "bool or uint8": lambda t: t.dtype in (torch.bool, torch.uint8),
    "float, bool or uint8": lambda t: (
        t.is_floating_point() or t.dtype in (torch.bool, torch.uint8)
    ),
}


def got(x) -> str:
    """`[2, 5] int64` for a tensor, the type's name for anything else."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def expect(op: str, name: str, x, shape: str, kind: str, sizes: dict) -> None:
    """Checks that `x` is a tensor of `kind` and `shape`, on the device of those checked before it.

    Args:
        shape: letters and numbers with spaces, "B Q H 2"; "B|1" allows size 1 as well. A letter
            met for the first time is bound in `sizes`, later it must agree.
        kind: a key of KINDS.
        sizes: letter to size, shared by the checks of one call; holds the device under "device".

    Raises:
        TypeError: no tensor, or of another dtype.
        ValueError: another shape or device.
    """
    letters = shape.split()
    known = dict(sizes)
    if not isinstance(x, Tensor) or not KINDS[kind](x):
        raise TypeError(f"{op}: {name} must be [{', '.join(letters)}] {kind}, got {got(x)}")
    fits = x.ndim == len(letters)
    if fits:
        for letter, size in zip(letters, x.shape):
            letter, one, _ = letter.partition("|1")
            if one and size == 1:
                continue
            want = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            fits = fits and size == want
    if not fits:
        bound = ", ".join(f"{s} = {known[s]}" for s in dict.fromkeys(letters) if s in known)
        raise ValueError(
            f"{op}: {name} must be [{', '.join(letters)}] {kind}"
            f"{' with ' + bound if bound else ''}, got {got(x)}"
        )
    if x.device != sizes.setdefault("device", x.device):
        raise ValueError(f"{op}: {name} must be on {sizes['device']}, got {x.device}")


def alike(op: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype: under autocast those of several are cast to its dtype, as in
    PyTorch's own ops; those of one dtype stay.

    Raises:
        TypeError: another dtype than the first without autocast, or float64 beside another.
    """
    (first, like), *others = tensors.items()
    if all(t.dtype == like.dtype for _, t in others):
        return tuple(tensors.values())
    device, dtypes = like.device.type, {t.dtype for t in tensors.values()}
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes:
        return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors.values())
    name, other = next((n, t) for n, t in others if t.dtype != like.dtype)
    raise TypeError(f"{op}: {name} must be {like.dtype} as {first}, got {other.dtype}")


def expect_integer(name: str, value, least: int = 1) -> None:
    """Checks a setting.

    Args:
        name: whose it is and which, for the message.
        value: must be an int; a bool is none.
        least: that it may be.

    Raises:
        TypeError: no integer.
        ValueError: too small.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def expect_labels(op: str, labels: Tensor, K: int, ignored: int) -> None:
    """Checks the values of labels [B, ...] on the CPU in eager mode; elsewhere reading them would
    synchronise.

    Raises:
        ValueError: a label that is neither in [0, K) nor `ignored`; names the first image.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ((labels < 0) | (labels >= K)) & (labels != ignored)
    if bad.any():
        image = int(bad.flatten(1).any(1).nonzero()[0])
        found = labels[image][bad[image]].unique().tolist()
        raise ValueError(
            f"{op}: labels must be in [0, {K}) or {ignored}, got {', '.join(map(str, found[:4]))}"
            f"{' and more' if len(found) > 4 else ''} in image {image}"
        )


def exact_dtype(t: Tensor) -> torch.dtype:
    """float64 for float64, else float32: the dtype of coordinates and of sums."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32
