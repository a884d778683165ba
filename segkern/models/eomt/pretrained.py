"""Encoders of timm, DINOv2 and DINOv3, as the start of an EoMT."""

import re

import torch
from torch import Tensor, nn

from ...weights.state_dicts import misfits
from ...weights.timm_names import check_timm_name, pretrained_model

_NAMES = [  # the first that fits
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.ls(\d)\.gamma$", r".ls\1"),
        (r"\.gamma_(\d)$", r".ls\1"),
    )
]


def encoder_weights(backbone: str | nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model of timm under the names of an EoMT's encoder.

    Args:
        backbone: timm's name of a pretrained model, or a model.
        model: an `EoMT`.

    Raises:
        ValueError: no such model or no weights of it, or another architecture (names the keys).
    """
    config, named = model.config, isinstance(backbone, str)
    name = backbone if named else type(backbone).__name__
    options = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": 0,
        "in_chans": config.input.channels,
    }
    if named:
        import timm  # here, because it takes as long to import as torch

        check_timm_name(name, "EoMT: backbone must be a DINOv2 or DINOv3 of timm")
        try:
            with torch.device("meta"):
                shapes = timm.create_model(name, pretrained=False, **options)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"EoMT: timm cannot give backbone '{name}': {error}") from error
        _fitting(shapes, model, name)
        backbone = pretrained_model(name, **options)
    return _fitting(backbone, model, name)


def _fitting(backbone: nn.Module, model: nn.Module, name: str) -> dict[str, Tensor]:
    """Its weights under our names; ValueError where they are not of the encoder's architecture."""
    weights, own = from_timm(backbone.state_dict()), model.encoder.state_dict()
    if "reg_token" not in weights:
        weights["reg_token"] = own["reg_token"][:, :0]
    for block in range(len(model.encoder.blocks)):  # which timm leaves out where they are zero
        for part in "qv":
            key = f"blocks.{block}.attn.{part}_bias"
            if key in own:
                weights.setdefault(key, torch.zeros_like(own[key]))
    faults = misfits(weights, own)
    if not faults:
        found, heads = backbone.blocks[0].attn.num_heads, model.encoder.blocks[0].attn.num_heads
        faults = [] if found == heads else [f"{found} attention heads instead of {heads}"]
    if not faults and (eps := backbone.norm.eps) != model.encoder.norm.eps:
        faults = [f"layer_norm_eps {eps} instead of {model.encoder.norm.eps}"]
    if faults:
        raise ValueError(f"EoMT: backbone '{name}' does not fit the encoder; {'; '.join(faults)}")
    return weights


def from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and products. The position of a class token is part of it here, and the halves of
    a gated network are one product."""
    out = {}
    for name, value in state.items():
        for pattern, replacement in _NAMES:
            name, count = pattern.subn(replacement, name)
            if count:
                break
        if ".mlp.fc1_x." in name:  # goes with fc1_g
            continue
        if match := re.fullmatch(r"(.*\.mlp\.fc1)_g\.(weight|bias)", name):
            other = state[f"{match[1]}_x.{match[2]}"]
            name, value = f"{match[1]}.{match[2]}", torch.cat((value, other))
        out[name] = value
    positions = out.get("pos_embed")
    if positions is not None and (more := _more_than_a_square(positions.shape[1])):
        own, out["pos_embed"] = positions.split([more, positions.shape[1] - more], 1)
        out["cls_token"] = out["cls_token"] + own[:, :1]
    return out


def _more_than_a_square(count: int) -> int:
    """1 where a table of positions has a row for the class token before those of a square."""
    return int(round(count**0.5) ** 2 != count)
