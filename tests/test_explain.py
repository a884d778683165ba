"""Attention maps and class embeddings of a Segmenter."""

import numpy as np
import pytest
import torch
from PIL import Image

from segkern.explain import attention_maps, class_positions, explain
from segkern.models.segmenter import Segmenter, SegmenterConfig


def model(**changes):
    torch.manual_seed(0)
    settings = {"num_labels": 4, "image_size": (32, 32), "patch_size": 8, "embed_dim": 64}
    settings |= {"depth": 3, "num_heads": 2, "window_size": 32, "window_stride": 32}
    return Segmenter(SegmenterConfig(**settings | {"shortest_edge": 32} | changes)).eval()


def spelled_out(attn, x, token):
    """Attention of a token in a block's input [1, N, D], mean over the heads."""
    q, k, _ = (x @ attn.qkv.weight.T + attn.qkv.bias)[0].chunk(3, -1)
    rows = []
    for head in range(attn.num_heads):
        part = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
        rows.append((k[:, part] @ q[token, part] / attn.head_dim**0.5).softmax(0))
    return sum(rows) / attn.num_heads


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_maps_are_the_blocks_attention(part):
    built = model()
    inputs = []
    for block in getattr(built, part).blocks:
        block.norm1.register_forward_hook(lambda m, i, o: inputs.append(o))
    image = torch.randn(1, 3, 24, 40)
    layers = [1, 0]
    found = attention_maps(built, image, layers, (2, 3), part)
    assert found.shape == (2, 3, 5)
    first = 1 if part == "encoder" else 0
    for i, layer in enumerate(sorted(layers)):
        want = spelled_out(getattr(built, part).blocks[layer].attn, inputs[layer], first + 13)
        torch.testing.assert_close(
            found[layers.index(layer)].flatten(), want[first : first + 15], msg=str(i)
        )


def test_a_class_looks():
    built = model()
    image = torch.randn(1, 3, 32, 32)
    maps = [attention_maps(built, image, [1], (0, 0), "decoder", k) for k in range(4)]
    assert all(m.shape == (1, 4, 4) and 0 < m.sum() <= 1 for m in maps)
    assert not torch.equal(maps[0], maps[1])


def test_class_positions_keep_distances_in_a_plane():
    built = model()
    with torch.no_grad():
        built.decoder.cls_emb.zero_()
        built.decoder.cls_emb[0, :, :2] = torch.tensor([[0.0, 0], [3, 0], [0, 4], [3, 4]])
    places = class_positions(built)
    torch.testing.assert_close(torch.pdist(places), torch.tensor([3.0, 4, 5, 5, 4, 3]))


@pytest.mark.parametrize("decoder", ["mask", "linear"])
def test_the_figure_is_written(decoder, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    built = model(decoder=decoder).train()
    explain(built, image, (0.99, 0.0), tmp_path / "a" / "explain.png")
    assert built.training
    with Image.open(tmp_path / "a" / "explain.png") as picture:
        assert min(picture.size) > 200
        assert len(set(picture.convert("L").getdata())) > 20


BAD = {
    "part": ({"part": "head"}, "part must be 'encoder', or 'decoder'"),
    "layer": ({"layers": [3]}, r"layers must be in \[0, 3\), got 3"),
    "patch": ({"patch": (4, 0)}, r"patch must be in 4 x 4 patches, got \(4, 0\)"),
    "label": ({"part": "decoder", "layers": [0], "label": 4}, r"label must be in \[0, 4\)"),
    "label of the encoder": ({"label": 1}, "with part 'decoder', got 1 with 'encoder'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        attention_maps(
            model(), torch.randn(1, 3, 32, 32), **({"layers": [0], "patch": (0, 0)} | change)
        )


def test_bad_places_and_decoders():
    with pytest.raises(ValueError, match=r"at must be x and y in \[0, 1\], got \(2, 0\)"):
        explain(model(), np.zeros((9, 9, 3), np.uint8), (2, 0))
    with pytest.raises(ValueError, match="linear decoder has no class embeddings"):
        class_positions(model(decoder="linear"))
