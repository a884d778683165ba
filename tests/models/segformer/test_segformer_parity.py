"""SegFormer against transformers on random weights, in float64: logits, losses, gradients, memory.

Both sides get the same weights, ours through a folder that transformers wrote.
"""

import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import SegformerConfig as ReferenceConfig
from transformers import SegformerForSemanticSegmentation as Reference

from segkern.models import SegFormer, SegFormerConfig
from segkern.models.segformer import huggingface
from segkern.nn.mlp_head import MLPHead

SHAPES = {
    "b0-like": {
        "hidden_sizes": [16, 32, 40, 64],
        "depths": [1, 2, 1, 1],
        "decoder_hidden_size": 48,
    },
    "b2-like": {
        "hidden_sizes": [32, 64, 80, 128],
        "depths": [2, 1, 2, 1],
        "decoder_hidden_size": 96,
    },
}
LABELS = 7


def noisy_reference(shape: str) -> Reference:
    """transformers' model with random weights and statistics, so that an error in any is seen."""
    torch.manual_seed(0)
    rates = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    model = Reference(ReferenceConfig(num_labels=LABELS, **SHAPES[shape], **rates)).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
        norm = model.decode_head.batch_norm
        norm.running_mean.copy_(torch.randn(norm.bias.shape, generator=g))
        norm.running_var.copy_(torch.rand(norm.bias.shape, generator=g) + 0.5)
    return model


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """(reference, ours), both float64 in eval mode, with the same weights."""
    reference, folder = noisy_reference(request.param), tmp_path_factory.mktemp("reference")
    reference.save_pretrained(folder)
    return reference.double(), SegFormer.from_pretrained(folder).double()


def images(B, H, W):
    return torch.randn(B, 3, H, W, dtype=torch.float64)


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


# --- logits ---------------------------------------------------------------------------------

SIZES = [(64, 96), (97, 130), (29, 61), (40, 33)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@torch.no_grad()
def test_logits_equal_the_reference(pair, size):
    reference, ours = pair
    x = images(2, *size)
    want, have = reference(x).logits, ours(x).logits
    assert want.shape == have.shape == (2, LABELS, -(-size[0] // 4), -(-size[1] // 4))
    assert error(want, have) < 1e-8
    assert want.std() > 0.1
    maps, stride = ours.predict(x)
    assert torch.equal(maps, have)
    assert stride == 4


@torch.no_grad()
def test_float32_is_as_accurate_as_the_reference(pair):
    reference, ours = pair
    x = images(1, 97, 130)
    exact = reference(x).logits
    try:
        theirs, have = (model.float()(x.float()).logits for model in pair)
    finally:
        reference.double(), ours.double()
    # about a hundred operations follow one another: roundings add up as its root, 10
    rounding = 10 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error(have, exact) <= max(2 * error(theirs, exact), rounding)


# --- losses and gradients -------------------------------------------------------------------

CASES = {
    "training": (True, (64, 96), (64, 96)),
    "training, odd sides": (True, (53, 70), (53, 70)),
    "training, labels of another size": (True, (64, 64), (50, 75)),
    "evaluation": (False, (64, 96), (64, 96)),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_reference(pair, case, tmp_path):
    training, size, labelled = CASES[case]
    x, labels = images(2, *size), torch.randint(LABELS, (2, *labelled))
    labels[0, :20] = 255  # the images have different numbers of pixels that count
    statistics = [{k: v.clone() for k, v in model.named_buffers()} for model in pair]
    outs = []
    for model in pair:
        model.train(training).zero_grad()
        outs.append(model(x, labels=labels))
        outs[-1].loss.backward()
    reference, ours = pair
    want, have = outs
    assert error(have.loss, want.loss) <= 1e-8 * want.loss.item()
    assert error(have.logits, want.logits) < 1e-8
    norm = reference.decode_head.batch_norm
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(
            getattr(ours.head.norm, name), getattr(norm, name), rtol=1e-10, atol=1e-12
        )
    for model, kept in zip(pair, statistics):
        for name, value in model.eval().named_buffers():
            value.copy_(kept[name])

    # the reference's gradients travel as if they were weights: that maps the names
    for p in reference.parameters():
        p.data, p.kept = p.grad, p.data
    reference.save_pretrained(tmp_path)
    for p in reference.parameters():
        p.data = p.kept
    _, gradients = huggingface.read_folder(tmp_path)
    everything = sum(p.grad.square().sum() for p in reference.parameters())
    for name, p in ours.named_parameters():
        g = gradients[name]
        bound = 1e-6 * (g.norm() + 1e-6 * everything.sqrt())
        assert (p.grad - g).norm() <= bound, name


def test_no_pixel_counts_and_what_a_batch_is_divided_by(pair):
    _, ours = pair
    x, labels = images(1, 32, 32), torch.full((1, 32, 32), 255)
    assert ours(x, labels=labels).loss == 0  # where transformers has NaN
    labels[0, 0, :8] = 1
    loss = ours(x, labels=labels).loss
    torch.testing.assert_close(
        ours(x, labels=labels, normalizer=torch.tensor(16)).loss, loss / 2, rtol=1e-12, atol=0
    )


# --- the head -------------------------------------------------------------------------------


def papers_head(head: MLPHead, maps: list[torch.Tensor]) -> torch.Tensor:
    """As the paper writes it: project, resize, lay side by side, project, normalise."""
    size, levels = maps[0].shape[2:], []
    for x, layer in zip(maps, head.linears):
        x = F.linear(x.movedim(1, 3), layer.weight, layer.bias).movedim(3, 1)
        levels.append(F.interpolate(x, size=size, mode="bilinear", align_corners=False))
    x = F.conv2d(torch.cat(levels[::-1], 1), head.fuse.weight[..., None, None])
    x = head.norm(x).relu()
    return F.conv2d(x, head.classifier.weight[..., None, None], head.classifier.bias)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@torch.no_grad()
def test_the_composed_head_is_the_papers(training):
    torch.manual_seed(3)
    head = MLPHead((8, 12, 20, 24), 32, 5).double().train(training)
    head.norm.weight.normal_(), head.norm.bias.normal_()
    head.norm.running_mean.normal_(), head.norm.running_var.uniform_(0.1, 4)
    sizes = ((8, (25, 33)), (12, (13, 17)), (20, (7, 9)), (24, (4, 5)))
    maps = [torch.randn(2, c, *size, dtype=torch.float64) for c, size in sizes]
    kept = {k: v.clone() for k, v in head.norm.state_dict().items()}
    want = papers_head(head, maps)
    head.norm.load_state_dict(kept)
    assert error(head(maps), want) <= 1e-12 * want.abs().max()


# --- memory ---------------------------------------------------------------------------------


class _Live(TorchDispatchMode):
    """Counts bytes of what ops make, as long as it lives, and finds the largest tensor."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.seen = {}

    def _freed(self, key):
        self.now -= self.seen.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen[key] = size
                    self.now += size
                    weakref.finalize(storage, self._freed, key)
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, t.numel())
        return out


def counted(model, config, size):
    """Bytes at the highest and values of the largest tensor of an inference that is not run."""
    with torch.device("meta"):
        model = model(config).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, x = model.to_empty(device="cpu"), torch.empty(1, 3, size, size)
        with _Live() as live:
            model(x)
    return live


def test_b2_at_1024_is_never_laid_side_by_side():
    """Half of what transformers holds, and no tensor larger than one map of the head's width."""
    ours = replace(SegFormerConfig.preset("b2"), depths=(1, 1, 1, 1))  # blocks come and go
    sizes = {"hidden_sizes": ours.hidden_sizes, "depths": ours.depths, "num_labels": 150}
    theirs = ReferenceConfig(decoder_hidden_size=768, **sizes)
    want, have = counted(Reference, theirs, 1024), counted(SegFormer, ours, 1024)
    one = 768 * 256 * 256
    assert want.largest == 4 * one
    assert have.largest == one
    assert have.peak <= 0.5 * want.peak


# --- files ----------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_folder_opens_again_and_in_the_reference(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path)
    x = images(1, 64, 96)
    want = ours(x).logits
    again = SegFormer.from_pretrained(tmp_path)
    assert again.config == ours.config
    theirs, loading = Reference.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float64
    )
    assert not any(loading.values()), loading
    assert error(theirs.eval()(x).logits, want) < 1e-8
    assert error(again.double()(x).logits, want) < 1e-8
    for part in theirs.modules():
        assert not isinstance(part, nn.BatchNorm2d) or part.eps == ours.head.norm.eps
