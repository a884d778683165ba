"""Between the pixels and a result the host waits once, shown on a GPU that is not there.

Fake tensors have shapes and a device and no values: what would read one on the host fails.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from segkern.inference import postprocess
from segkern.inference import segment as segments
from segkern.inference.segment import segment
from segkern.structures.logits import PixelLogits
from support.models import Squares, model_config

pytestmark = pytest.mark.cpu_only


class OnGPU(Squares):
    def predict(self, pixel_values):
        with torch.device("cuda"):
            return super().predict(pixel_values)


class Pixels(nn.Module):
    """Class logits of pixels: the mean colour times each class's weight."""

    def __init__(self):
        super().__init__()
        self.config = model_config(5, logits=PixelLogits, window=32, stride=16)
        self.weight = nn.Parameter(torch.randn(5))

    def inputs(self, task, batch):
        return ()

    def predict(self, pixel_values):
        grey = nn.functional.avg_pool2d(pixel_values.mean(1, keepdim=True), 8)
        return PixelLogits(grey * self.weight[:, None, None], 8)


class Copies(TorchDispatchMode):
    """Counts the tensors that go from the host to a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and out.is_cuda:
            self.count += any(t.device.type == "cpu" for t in args if isinstance(t, torch.Tensor))
        return out


CASES = {
    "panoptic": (OnGPU, {"task": "panoptic"}),
    "instance": (OnGPU, {"task": "instance", "threshold": 0.3}),
    "semantic": (OnGPU, {"task": "semantic"}),
    "semantic, with scores": (OnGPU, {"task": "semantic", "return_scores": True}),
    "pixels": (Pixels, {}),
    "pixels, mirrored, with scores": (Pixels, {"flip": True, "return_scores": True}),
}


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_once(case, images, monkeypatch):
    """However many images go through the model together."""
    kind, options = CASES[case]
    read = []

    def note(values):
        read.append(values)
        return [1] * values.numel()

    monkeypatch.setattr(postprocess, "_on_host", note)
    # nothing of this test may be kept
    monkeypatch.setattr(postprocess, "_is_stuff", postprocess._is_stuff.__wrapped__)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = kind().eval()
        with Copies() as copies:
            pictures = [np.zeros((40, 60, 3), np.uint8)] * images
            found = segment(model, pictures, cuda_graphs=False, **options)
    assert len(read) == 1
    assert read[0].is_cuda
    assert copies.count == images  # of the pixels
    assert len(found) == images
    for out in found:
        assert out.segmentation.is_cuda
        assert out.segmentation.shape == (40, 60)


def test_areas_that_no_host_reads():
    labels = torch.randint(0, 7, (23, 31), dtype=torch.int32) // 2 * 2
    count = postprocess._areas_unread(labels, 9)
    assert torch.equal(count, labels.flatten().bincount(minlength=9))


class Ops(TorchDispatchMode):
    """Notes the ops that run outside a graph."""

    def __init__(self):
        super().__init__()
        self.seen = set()
        self.replays = False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not self.replays:
            self.seen.add(op)
        return op(*args, **(kwargs or {}))

    def let_pass(self, graph, monkeypatch):
        replay = graph.replay

        def inside():
            self.replays = True
            replay()
            self.replays = False

        monkeypatch.setattr(graph, "replay", inside)


def noise(height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, 60, 3), dtype=np.uint8)


def finds(ops):
    """Whether ops look for segments: those of segkern, and the softmax that comes first."""
    return {op for op in ops if op.namespace == "segkern" or "softmax" in op.__name__}


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_a_graph_goes_on_to_what_the_host_reads(task, everywhere, monkeypatch):
    """Sizes that come again: the maps and the table of segments are in the model's graph."""
    model = Squares().eval()
    for seed in range(3):
        segment(model, noise(40, seed), task)
    (graph,) = everywhere
    assert finds(op for op, *_ in graph.notes)
    want = segment(Squares().eval(), noise(40, 3), task, cuda_graphs=False)
    with Ops() as beside:
        beside.let_pass(graph, monkeypatch)
        found = segment(model, noise(40, 3), task)
    assert beside.seen
    assert not finds(beside.seen)
    assert everywhere == [graph]
    assert torch.equal(found.segmentation, want.segmentation)
    assert found.segments == want.segments


def test_results_of_ever_new_sizes_follow_the_graph_of_the_model(everywhere):
    """33 to 38 rows become 48 in the model, and the results have as many as the pictures."""
    model = Squares().eval()
    for height in range(33, 39):
        want = segment(Squares().eval(), noise(height), "panoptic", cuda_graphs=False)
        found = segment(model, noise(height), "panoptic")
        assert torch.equal(found.segmentation, want.segmentation)
    (graph,) = everywhere
    assert not finds(op for op, *_ in graph.notes)


def test_large_results_stay_out_of_graphs(everywhere, monkeypatch):
    monkeypatch.setattr(segments, "PIXELS_AT_ONCE", 40 * 60 - 1)
    model = Squares().eval()
    for seed in range(4):
        segment(model, noise(40, seed), "semantic")
    (graph,) = everywhere
    assert not finds(op for op, *_ in graph.notes)
