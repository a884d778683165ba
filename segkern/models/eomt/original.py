"""Checkpoints of EoMT's original code: its weights, pytorch_model.bin without a config.json.

Sizes are read off the shapes of the weights; what no shape shows, heads and how pictures are
taken, off the widths and numbers of the published models. Those of DINOv2 alone, whose encoder is
timm's; of DINOv3 the code keeps no checkpoint that tells its names.
Source: the names of the weights are those of the published checkpoints (tue-mps/eomt).
"""

import re
import warnings
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from ...io.atomic_files import atomic
from ...structures.labels import DATASETS
from ...weights import unpickling
from ...weights.state_dicts import on_disk, unwrapped
from .pretrained import from_timm

SUFFIXES = (".bin", ".pth", ".ckpt")
_ENCODER = "network.encoder.backbone."
_NAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^network\.upscale\.", "upscale."),
        (r"^network\.mask_head\.([024])\.", lambda found: f"mask_head.{int(found[1]) // 2}."),
        (r"^network\.q\.", "query."),
        (r"^network\.class_head\.", "class_predictor."),
        (r"^network\.attn_mask_probs$", "attn_mask_probs"),
    )
]
_COMPUTED = re.compile(r"^network\.encoder\.pixel_(mean|std)$|^criterion\.|^metrics\.")
_HEAD_SIZE = 64  # of all published encoders


def is_file(path: str | Path) -> bool:
    """Whether a path is such a checkpoint, and not the weights of a folder with settings."""
    path = Path(path).expanduser()
    described = (path.parent / "config.json").is_file()
    return path.suffix in SUFFIXES and path.is_file() and not described


def read_file(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Settings and weights of a file.

    Returns:
        settings under the names of `EoMTConfig`, and weights under our names; weights that have
        no name here keep theirs.

    Raises:
        ValueError: no such checkpoint.
    """
    path = Path(path).expanduser()
    try:
        content = unpickling.load(path)
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path}: {error}") from error
    state, _ = unpickling.weights_of(content if isinstance(content, dict) else {})
    state = unwrapped(state)
    if "network.q.weight" not in state:
        raise ValueError(f"from_pretrained: {path} is no checkpoint of EoMT's original code")
    try:
        weights = from_original(state)
        settings = read_sizes(weights, str(path))
    except (KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"from_pretrained: {path} is no checkpoint of EoMT's original code with a DINOv2 "
            f"({error})"
        ) from error
    if isinstance(classes := state.get("criterion.empty_weight"), Tensor) and classes.numel():
        settings["no_object_weight"] = round(classes.flatten()[-1].item(), 7)
    return settings, weights


def from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and products for the weights of the original code."""
    inside = {k.removeprefix(_ENCODER): v for k, v in state.items() if k.startswith(_ENCODER)}
    out = {f"encoder.{name}": value for name, value in from_timm(inside).items()}
    for name, value in state.items():
        if name.startswith(_ENCODER) or _COMPUTED.search(name):
            continue
        for pattern, replacement in _NAMES:
            name, count = pattern.subn(replacement, name)
            if count:
                break
        out[name] = value
    if "encoder.reg_token" not in out:
        out["encoder.reg_token"] = out["encoder.cls_token"].new_zeros(1, 0, _width(out))
    return out


def to_original(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back. A DINOv2 without registers has a position of its class token there, which is
    part of the token here: zeros."""
    out = {}
    for name, value in weights.items():
        if name.startswith("encoder."):
            if name == "encoder.reg_token" and not value.numel():
                continue
            name = re.sub(r"\.ls(\d)$", r".ls\1.gamma", name)
            name = _ENCODER + name.removeprefix("encoder.")
        elif found := re.match(r"mask_head\.(\d)\.", name):
            name = f"network.mask_head.{2 * int(found[1])}.{name[found.end() :]}"
        elif not name.startswith("criterion."):
            module, rest = name.partition(".")[::2]
            module = {"query": "q", "class_predictor": "class_head"}.get(module, module)
            name = f"network.{module}.{rest}" if rest else f"network.{module}"
        out[name] = value
    out.pop("criterion.seed", None)
    if not weights["encoder.reg_token"].numel():
        positions = out[f"{_ENCODER}pos_embed"]
        own = torch.zeros_like(positions[:, :1])
        out[f"{_ENCODER}pos_embed"] = torch.cat((own, positions), 1)
    return out


def write_file(path: str | Path, settings: dict, weights: dict[str, Tensor]) -> None:
    """Writes a file of weights, whole or not at all: Lightning's form where it is a .ckpt.

    Args:
        path: of the file; its folder is made if it is not there.
        settings: names of `EoMTConfig`.
        weights: names of `EoMT`.

    Raises:
        ValueError: another suffix, or an encoder that is no DINOv2.
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    heads = settings["hidden_size"] // _HEAD_SIZE
    for name, rule, found, kept in (
        ("path", f"end in {', '.join(SUFFIXES)}", path, path.suffix in SUFFIXES),
        *(
            (name, f"be {value}", settings[name], settings[name] == value)
            for name, value in (("encoder", "dinov2"), ("num_attention_heads", heads))
        ),
    ):
        if not kept:
            raise ValueError(f"save_original: {name} must {rule}, got {found}")
    state = to_original(weights)
    for name in ("mean", "std"):
        values = torch.tensor(settings[f"image_{name}"]).view(1, -1, 1, 1)
        state[f"network.encoder.pixel_{name}"] = values
    state = on_disk(state)
    with atomic(path) as temporary:
        torch.save({"state_dict": state} if path.suffix == ".ckpt" else state, temporary)


def read_sizes(weights: dict[str, Tensor], name: str) -> dict:
    """Settings under the names of `EoMTConfig` that weights under our names show.

    Args:
        weights: of `from_original`.
        name: of the checkpoint, for messages.
    """

    def count(pattern: str) -> int:
        return len({found[0] for key in weights if (found := re.match(pattern, key))})

    D, labels = _width(weights), len(weights["class_predictor.bias"]) - 1
    patch = weights["encoder.patch_embed.proj.weight"].shape[2]
    hidden = weights["encoder.blocks.0.mlp.fc2.weight"].shape[1]
    queries = len(weights["query.weight"])
    known = {facts.labels.get("panoptic"): facts.stuff for facts in DATASETS.values()}
    windows = queries == 100  # the published ones of semantic segmentation have so many
    taken = "in squares along the long side" if windows else "whole"
    warnings.warn(
        f"{name}: holds weights alone: it is taken for a model of {labels} classes with "
        f"{D // _HEAD_SIZE} heads that sees pictures {taken}",
        stacklevel=4,
    )
    return {
        "num_labels": labels,
        "encoder": "dinov2",
        "image_size": patch * isqrt(weights["encoder.pos_embed"].shape[1]),
        "patch_size": patch,
        "windows": windows,
        "hidden_size": D,
        "num_hidden_layers": count(r"encoder\.blocks\.\d+\."),
        "num_attention_heads": D // _HEAD_SIZE,
        "intermediate_size": hidden,
        "gated": len(weights["encoder.blocks.0.mlp.fc1.bias"]) == 2 * hidden,
        "num_register_tokens": weights["encoder.reg_token"].shape[1],
        "num_queries": queries,
        "num_blocks": len(weights["attn_mask_probs"]),
        "num_upscale_blocks": count(r"upscale\.\d+\."),
        "stuff": known.get(labels, ()),
    }


def _width(weights: dict[str, Tensor]) -> int:
    return weights["encoder.cls_token"].shape[2]
