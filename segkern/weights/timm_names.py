"""Checks names of timm's models, and suggests those that are close."""

import difflib
from collections.abc import Sequence


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
