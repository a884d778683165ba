"""Checks a segkern that is installed, not the one of this tree: for `make sdist`."""

import sys
from pathlib import Path

import torch

import segkern
from segkern.ops import _library

assert Path(segkern.__file__).is_relative_to(sys.prefix), segkern.__file__
assert "cpu" not in _library.MISSING, _library.MISSING["cpu"]

from segkern import _host  # noqa: E402, F401  (it was built, too)

torch.manual_seed(0)
features, points = torch.rand(1, 2, 5, 7), torch.rand(1, 9, 2)
by_kernel = segkern.ops.point_sample(features, points)
by_reference = segkern.ops.point_sample(features, points, impl="reference")
torch.testing.assert_close(by_kernel, by_reference)

image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
model = segkern.Mask2Former(segkern.Mask2FormerConfig.tiny(3)).eval()
assert segkern.segment(model, image.permute(1, 2, 0).numpy()).segmentation.shape == (64, 96)
