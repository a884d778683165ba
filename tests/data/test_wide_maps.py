"""More than 255 classes: maps of 16 bits from the file to loss and evaluation.

255 is a class as any other, and 65535 does not count.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segkern.data import CocoConfig, FolderConfig, SemanticViews, build_dataset, collate
from segkern.evaluation.evaluate import evaluate
from segkern.models import Segmenter, SegmenterConfig
from segkern.training.distributed import normalized
from support.pictures import CATEGORIES, SEGMENTS, SIZE, noise, write, write_panoptic

K = 300


def tiny():
    sizes = {"image_size": (32, 32), "patch_size": 8, "window_size": 32, "window_stride": 32}
    return SegmenterConfig(
        num_labels=K, embed_dim=64, num_heads=1, depth=1, decoder_layers=1, **sizes
    )


def values():
    found = np.full(SIZE, 255, np.uint16)
    found[:4], found[5:9, 5:20], found[12:20] = 65535, 299, 7
    return found


@pytest.fixture(params=[".png", ".tif"])
def root(request, tmp_path):
    for split in ("train", "val"):
        write(tmp_path / f"images/{split}/a.png", noise(0))
        write(tmp_path / f"labels/{split}/a{request.param}", values())
    (tmp_path / "classes.txt").write_text("\n".join(f"class {k}" for k in range(K)))
    return tmp_path


def test_folder(root):
    data = build_dataset(FolderConfig(root), "train")
    sample = data[0]
    assert sample["semantic"].dtype == np.uint16
    assert np.array_equal(sample["semantic"], values())
    assert data.check(progress=False) == [f"class {k}" for k in range(K) if k not in (7, 255, 299)]
    found = values()
    found[0, 0] = K
    path = next((root / "labels/train").iterdir())
    write(path, found)
    with (
        pytest.warns(UserWarning, match="next picture"),
        pytest.raises(ValueError, match="300 classes, or 65535, got 300: labels count from 0"),
    ):
        data[0]


def test_the_whole_way(root):
    """Views, batch, loss and its gradient, mIoU: against PyTorch with 65535 ignored."""
    views = SemanticViews((24, 32), (30, 40), (0.5,) * 3, (0.5,) * 3)
    data = build_dataset(FolderConfig(root), "train")
    data.views = views
    batch = collate([data[0, 0], data[0, 1]], K, divisor=16)
    semantic = batch.targets.semantic
    assert semantic.shape == (2, 32, 32)
    assert semantic.dtype == torch.uint16
    labels = semantic.long()
    assert {7, 255, 299, 65535} <= {*labels.unique().tolist()} <= {7, 255, 299, 65535}
    assert (labels[:, 24:] == 65535).all()
    targets = normalized(batch.targets)
    assert targets.pixel_normalizer == (labels != 65535).sum()
    model = Segmenter(tiny()).eval()
    loss, _ = model.loss(batch.pixel_values, targets)
    logits = model(batch.pixel_values).logits
    want = F.cross_entropy(logits, labels, ignore_index=65535)
    assert torch.allclose(loss, want, rtol=1e-5)
    weight = next(p for p in model.parameters() if p.ndim > 1)
    ours, theirs = (torch.autograd.grad(x, weight)[0] for x in (loss, want))
    assert torch.allclose(ours, theirs, atol=1e-6)
    val = build_dataset(FolderConfig(root), "val")
    found = evaluate(model, val, ("semantic",), progress=False)
    assert 0 <= found["miou"] < 0.5
    assert {row["name"] for row in found["classes"] if row["iou"] is not None} >= {"class 255"}


def test_panoptic_sets_have_a_map_of_any_number_of_classes(tmp_path):
    more = [{"id": 100 + i, "name": f"other {i}", "isthing": 1} for i in range(K)]
    write_panoptic(tmp_path, SEGMENTS, categories=[*CATEGORIES, *more])
    data = build_dataset(CocoConfig(tmp_path, "panoptic"), "train")
    sample = data[0]
    assert sample["semantic"].dtype == np.uint16
    assert (sample["semantic"][:4] == 65535).all()
    assert (sample["semantic"][22] == data.classes.index("ground")).all()
    assert data.classes.index("ground") == K + 2
