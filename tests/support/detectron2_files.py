"""Checkpoints of detectron2 that tests write and read, of small models with weights that all
matter."""

import pickle
from collections import OrderedDict
from functools import cache

import torch

from . import detectron2_mask2former as detectron2

SIZES = {"K": 7, "C": 64, "M": 32, "Q": 9, "encoder": 1, "decoder": 4, "inner": 96, "width": 80}
SWIN = {"embed_dim": 24, "depths": (1, 2, 2, 2), "num_heads": (1, 2, 3, 6), "window_size": 4}
BACKBONES = {
    "swin": lambda: detectron2.Swin(**SWIN),
    "resnet": lambda: detectron2.ResNet(),
}


@cache
def reference(backbone):
    """The original's model with weights that all matter: noise moves what starts as a constant,
    and samples away from the kinks of bilinear interpolation."""
    torch.manual_seed(0)
    model = detectron2.Mask2Former(BACKBONES[backbone](), **SIZES).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running" in name or name.endswith("norm.weight"):
                value.mul_(torch.rand_like(value) + 0.5)
            if value.is_floating_point() and "running_var" not in name:
                value.add_(torch.randn_like(value) * (0.3 if "offsets.bias" in name else 0.03))
    return model


def saved(path, state, **beside):
    """As detectron2's checkpointer writes it."""
    content = {"model": state, **beside}
    if path.suffix == ".pth":
        torch.save(content, path)
    else:
        arrays = OrderedDict((name, value.numpy()) for name, value in state.items())
        arrays._metadata = getattr(state, "_metadata", None)
        path.write_bytes(pickle.dumps({"__author__": "x", **content, "model": arrays}, 4))
    return path


def written(path):
    """Weights that a file holds, as it holds them."""
    if path.suffix == ".pth":
        return torch.load(path, weights_only=True)["model"]
    found = pickle.loads(path.read_bytes())["model"]
    return OrderedDict((name, torch.from_numpy(value)) for name, value in found.items())


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
        assert a[name].dtype == b[name].dtype, name
