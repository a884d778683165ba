"""The model of what a checkpoint holds, whichever format it came from."""

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from ..weights.state_dicts import misfits, misshapen, with_new_head

Model = TypeVar("Model", bound=nn.Module)


class NewLabels(NamedTuple):
    """The labels of a new task.

    Attributes:
        count: K.
        names: of all of them, or None.
    """

    count: int
    names: dict[int, str] | None = None


def new_labels(
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    label2id: Mapping[str, int] | None = None,
) -> NewLabels | None:
    """The labels that a caller asks for; None where nothing is asked.

    Raises:
        ValueError: names that are not of labels 0, 1, 2, ..., or that contradict each other.
    """
    names = None if id2label is None else {int(k): str(name) for k, name in id2label.items()}
    if label2id is not None:
        turned = {int(k): str(name) for name, k in label2id.items()}
        if names is not None and turned != names:
            raise ValueError("from_pretrained: label2id must be id2label the other way round")
        names = turned
    if names is None:
        return None if num_labels is None else NewLabels(num_labels)
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"from_pretrained: id2label must name labels 0, 1, 2, ..., got {sorted(names)[:8]}"
        )
    if num_labels not in (None, len(names)):
        raise ValueError(
            f"from_pretrained: num_labels must be that of id2label ({len(names)}), "
            f"got {num_labels}"
        )
    return NewLabels(len(names), dict(sorted(names.items())))


def build(
    name: str | Path,
    kind: type[Model],
    settings: dict,
    weights: dict[str, Tensor],
    labels: NewLabels | None = None,
    ignore_mismatched_sizes: bool = False,
) -> Model:
    """The model of settings and weights, in eval mode.

    Args:
        name: of the checkpoint, for messages.
        kind: class of the model; the class of its settings takes those that it knows.
        settings: by the names of the config.
        weights: by the names of the model; of its loss, they may lack the seed.
        labels: of the new task; where they differ from the settings', the class head starts anew,
            with a warning.
        ignore_mismatched_sizes: so does each weight of another shape.

    Raises:
        ValueError: the weights are not those of the configured model (names the keys).
    """
    known = {f.name for f in fields(kind.config_class)}
    made = kind.config_class(**{k: v for k, v in settings.items() if k in known})
    made.backbone_pretrained = False
    change = labels and _change(made, labels)
    if change:
        named = {"id2label": labels.names, "stuff": (), "prompts": ()}
        named = {k: v for k, v in named.items() if k in known}
        made = replace(made, num_labels=labels.count, **named)
    elif labels and labels.names:
        made = replace(made, id2label=labels.names)
    model = kind(made)
    own = model.state_dict()
    if change:
        weights = with_new_head(weights, own, kind.class_head)
        _say(f"{kind.__name__}: the class head of {name} starts anew: {change}")
    # of the loss, which no other's files have
    weights = {k: v for k, v in own.items() if k == "criterion.seed"} | weights
    if ignore_mismatched_sizes and (other := misshapen(weights, own)):
        weights = with_new_head(weights, own, other)
        _say(f"{kind.__name__}: of another shape in {name}, start anew: {', '.join(other)}")
    if faults := misfits(weights, own):
        if misshapen(weights, own):
            faults.append("ignore_mismatched_sizes=True starts those of another shape anew")
        raise ValueError(f"{kind.__name__}: {name} does not fit the model; {'; '.join(faults)}")
    model.load_state_dict(weights)
    return model.eval()


def _change(config, labels: NewLabels) -> str | None:
    """How a config's labels differ from new ones; None where the class head may stay."""
    if labels.count != config.num_labels:
        return f"{config.num_labels} labels there, {labels.count} here"
    names = config.id2label or {}
    if all(name == f"LABEL_{k}" for k, name in names.items()):
        return None
    other = [k for k, name in (labels.names or names).items() if names[k] != name]
    if not other:
        return None
    k = other[0]
    more = f", and {len(other) - 1} more names differ" if len(other) > 1 else ""
    return f"label {k} is {names[k]!r} there, {labels.names[k]!r} here{more}"


def _say(message: str) -> None:
    warnings.warn(message, stacklevel=4)
