"""Segmenter's checkpoints: those of the original code, and our own; encoders of timm.

Original: checkpoint.pth, {"model": weights, ...}, and variant.yml beside it. Nothing in either is
executed: weights are read as such, and of YAML's Python tags only the tuple is known; what stands
under another is not read.
Ours: model.safetensors and config.json. The names of the weights are the same in both; only the
original's unused ImageNet heads have no place in the model.
"""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...io.atomic_files import atomic
from ...structures.labels import IMAGENET_MEAN, IMAGENET_STD
from ...weights import unpickling
from ...weights.state_dicts import misfits, on_disk, unwrapped
from ...weights.timm_names import check_timm_name, pretrained_model
from ...weights.yaml_files import read_yaml, yaml_text
from .. import own_format

_MODEL_TYPE = "segmenter"
_IMAGENET_CLASSES = 1000
_NORMALIZATION = {
    "vit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "deit": (IMAGENET_MEAN, IMAGENET_STD),
}
# settings by the original's names
_NET = {
    "n_cls": "num_labels",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "d_model": "embed_dim",
    "n_layers": "depth",
    "n_heads": "num_heads",
    "distilled": "distilled",
    "dropout": "dropout",
    "drop_path_rate": "drop_path_rate",
}
_DECODER = {
    "n_layers": "decoder_layers",
    "dropout": "decoder_dropout",
    "drop_path_rate": "decoder_drop_path_rate",
}
_DECODERS = {"mask_transformer": "mask", "linear": "linear"}


def read_folder(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Settings under the names of `SegmenterConfig`, and weights.

    Args:
        folder: of either format.

    Raises:
        ValueError: a file is missing, damaged, or is not of a Segmenter.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return own_format.read(folder, _MODEL_TYPE, "Segmenter")
    for name in ("checkpoint.pth", "variant.yml"):
        if not (folder / name).is_file():
            raise ValueError(
                f"Segmenter: {folder} must hold checkpoint.pth and variant.yml, or config.json "
                f"and model.safetensors; it has no {name}"
            )
    try:
        variant = read_yaml(folder / "variant.yml")
    except ValueError as error:
        raise ValueError(f"Segmenter: {error}") from error
    settings = from_variant(variant, str(folder / "variant.yml"))
    path = folder / "checkpoint.pth"
    try:
        checkpoint = unpickling.load(path)
    except ValueError as error:
        raise ValueError(f"Segmenter: {path}: {error}") from error
    weights = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(
            f"Segmenter: {path} is not a checkpoint of Segmenter (no weights 'model')"
        )
    weights = unwrapped(weights)
    return settings, {k: v for k, v in weights.items() if not k.startswith("encoder.head")}


def from_variant(variant: dict, name: str) -> dict:
    """Settings under the names of `SegmenterConfig` from what variant.yml holds.

    A warning names what is unknown among the settings of the network: whether it shaped the
    weights, a strict load of them tells. What is about training alone is not read.

    Args:
        variant: the file's content.
        name: of the file, for messages.

    Raises:
        ValueError: a setting is missing, or names what is not here.
    """

    def section(holder, key, known):
        found = holder.get(key) if isinstance(holder, dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"Segmenter: {name} has no section {key}")
        if unknown := [str(k) for k in found if k not in known]:
            warnings.warn(
                f"Segmenter: {name}: not known and not used, in {key}: {', '.join(unknown)}",
                stacklevel=4,
            )
        return found

    net = section(variant, "net_kwargs", {*_NET, "decoder", "backbone", "normalization"})
    decoder = section(net, "decoder", {*_DECODER, "name", "n_cls"})
    known = {"im_size", "window_size", "window_stride"}
    given = "inference_kwargs" in variant  # or else they follow the size of the crops
    window = section(variant, "inference_kwargs", known) if given else {}
    missing = [
        k for k in ("n_cls", "patch_size", "d_model", "n_layers", "n_heads") if k not in net
    ]
    if missing:
        raise ValueError(f"Segmenter: {name} has no {', '.join(missing)} in net_kwargs")
    for what, value, known in (
        ("decoder.name", decoder.get("name"), _DECODERS),
        ("normalization", net.get("normalization", "vit"), _NORMALIZATION),
    ):
        if value not in known:
            raise ValueError(
                f"Segmenter: {name}: {what} must be one of {', '.join(known)}, got {value}"
            )
    settings = {ours: net[theirs] for theirs, ours in _NET.items() if theirs in net}
    if isinstance(settings.get("image_size"), int):
        settings["image_size"] = (settings["image_size"],) * 2
    settings["decoder"] = _DECODERS[decoder["name"]]
    settings |= {ours: decoder[theirs] for theirs, ours in _DECODER.items() if theirs in decoder}
    settings |= {k: window[k] for k in ("window_size", "window_stride") if k in window}
    if "im_size" in window:  # ADE20K's and Pascal Context's long side; Cityscapes' is its double
        settings |= {"shortest_edge": window["im_size"], "longest_edge": 4 * window["im_size"]}
    mean, std = _NORMALIZATION[net.get("normalization", "vit")]
    return settings | {"image_mean": mean, "image_std": std}


def to_variant(settings: dict) -> dict:
    """What variant.yml holds, from settings under the names of `SegmenterConfig`.

    Raises:
        ValueError: the pixels' normalisation has no name in the original format.
    """
    pair = tuple(tuple(settings[k]) for k in ("image_mean", "image_std"))
    names = [name for name, known in _NORMALIZATION.items() if known == pair]
    if not names:
        raise ValueError(
            "Segmenter: image_mean and image_std must be those of 'vit' (0.5) or 'deit' "
            f"(ImageNet) in the original format, got {pair}"
        )
    net = {theirs: settings[ours] for theirs, ours in _NET.items()}
    net["image_size"] = tuple(net["image_size"])
    kind = "deit" if settings["distilled"] else "vit"
    size = {192: "tiny", 384: "small", 768: "base", 1024: "large"}.get(net["d_model"], "custom")
    net["backbone"] = f"{kind}_{size}_patch{net['patch_size']}_384"
    net["normalization"] = names[0]
    net["decoder"] = {"name": {v: k for k, v in _DECODERS.items()}[settings["decoder"]]}
    net["decoder"]["n_cls"] = net["n_cls"]
    if settings["decoder"] == "mask":
        net["decoder"] |= {theirs: settings[ours] for theirs, ours in _DECODER.items()}
    window = {k: settings[k] for k in ("window_size", "window_stride")}
    return {
        "net_kwargs": net,
        "inference_kwargs": {"im_size": settings["shortest_edge"], **window},
        "dataset_kwargs": {"normalization": names[0]},  # which the original's inference reads
    }


def write_folder(folder: str | Path, settings: dict, weights: dict[str, Tensor]) -> None:
    """Writes checkpoint.pth and variant.yml of the original code, each file whole or not at all,
    the settings last; the unused ImageNet heads are zeros.

    Args:
        folder: is made if it is not there.
        settings: names of `SegmenterConfig`.
        weights: names of `Segmenter`.

    Raises:
        ValueError: settings that the original format cannot hold.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    state = on_disk(weights)
    variant = to_variant(settings)
    for head in ["head", "head_dist"][: 2 if settings["distilled"] else 1]:
        like = state["encoder.cls_token"]
        state[f"encoder.{head}.weight"] = like.new_zeros(_IMAGENET_CLASSES, like.shape[-1])
        state[f"encoder.{head}.bias"] = like.new_zeros(_IMAGENET_CLASSES)
    with atomic(folder / "checkpoint.pth") as temporary:
        torch.save({"model": state, "n_cls": settings["num_labels"]}, temporary)
    with atomic(folder / "variant.yml") as temporary:
        temporary.write_text(yaml_text(variant), encoding="utf-8")


def labels_of(weights: dict[str, Tensor]) -> int | None:
    """K that weights under the names of `Segmenter` are for; None where no decoder is found."""
    for name, axis in (("decoder.cls_emb", 1), ("decoder.head.weight", 0)):
        if name in weights and weights[name].ndim > axis:
            return weights[name].shape[axis]
    return None


def timm_model(name: str, pretrained: bool, channels: int = 3) -> nn.Module:
    """A model of timm.

    Args:
        name: of a model in timm, with or without the tag of its weights.
        pretrained: with its weights (downloads them), or else shapes only, on the meta device.
        channels: of its images; timm fits its weights to them.

    Raises:
        ValueError: no such model, or no weights of it.
    """
    import timm  # here, because it takes as long to import as torch

    check_timm_name(name, "Segmenter: backbone must be a ViT of timm")
    try:
        if pretrained:
            return pretrained_model(name, in_chans=channels)
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, in_chans=channels)
    except RuntimeError as error:
        raise ValueError(f"Segmenter: timm cannot give backbone '{name}': {error}") from error


def check_fit(backbone: nn.Module, encoder: nn.Module, name: str) -> None:
    """Raises ValueError where a model of timm is not of the encoder's architecture.

    Args:
        backbone: of timm; may be on the meta device.
        encoder: a `ViT`.
        name: for the message.
    """
    faults = misfits(from_timm(backbone, encoder.grid), encoder.state_dict())
    heads = encoder.blocks[0].attn.num_heads
    if not faults and (found := backbone.blocks[0].attn.num_heads) != heads:
        faults = [f"{found} attention heads instead of {heads}"]
    if faults:
        raise ValueError(
            f"Segmenter: backbone '{name}' does not fit the encoder; {'; '.join(faults)}"
        )


def from_timm(backbone: nn.Module, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The weights of a ViT or DeiT of timm under the names of the encoder, without its heads.

    Args:
        backbone: of timm; of another architecture, its weights come as they are.
        grid: height and width in patches that position embeddings [1, tokens + N, D] are resized
            to: bicubically, and bilinearly for a DeiT, as the original does.
    """
    heads = ("head.", "head_dist.")
    weights = {k: v for k, v in backbone.state_dict().items() if not k.startswith(heads)}
    own = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    positions = weights.get("pos_embed")
    if positions is None or own is None or tuple(own) == tuple(grid):
        return weights
    tokens, maps = positions.split([positions.shape[1] - own[0] * own[1], own[0] * own[1]], 1)
    maps = maps.unflatten(1, own).permute(0, 3, 1, 2)
    mode = "bilinear" if "dist_token" in weights else "bicubic"
    maps = F.interpolate(maps, size=tuple(grid), mode=mode)
    return weights | {"pos_embed": torch.cat((tokens, maps.flatten(2).mT), 1)}
