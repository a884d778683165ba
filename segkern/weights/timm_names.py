"""timm's models: by name, with hints at names that are close, and with their weights."""

import difflib
from collections.abc import Sequence

from torch import nn

from .hub import downloads


def check_timm_name(name: str, rule: str, others: Sequence[str] = ()) -> None:
    """Raises ValueError, with names that are close, where timm has no model of that name.

    Args:
        name: with or without the tag of its weights; where it names a place, "hub:...", timm has
            to find out.
        rule: what the name must be, which begins the message.
        others: further names that may be meant.
    """
    import timm  # here, because it takes as long to import as torch

    if ":" in name or timm.is_model(name):
        return
    known = [*others, *timm.list_models(), *timm.list_pretrained()]
    close = difflib.get_close_matches(name, known, 3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"{rule}, got '{name}'{hint}")


def pretrained_model(name: str, **options) -> nn.Module:
    """A model of timm with its weights, which are downloaded if they are not kept here.

    Args:
        name: with or without the tag of its weights.
        options: of `timm.create_model`.

    Raises:
        ValueError: the weights cannot be had; says what to give to start without them.
    """
    import timm  # here, because it takes as long to import as torch

    try:
        with downloads():
            return timm.create_model(name, pretrained=True, **options)
    except OSError as error:
        raise ValueError(
            f"the pretrained weights of '{name}' cannot be downloaded: connect, or start without "
            "them by --model.no-backbone-pretrained (backbone_pretrained=False); "
            f"{str(error).partition(chr(10))[0]}"
        ) from error
