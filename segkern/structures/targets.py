"""Targets: the truth of a batch of images, packed into tensors of fixed shape.

Letters: B image, T target slot, H W image size, K class.

The number of slots is rounded up to a bucket, so that few shapes occur: kernels, graphs and
allocations are reused. Slots from `count` on are padding: label 0, an empty mask, no weight.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..ops import pack_bits
from ..ops._checks import expect, got
from ..ops.segment_map import TASKS as TASKS

_said: set[str] = set()
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 100)  # then multiples of 64


@runtime_checkable
class SparseMasks(Protocol):
    """n masks that are not dense, such as `data.IdMaps`.

    Attributes:
        shape: (n, H, W).
    """

    shape: tuple[int, int, int]

    def __len__(self) -> int:
        """n."""

    def areas(self) -> np.ndarray:
        """Pixels of each mask, [n] int64."""

    def chosen(self, keep: np.ndarray) -> "SparseMasks":
        """The masks where `keep` [n] is true."""

    def write(self, out: np.ndarray) -> None:
        """Writes them into the upper left of `out` [n, at least H, at least W] uint8, which is
        0."""


class Targets(NamedTuple):
    """The targets of B images.

    Attributes:
        labels: [B, T] int64 in [0, K).
        masks: [B, T, H, W] uint8, 1 inside.
        count: [B] int64, targets of each image; the slots behind them are padding.
        ids: [B] int64, sample ids: random points depend on them and not on the place in the batch.
        semantic: [B, H, W] uint8, the label of each pixel, 255 where it does not count; uint16 and
            65535 for more than 255 classes; None where the samples have none.
        void: [B, H, ceil(W / 32)] int32, the pixels that have no weight in matching and in losses
            of masks, packed as `ops.pack_bits` does; None where all have it.
        normalizer: [] floating, number of targets that losses of masks are divided by: where
            several processes or batches make one step, the same for all (training.distributed).
            None takes the number in this batch, at least 1, in which targets that find no query,
            where there are fewer queries, are counted, as in the paper's code and transformers.
        pixel_normalizer: [] floating, the same for losses of pixels: number of those in `semantic`
            that count.
        matched: [] floating, number of targets that find a query, from which the weight follows
            that the class loss is divided by: as normalizer the same for all that make one step.
            None takes that of this batch.
        task: [B] int64, the place in `TASKS` of what is to be found in each image, for models that
            learn several tasks together; None where nobody asks.
    """

    labels: Tensor
    masks: Tensor
    count: Tensor
    ids: Tensor
    semantic: Tensor | None = None
    void: Tensor | None = None
    normalizer: Tensor | None = None
    pixel_normalizer: Tensor | None = None
    matched: Tensor | None = None
    task: Tensor | None = None

    @classmethod
    def from_lists(
        cls,
        mask_labels: Sequence[Tensor | SparseMasks],
        class_labels: Sequence[Tensor],
        size: tuple[int, int] | None = None,
        num_labels: int | None = None,
        ids: Sequence[int] | Tensor | None = None,
        num_queries: int | None = None,
        void: Sequence[Tensor] | None = None,
    ) -> "Targets":
        """Packs one tensor of masks and one of labels for each image, as Hugging Face passes them.

        Targets whose mask is empty are left out, as the paper's code does, with a warning.
        Values are read, so pack on the CPU (a CUDA tensor is waited for) and move the result.

        Args:
            mask_labels: for each image [n, H, W] of any real dtype, 1 inside and 0 outside; or
                `SparseMasks` of at most that size.
            class_labels: for each image [n] integers.
            size: (H, W) of the batch; None takes the first image's.
            num_labels: K; None leaves the upper bound unchecked.
            ids: sample ids, one an image; None counts from 0.
            num_queries: of the model, which can match no more targets of an image: more give a
                warning. None leaves their number unchecked.
            void: for each image [H, W] bool, the pixels that have no weight. None: all have it.

        Raises:
            TypeError: no tensor, or of another dtype.
            ValueError: another number of masks, labels or void maps, a mask of another size or
                with other values than 0 and 1, or a label out of range.
        """
        B = len(mask_labels)
        if B == 0 or len(class_labels) != B:
            raise ValueError(
                "targets: mask_labels and class_labels must have one tensor for each image, "
                f"got {B} and {len(class_labels)}"
            )
        H, W = size or _last_two(mask_labels[0])
        for b, (masks, labels) in enumerate(zip(mask_labels, class_labels)):
            _check(b, masks, labels, (H, W), num_labels)
        mask_labels, class_labels = _with_pixels(mask_labels, class_labels)
        count = torch.tensor([len(labels) for labels in class_labels])
        if num_queries is not None and count.max() > num_queries:
            lost = int((count - num_queries).clamp(min=0).sum())
            _warn(
                f"targets: an image has {count.max()} targets, the model {num_queries} queries: "
                f"{lost} of the {count.sum()} targets of a batch cannot be matched; give the "
                "model more queries",
                "queries",
            )
        T, first = bucket(int(count.max())), mask_labels[0]
        device = first.device if isinstance(first, Tensor) else class_labels[0].device
        packed_labels = torch.zeros(B, T, dtype=torch.int64, device=device)
        if device.type == "cpu":
            packed_masks = fresh(B, T, H, W, dtype=np.uint8, zeros=True, sent=True)
        else:
            packed_masks = torch.zeros(B, T, H, W, dtype=torch.uint8, device=device)
        for b, (masks, labels) in enumerate(zip(mask_labels, class_labels)):
            packed_labels[b, : len(labels)] = labels
            if isinstance(masks, Tensor):
                packed_masks[b, : len(labels)] = masks
            else:
                masks.write(packed_masks[b, : len(labels)].numpy())
        ids = torch.as_tensor(range(B) if ids is None else ids, dtype=torch.int64)
        if ids.shape != (B,):
            raise ValueError(
                f"targets: ids must be one integer for each of {B} images, got {got(ids)}"
            )
        packed_void = None if void is None else _packed(void, (B, H, W)).to(device)
        return cls(packed_labels, packed_masks, count.to(device), ids.to(device), void=packed_void)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """The same targets on another device."""
        return type(self)(
            *(None if x is None else x.to(device, non_blocking=non_blocking) for x in self)
        )


def fresh(
    *shape: int, dtype: type = np.float32, zeros: bool = False, sent: bool = False
) -> Tensor:
    """A large tensor on the CPU. NumPy asks for huge pages, so that it is first written in half of
    the time that one of PyTorch's own takes.

    Args:
        shape: of the tensor.
        dtype: NumPy's.
        zeros: set to 0.
        sent: it becomes part of a batch. In a loader's worker it is made in the memory that the
            process shares which takes the batch; PyTorch would copy it there.
    """
    if sent and get_worker_info() is not None and math.prod(shape):
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * np.dtype(dtype).itemsize)
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(0, dtype=kind).set_(storage).view(shape)  # its pages begin as zeros
    return torch.from_numpy((np.zeros if zeros else np.empty)(shape, dtype))


def bucket(n: int) -> int:
    """Slots for at most n targets an image: a few sizes up to 100, then multiples of 64."""
    return next((b for b in BUCKETS if b >= n), -(-n // 64) * 64)


def _with_pixels(masks: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[list, list]:
    """Masks and labels without those of empty masks, which have nothing to be found."""
    seen = [
        m.flatten(1).any(1).bool() if isinstance(m, Tensor) else torch.from_numpy(m.areas() > 0)
        for m in masks
    ]
    lost = sum(len(s) - int(s.sum()) for s in seen)
    if not lost:
        return list(masks), list(labels)
    _warn("targets: a mask without a pixel inside is left out with its label", "empty")
    kept = zip(masks, labels, seen)
    masks, labels = zip(
        *(
            (m[s] if isinstance(m, Tensor) else m.chosen(s.numpy()), k[s.to(k.device)])
            for m, k, s in kept
        )
    )
    return list(masks), list(labels)


def _warn(message: str, kind: str) -> None:
    """Says a kind of thing once in a process: what is wrong with a data set is wrong in many
    batches."""
    if kind not in _said:
        _said.add(kind)
        warnings.warn(message, stacklevel=3)


def _packed(void: Sequence[Tensor], sizes: tuple[int, int, int]) -> Tensor:
    """[B, H, ceil(W / 32)] int32 of B maps [H, W] bool."""
    B, H, W = sizes
    if len(void) != B:
        raise ValueError(
            f"targets: void must have one map for each of {B} images, got {len(void)}"
        )
    for b, x in enumerate(void):
        expect("targets", f"void of image {b}", x, f"{H} {W}", "bool", {})
    return pack_bits(torch.stack(list(void)))[0]


def _last_two(masks) -> tuple[int, int]:
    if not isinstance(masks, Tensor) or masks.ndim != 3:
        raise TypeError(f"targets: masks of image 0 must be [n, H, W], got {got(masks)}")
    return masks.shape[1], masks.shape[2]


def _check(b: int, masks, labels, size: tuple[int, int], num_labels: int | None) -> None:
    sparse = isinstance(masks, SparseMasks)
    if not sparse and (not isinstance(masks, Tensor) or masks.is_complex()):
        raise TypeError(f"targets: masks of image {b} must be numbers or bool, got {got(masks)}")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"targets: labels of image {b} must be integers, got {got(labels)}")
    if sparse:
        fits = masks.shape[1] <= size[0] and masks.shape[2] <= size[1]
    else:
        fits = masks.ndim == 3 and tuple(masks.shape[1:]) == tuple(size)
    if not fits:
        raise ValueError(
            f"targets: masks of image {b} must be [n, {size[0]}, {size[1]}], the size of the "
            f"batch, got {list(masks.shape) if sparse else got(masks)}"
        )
    if not sparse and masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
        bad = masks[(masks != 0) & (masks != 1)][0].item()
        raise ValueError(
            f"targets: masks of image {b} must be 1 inside and 0 outside, got {bad:g} "
            "(give masks > 0, or masks == the id of an object)"
        )
    if labels.ndim != 1 or len(labels) != len(masks):
        raise ValueError(
            f"targets: image {b} must have one label for each of its {len(masks)} masks, "
            f"got {got(labels)}"
        )
    top = "K" if num_labels is None else str(num_labels)
    if len(labels):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (num_labels is not None and high >= num_labels):
            bad = low if low < 0 else high
            raise ValueError(f"targets: labels of image {b} must be in [0, {top}), got {bad}")
