"""The model of what a checkpoint holds, whichever format it came from."""

from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from ..weights.state_dicts import misfits, with_new_head

Model = TypeVar("Model", bound=nn.Module)


def build(
    name: str | Path,
    kind: type[Model],
    config: type,
    settings: dict,
    weights: dict[str, Tensor],
    num_labels: int | None,
) -> Model:
    """The model of settings and weights, in eval mode.

    Args:
        name: of the checkpoint, for messages.
        kind: class of the model.
        config: class of its settings, which takes those that it knows.
        settings: by the names of the config.
        weights: by the names of the model; of its loss, they may lack the seed.
        num_labels: K of the new task; where it differs from the settings', the class head starts
            anew.

    Raises:
        ValueError: the weights are not those of the configured model (names the keys).
    """
    known = {f.name for f in fields(config)}
    made = config(**{k: v for k, v in settings.items() if k in known})
    made.backbone_pretrained = False
    fresh = num_labels is not None and num_labels != made.num_labels
    if fresh:
        named = {
            k: v for k, v in {"id2label": None, "stuff": (), "prompts": ()}.items() if k in known
        }
        made = replace(made, num_labels=num_labels, **named)
    model = kind(made)
    own = model.state_dict()
    if fresh:
        weights = with_new_head(weights, own, kind.class_head)
    # of the loss, which no other's files have
    weights = {k: v for k, v in own.items() if k == "criterion.seed"} | weights
    if faults := misfits(weights, own):
        raise ValueError(f"{kind.__name__}: {name} does not fit the model; {'; '.join(faults)}")
    model.load_state_dict(weights)
    return model.eval()
