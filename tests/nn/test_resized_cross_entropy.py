"""The loss of resized logits by bands; tests of Segmenter compare its values and gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from segkern.nn import bilinear
from segkern.nn.resized_cross_entropy import _bands, resized_cross_entropy
from support.cuda import Copies


def test_the_loss_copies_nothing_to_a_gpu():
    """A copy of ordinary memory cannot be captured in a CUDA graph."""
    with FakeTensorMode(), Copies() as copies:
        logits = torch.randn(2, 4, 6, 7, device="cuda", requires_grad=True)
        labels = torch.zeros(2, 24, 28, dtype=torch.int64, device="cuda")
        loss = resized_cross_entropy(logits, labels, (24, 28))  # makes the gradient too
    assert loss.is_cuda
    assert not copies.seen


def test_a_gpu_takes_many_rows_at_once():
    """A batch of ADE20K's size, where each band costs a dozen launches."""
    with torch.device("meta"):
        maps, labels = torch.empty(32, 150, 32, 32), torch.empty(32, 512, 512)
    bands = [*_bands(maps, labels, (512, 512))]
    assert len(bands) == 10
    assert [y for band in bands for y in band] == [*range(512)]


@pytest.mark.parametrize("sizes", [(6, 24), (7, 5), (1, 9), (9, 1), (512, 37)], ids=str)
def test_weights_of_bands_are_those_of_a_resize(sizes):
    size, out = sizes
    want = bilinear.resized(torch.eye(size, dtype=torch.float64), out)
    for start in range(0, out, 4):
        rows = range(start, min(start + 4, out))
        first, weights = bilinear.neighbours(rows, size, out)
        got = torch.zeros(len(rows), size, dtype=torch.float64)
        got[:, first : first + weights.shape[1]] = weights
        torch.testing.assert_close(got, want[rows.start : rows.stop], rtol=0, atol=1e-13)
