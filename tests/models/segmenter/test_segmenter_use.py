"""What a Segmenter gives: attention maps, class embeddings, results of pictures, training."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segkern
from segkern.cli import main
from segkern.data import Digits, DigitsConfig
from segkern.evaluation.evaluate import evaluate
from segkern.models.segmenter.config import SegmenterConfig
from segkern.models.segmenter.explain import attention_maps, class_positions, explain
from segkern.models.segmenter.model import Segmenter


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


def test_segment_averages_windows_scales_and_mirrors():
    built = model().train()
    image = np.random.default_rng(1).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    result = segkern.segment(
        built, image, "semantic", stride=16, scales=(1.0, 1.5), flip=True, return_scores=True
    )
    assert built.training
    assert result.segmentation.shape == (40, 70)
    assert result.scores.shape == (4, 40, 70)
    torch.testing.assert_close(result.scores.sum(0), torch.ones(40, 70))
    assert torch.equal(result.segmentation, result.scores.argmax(0).int())
    assert sum(s.area for s in result.segments) == 40 * 70
    plain = segkern.segment(built, [image], "semantic")
    assert plain[0].scores is None


def test_windows_of_images_of_one_size_go_through_the_model_together():
    built, seen = model(), []
    predict = built.predict
    built.predict = lambda x: seen.append(len(x)) or predict(x)
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 255, (32, 48, 3), dtype=np.uint8) for _ in range(5)]
    together = segkern.segment(built, images, batch_size=2, return_scores=True)
    assert seen == [4, 4, 2], "two windows an image"
    for image, result in zip(images, together):
        alone = segkern.segment(built, image, return_scores=True)
        torch.testing.assert_close(alone.scores, result.scores)


BAD_CALLS = {
    "task": ({"task": "panoptic"}, "task must be 'semantic' for a Segmenter, got 'panoptic'"),
    "stride > window": ({"stride": 33}, r"stride must be <= window \(32\), got 33"),
    "stride > its window": ({"window": 8, "stride": 9}, r"stride must be <= window \(8\), got 9"),
    "stride 0": ({"stride": 0}, "stride must be >= 1, got 0"),
    "window 0": ({"window": 0}, "window must be >= 1, got 0"),
    "window < 0": ({"window": -32}, "window must be >= 1, got -32"),
    "scales": ({"scales": (0.0,)}, r"scales must be positive, got \(0.0,\)"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_of_segment(case):
    change, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        segkern.segment(model(), np.zeros((9, 9, 3), np.uint8), **({"task": "semantic"} | change))


@pytest.mark.parametrize("value", ["32", 32.0, True, (32, 32)], ids=str)
@pytest.mark.parametrize("name", ["window", "stride"])
def test_windows_of_another_type(name, value):
    message = re.escape(f"segment: {name} must be an integer, got {value!r}")
    with pytest.raises(TypeError, match=message):
        segkern.segment(model(), np.zeros((9, 9, 3), np.uint8), "semantic", **{name: value})


@pytest.mark.parametrize("size", [(9, 9), (40, 7), (1, 60)], ids=str)
@pytest.mark.parametrize("window", [8, 24, 50, 100])
def test_any_window_covers_any_image(size, window):
    """Windows and images that no patch divides, images that are smaller than the window."""
    image = np.random.default_rng(2).integers(0, 255, (*size, 3), dtype=np.uint8)
    result = segkern.segment(
        model(shortest_edge=8, longest_edge=64), image, "semantic", window=window,
        return_scores=True,
    )  # fmt: skip
    assert result.segmentation.shape == size
    torch.testing.assert_close(result.scores.sum(0), torch.ones(size))


MEMORY = """
import torch
import segkern
from segkern.models.segmenter import Segmenter, SegmenterConfig

H, W, K = 2048, 4096, 150
small = dict(patch_size=32, embed_dim=64, depth=1, num_heads=1, decoder_layers=1)
config = SegmenterConfig(num_labels=K, shortest_edge=H, longest_edge=W, **small)
model = Segmenter(config)

def memory(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

image = torch.zeros(3, H, W, dtype=torch.uint8)
tiny = Segmenter(SegmenterConfig(num_labels=2, shortest_edge=64, **small))
segkern.segment(tiny, image[:, :64, :64], "semantic", window=64, stride=64)
before = memory("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the highest mark starts anew
found = segkern.segment(model, image, "semantic", window=512, stride=512)
assert found.segmentation.shape == (H, W)
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts it there")
def test_memory_does_not_grow_with_labels_times_pixels():
    """2048 x 4096, 150 labels: what resizing and normalising the image takes, and no [K, H, W]."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    pixels = 2048 * 4096
    most = 1.5 * 4 * (4 * 3 * pixels + pixels)  # four float images at once, and the map
    assert int(run.stdout) <= most < 4 * 150 * pixels / 5


def test_evaluate_takes_the_semantic_task():
    built = model(num_labels=11)
    data = Digits(DigitsConfig(size=(32, 32), task="semantic"), "test")
    value = evaluate(built, data, ("semantic",), 2, progress=False)
    assert 0 <= value["miou"] <= 1

    class Prepared(Digits):
        def __getitem__(self, i):
            return {k: v for k, v in super().__getitem__(i).items() if k != "image"}

    prepared = Prepared(data.config, "test")
    mirrored = evaluate(built, data, ("semantic",), 2, flip=True, progress=False)
    again = evaluate(built, prepared, ("semantic",), 2, flip=True, progress=False)
    assert again["classes"] == mirrored["classes"] != value["classes"]
    with pytest.raises(ValueError, match=r"scales must be \(1.0,\) for samples without image"):
        evaluate(built, prepared, ("semantic",), 2, scales=(0.5, 1), progress=False)
    with pytest.raises(ValueError, match="evaluate: task must be 'semantic' for a Segmenter"):
        evaluate(built, data, ("panoptic",), 2, progress=False)


def test_train_evaluate_predict_and_explain_from_the_command_line(tmp_path, capsys):
    run = tmp_path / "run"
    small = [
        "--model.depth",
        "1",
        "--model.embed-dim",
        "64",
        "--model.num-heads",
        "1",
        "--data.size",
        "32",
        "32",
    ]
    small += ["--model.image-size", "32", "32", "--evaluate-every", "0", "--no-tensorboard"]
    train = ["train", "--recipe", "digits-segmenter", "--output", str(run), "--steps", "2"]
    assert main([*train, "--batch-size", "2", *small]) == 0
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 0
    folder = ["--model", str(run)]
    assert main(["evaluate", str(run), "--scenes", "2", "--size", "32", "32"]) == 0
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(picture)
    out = tmp_path / "out"
    assert main(["predict", str(picture), *folder, "--out", str(out)]) == 0  # semantic
    assert list(out.glob("*.json"))
    assert main(["explain", str(picture), *folder, "--out", str(out / "explain.png")]) == 0
    assert (out / "explain.png").is_file()
    assert main(["predict", str(picture), *folder, "--out", str(out), "--task", "panoptic"]) == 2
    assert "task must be 'semantic' for a Segmenter" in capsys.readouterr().err
