"""Explains a Segmenter: attention of a patch and of classes, and how its classes lie.

Letters: N patch (h x w of them), D channels, K class, head a of A.

    attention of a token t in a block = softmax_s(q_t . k_s / sqrt(D / A)), mean over the heads
    class embeddings [K, D] = U S V^T; a class lies at the first two columns of U S

Source: Segmenter (Strudel et al., ICCV 2021), appendices A and B.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...io import plots
from ...io.images import prepare, read_image, shown
from ...nn.vit import MaskTransformer
from ...runtime.modes import evaluated
from .model import Segmenter


def attention_maps(
    model: Segmenter,
    pixel_values: Tensor,
    layers: Sequence[int],
    patch: tuple[int, int],
    part: str = "encoder",
    label: int | None = None,
) -> Tensor:
    """Where a patch, or a class, looks.

    Args:
        model: in whatever mode; the mode stays, dropout is off.
        pixel_values: [1, 3, H, W] floating, normalised.
        layers: blocks of the part, from 0.
        patch: row and column of the patch that looks.
        part: "encoder" or "decoder" (the mask transformer).
        label: in the decoder, the class that looks in place of the patch.

    Returns:
        [layers, h, w] float32: the attention to each patch, mean over the heads; what goes to
        other tokens is missing from the sum of 1.

    Raises:
        ValueError: no such part, layer, patch or label.
    """
    if part not in ("encoder", "decoder") or (
        part == "decoder" and not isinstance(model.decoder, MaskTransformer)
    ):
        raise ValueError(
            "attention_maps: part must be 'encoder', or 'decoder' for a mask transformer, "
            f"got {part!r}"
        )
    p = model.config.patch_size
    h, w = (-(-n // p) for n in pixel_values.shape[2:])
    if not (0 <= patch[0] < h and 0 <= patch[1] < w):
        raise ValueError(f"attention_maps: patch must be in {h} x {w} patches, got {patch}")
    blocks = getattr(model, part).blocks
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise ValueError(f"attention_maps: layers must be in [0, {len(blocks)}), got {layer}")
    first = model.encoder.tokens if part == "encoder" else 0
    token = first + patch[0] * w + patch[1]
    if label is not None:
        if part == "encoder" or not 0 <= label < model.config.num_labels:
            raise ValueError(
                f"attention_maps: label must be in [0, {model.config.num_labels}) with part "
                f"'decoder', got {label} with {part!r}"
            )
        token = h * w + label
    attentions = [blocks[i].attn for i in layers]
    with _projections(attentions) as found, torch.no_grad():
        evaluated(model).predict(pixel_values)
    maps = [_weights(found[a.qkv], a.num_heads, token) for a in attentions]
    return torch.stack(maps)[:, first : first + h * w].unflatten(1, (h, w))


def class_positions(model: Segmenter) -> Tensor:
    """Where the class embeddings lie in the plane of their two largest singular values.

    Returns:
        [K, 2] float32.

    Raises:
        ValueError: the decoder has no class embeddings.
    """
    if not isinstance(model.decoder, MaskTransformer):
        raise ValueError("class_positions: the linear decoder has no class embeddings")
    embeddings = model.decoder.cls_emb.detach()[0].float()
    U, S, _ = torch.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False)
    return U[:, :2] * S[:2]


def explain(
    model: Segmenter,
    image,
    at: tuple[float, float] = (0.5, 0.5),
    out: str | Path = "explain.png",
    layers: Sequence[int] | None = None,
    max_pixels: int | None = None,
) -> None:
    """Draws the attention of the patch at a place, in the encoder and the decoder, and the plane
    of the class embeddings.

    Args:
        model: a `Segmenter`.
        image: as `read_image` takes it.
        at: x and y of the place, in [0, 1] of the image's width and height.
        out: PNG, PDF or SVG to write.
        layers: blocks of the encoder, from 0; None for the first, the middle and the last.
        max_pixels: of a picture in a file, as in `segment`.

    Raises:
        ValueError: a place outside, no such layer, or no image.
        OSError: `out` cannot be written.
    """
    if not all(0 <= v <= 1 for v in at):
        raise ValueError(f"explain: at must be x and y in [0, 1], got {at}")
    picture = read_image(image, max_pixels=max_pixels, channels=model.config.input.channels)
    device = next(model.parameters()).device
    pixels = prepare(picture, model.config.input)[None].to(device)
    p = model.config.patch_size
    h, w = (-(-n // p) for n in pixels.shape[2:])
    place = (at[1] * pixels.shape[2], at[0] * pixels.shape[3])
    patch = tuple(min(int(x / p), n - 1) for x, n in zip(place, (h, w)))
    depth = len(model.encoder.blocks)
    layers = sorted({0, depth // 2, depth - 1}) if layers is None else list(layers)
    maps = attention_maps(model, pixels, layers, patch)
    titles = [f"encoder, block {i + 1}" for i in layers]
    plane = None
    if isinstance(model.decoder, MaskTransformer):
        own = range(len(model.decoder.blocks))
        maps = torch.cat((maps, attention_maps(model, pixels, own, patch, "decoder")))
        titles += [f"decoder, block {i + 1}" for i in own]
        plane = class_positions(model).cpu().numpy()
    names = model.config.id2label or {}
    plots.save_attention(
        out,
        shown(picture).expand(3, -1, -1).permute(1, 2, 0).numpy(),
        _resized(maps, pixels.shape[2:], p).cpu().numpy(),
        titles,
        at,
        plane,
        [names.get(k, str(k)) for k in range(model.config.num_labels)],
    )


def _resized(maps: Tensor, size: Sequence[int], patch: int) -> Tensor:
    """Maps [n, h, w] of patches over the pixels of the model's input, without its padding."""
    whole = tuple(patch * n for n in maps.shape[1:])
    maps = F.interpolate(maps[:, None], whole, mode="bilinear")[:, 0]
    return maps[:, : size[0], : size[1]]


@contextmanager
def _projections(attentions: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """The queries, keys and values [1, N, 3 D] that these attentions form."""
    found: dict[nn.Module, Tensor] = {}
    hooks = [
        a.qkv.register_forward_hook(
            lambda _, inputs, output, qkv=a.qkv: found.update({qkv: output})
        )
        for a in attentions
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _weights(qkv: Tensor, heads: int, token: int) -> Tensor:
    """Attention [N] of one token, mean over the heads."""
    q, k, _ = qkv[0].float().unflatten(1, (3, heads, -1)).unbind(1)  # [N, A, D / A]
    scores = torch.einsum("ad,nad->an", q[token], k) * q.shape[2] ** -0.5
    return scores.softmax(1).mean(0)
