"""Models made smaller: fewer decoder layers, fewer queries, weights that are 0.

`PARTS` says where models have layers and queries that may go; weights may become 0 in all of them.
"""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from fnmatch import fnmatch
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import L1Unstructured

from . import build_model
from .protocol import SegmentationModel


class Parts(NamedTuple):
    """What of a model may be fewer.

    Attributes:
        queries: names of the weights that have a row a query.
        layers: name of the list of decoder layers, each followed by a prediction; None where there
            is no such list.
        fixed: how many of the last queries are for something else than a segment, and stay.
    """

    queries: tuple[str, ...] = ()
    layers: str | None = None
    fixed: int = 0


_LAYERS, _PLACES = "query_decoder.layers", "query_decoder.query_embed.weight"
PARTS = {  # by kind
    "mask2former": Parts(("query_decoder.query_feat.weight", _PLACES), _LAYERS),
    "maskformer": Parts((_PLACES,), _LAYERS),
    "oneformer": Parts((_PLACES,), _LAYERS, fixed=1),  # the last query is the task's token
    "eomt": Parts(("query.weight",)),
}
# parts that lose most by fewer bits or weights: where attention looks is a matter of fractions of
# a pixel, the words of a task are numbers up to 49407; the class head of every model is one, too.
# Norms are no products: what one of them is composed into is as good as any other weight
SENSITIVE = ("*.sampling_offsets.*", "*.task_mlp.*")


def with_layers(model: SegmentationModel, layers: int) -> SegmentationModel:
    """The model cut behind a decoder layer: its last prediction is that which the whole model
    makes there.

    Args:
        model: is not changed.
        layers: that stay, at least 1 and fewer than there are.

    Raises:
        ValueError: a model without such layers, or another number.
    """
    place, have = parts_of(model).layers, getattr(model.config, "decoder_layers", 0)
    if place is None:
        raise ValueError(
            f"prune: layers must be left out for a {model.config.kind}, which has no decoder with "
            f"a prediction after every layer, got {layers}"
        )
    if not 1 <= layers < have:
        raise ValueError(
            f"prune: layers must be at least 1 and fewer than the {have} there are, got {layers}"
        )
    if not model.deep_supervision:
        warnings.warn(
            "prune: the predictions before the last were not trained (use_auxiliary_loss is "
            "False): what is cut finds little before it is trained again",
            stacklevel=3,
        )
    gone = tuple(f"{place}.{i}." for i in range(layers, have))
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(gone)}
    return _made(model, weights, decoder_layers=layers)


def with_queries(model: SegmentationModel, kept: Sequence[int]) -> SegmentationModel:
    """The model with some of its queries alone, in the order given.

    Args:
        model: is not changed.
        kept: places of the queries that stay, each once; the fixed ones come last of themselves.

    Raises:
        ValueError: a model without such queries, or places that are not there.
    """
    free = free_queries(model)
    if not kept or len(set(kept)) < len(kept) or not all(0 <= q < free for q in kept):
        raise ValueError(
            f"prune: queries must be different places in [0, {free}), at least one, "
            f"got {list(kept)}"
        )
    have = model.config.num_queries
    rows = torch.tensor([*kept, *range(free, have)])
    weights = model.state_dict()
    for name in parts_of(model).queries:
        weights[name] = weights[name][rows.to(weights[name].device)]
    return _made(model, weights, num_queries=len(rows))


def parts_of(model: SegmentationModel) -> Parts:
    """What of a model may be fewer."""
    return PARTS.get(model.config.kind, Parts())


def free_queries(model: SegmentationModel) -> int:
    """How many queries a model has that may be left out.

    Raises:
        ValueError: it has none that are learned.
    """
    parts = parts_of(model)
    if not parts.queries:
        raise ValueError(
            f"prune: queries must be left out for a {model.config.kind}, which has none that "
            "could be fewer"
        )
    return model.config.num_queries - parts.fixed


def weights_of_layers(model: nn.Module, keep: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The weights of linear layers and convolutions by name, without the sensitive ones.

    Args:
        model: with `class_head`, whose weights are sensitive.
        keep: patterns of names of further weights to leave out, such as "backbone.*"; `*` stands
            for any text.

    Raises:
        ValueError: a pattern that no weight of the model has.
    """
    found = {
        f"{name}.weight": part.weight
        for name, part in model.named_modules()
        if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd))
    }
    for pattern in keep:
        if not any(fnmatch(name, pattern) for name in found):
            raise ValueError(
                f"keep must be patterns of names of weights, such as {next(iter(found))}, "
                f"got {pattern!r}, which none has"
            )
    left = (*SENSITIVE, *model.class_head, *keep)
    return {k: w for k, w in found.items() if not any(fnmatch(k, x) for x in left)}


@torch.no_grad()
def zero_weights(
    model: nn.Module, share: float, everywhere: bool = False, keep: Sequence[str] = ()
) -> int:
    """Sets the least weights of linear layers and convolutions to 0, in place.

    Args:
        model: whose sensitive parts stay.
        share: of the weights that are 0 then, in (0, 1), to the nearest weight.
        everywhere: the same share in each tensor; False takes the least of all tensors together,
            which leaves more where weights are large.
        keep: as of `weights_of_layers`.

    Returns:
        how many are 0.

    Raises:
        ValueError: share out of range, or a pattern that no weight has.
    """
    if not 0 < share < 1:
        raise ValueError(f"prune: zeros must be a share in (0, 1), got {share}")
    weights = list(weights_of_layers(model, keep).values())
    if everywhere:
        masks = [_mask(w.flatten(), share) for w in weights]
    else:
        sizes = [w.numel() for w in weights]
        masks = _mask(torch.cat([w.flatten() for w in weights]), share).split(sizes)
    for weight, mask in zip(weights, masks):
        weight.masked_fill_(mask.view_as(weight) == 0, 0)
    return sum(int((mask == 0).sum()) for mask in masks)


def _mask(values: Tensor, share: float) -> Tensor:
    """1 for the values that stay; those that are 0 already go first."""
    return L1Unstructured(share).compute_mask(values, torch.ones_like(values))


def _made(
    model: SegmentationModel, weights: dict[str, Tensor], **settings: int
) -> SegmentationModel:
    """A model of the same kind with other settings, in eval mode."""
    config = replace(model.config, backbone_pretrained=False, **settings)
    made = build_model(config).to(model.device, model.dtype)
    made.load_state_dict(weights)
    return made.eval()


def copied(model: SegmentationModel) -> SegmentationModel:
    """Another model with the same settings and weights, in eval mode."""
    return deepcopy(model).eval()
