"""Mask2Former against transformers on random weights: logits, losses, gradients, files.

Both sides get the same weights (ours through a folder written by transformers), the same masks in
the float32 test and the same random points in the loss tests.
"""

import pytest
import torch
from transformers import Mask2FormerConfig as ReferenceConfig
from transformers import Mask2FormerForUniversalSegmentation as Reference
from transformers import ResNetConfig, SwinConfig
from transformers.models.mask2former import modeling_mask2former as reference_module

from segkern.models import Mask2Former
from segkern.models.mask2former import huggingface
from segkern.nn import query_decoder
from segkern.ops import random_points
from segkern.ops.point_sample import MATCHING
from segkern.structures.targets import Targets
from support.inputs import random_targets

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {  # those of full depth have 6 layers in the pixel decoder as well
    "swin": lambda: SwinConfig(depths=[2, 2, 2, 2], drop_path_rate=0.0, out_features=STAGES),
    "resnet": lambda: ResNetConfig(depths=[1, 2, 2, 1], out_features=STAGES),
    "swin_tiny, full depth": lambda: SwinConfig(drop_path_rate=0.0, out_features=STAGES),
    "resnet50, full depth": lambda: ResNetConfig(out_features=STAGES),
}
LABELS, QUERIES, POINTS = 7, 12, 112


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy_reference(backbone: str) -> Reference:
    """transformers' model with random weights, away from the points where its gradient jumps.

    At initialisation the sampling offsets sit on the kinks of bilinear sampling, many biases are
    zero, and BatchNorm's statistics are 0 and 1: noise makes an error in any of them visible.
    """
    torch.manual_seed(0)
    model = Reference(
        ReferenceConfig(
            backbone_config=BACKBONES[backbone](),
            num_labels=LABELS,
            num_queries=QUERIES,
            encoder_layers=6 if "full" in backbone else 2,
            train_num_points=POINTS,
        )
    ).eval()
    g = generator(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            sigma = {"sampling_offsets.bias": 0.3, "sampling_offsets.weight": 0.01}
            scale = sigma.get(".".join(name.split(".")[-2:]), 0.05 if p.ndim == 1 else 0.0)
            p.add_(torch.randn(p.shape, generator=g) * scale)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.copy_(torch.rand(module.weight.shape, generator=g) + 0.5)
                module.running_mean.copy_(torch.randn(module.bias.shape, generator=g) * 0.1)
                module.running_var.copy_(torch.rand(module.bias.shape, generator=g) + 0.5)
    return model


@pytest.fixture(
    scope="module",
    params=[pytest.param(b, marks=[pytest.mark.slow] * ("full" in b)) for b in BACKBONES],
)
def pair(request, tmp_path_factory):
    """(reference, ours), both float64 in eval mode, with the same weights."""
    reference = noisy_reference(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return reference.double(), Mask2Former.from_pretrained(folder).double()


def images(B, H, W, dtype=torch.float64):
    return torch.randn(B, 3, H, W, generator=generator(2)).to(dtype)


def padded_batch():
    x = images(2, 160, 224)
    x[1, :, 150:] = 0
    x[1, :, :, 128:] = 0
    return x


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


# --- logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(lambda: images(1, 384, 384), id="384x384"),
        pytest.param(lambda: images(1, 352, 480), id="352x480"),
        pytest.param(padded_batch, id="two sizes padded"),
        pytest.param(lambda: images(1, 97, 130), id="97x130 no multiple of 32"),
    ],
)
@torch.no_grad()
def test_logits_of_all_predictions_equal_the_reference(pair, batch):
    reference, ours = pair
    x = batch()
    want = reference(x, output_auxiliary_logits=True)
    have = ours(x, output_auxiliary_logits=True)
    predictions = [*want.auxiliary_logits, want], [*have.auxiliary_logits, have]
    assert len(predictions[0]) == len(predictions[1]) == 10
    for r, (a, b) in enumerate(zip(*predictions)):
        for name in ("class_queries_logits", "masks_queries_logits"):
            u, v = (o[name] if isinstance(o, dict) else getattr(o, name) for o in (a, b))
            assert u.shape == v.shape
            assert error(u, v) < 1e-8, f"prediction {r}, {name}"
    assert want.masks_queries_logits.std() > 0.1  # the masks are not all open or all closed


@torch.no_grad()
def test_hidden_states_have_the_references_names_order_and_values(pair):
    reference, ours = pair
    x, asked = images(2, 97, 130), {"output_hidden_states": True, "output_auxiliary_logits": True}
    want, have = reference(x, **asked), ours(x, **asked)
    assert list(have) == [name for name in want if name != "attentions"]
    assert list(ours(x)) == list(reference(x))
    for name in list(have)[3:]:  # behind the logits
        a, b = ([o[name]] if isinstance(o[name], torch.Tensor) else o[name] for o in (want, have))
        for u, v in zip(a, b, strict=True):
            u = u.transpose(0, 1) if name == "transformer_decoder_hidden_states" else u
            assert error(u, v) < 1e-8, name
            assert u.shape == v.shape


# --- losses and gradients -------------------------------------------------------------------


class SamePoints:
    """Stands in for the reference's torch.rand: gives it our points, in the order it asks.

    The reference treats the last prediction first, then the others; for each it matches image by
    image, then draws the candidates and the random rest of all matched pairs, image by image.
    """

    def __init__(self, monkeypatch, seed, ids, predictions):
        self.seed, self.ids = seed, ids
        self.order = iter([predictions - 1, *range(predictions - 1)])
        self.matched = None
        self.calls = 0
        match = reference_module.Mask2FormerHungarianMatcher.forward

        def recorded(*args):
            self.calls, self.prediction = 0, next(self.order)
            self.matched = match(*args)
            return self.matched

        monkeypatch.setattr(reference_module.Mask2FormerHungarianMatcher, "forward", recorded)
        monkeypatch.setattr(reference_module.torch, "rand", self)

    def __call__(self, n, points, two, device=None):
        call, self.calls = self.calls, self.calls + 1
        if call < len(self.ids):
            slots = [(self.ids[call], self.prediction, MATCHING)]
        else:
            slots = [
                (self.ids[b], self.prediction, t)
                for b, (_, targets) in enumerate(self.matched)
                for t in targets.tolist()
            ]
        assert n == len(slots)
        slots = torch.tensor(slots, dtype=torch.int64).view(-1, 3)
        candidates = int(POINTS * 3.0)
        if call <= len(self.ids):
            return random_points(self.seed, slots, points).double()
        return random_points(self.seed, slots, candidates + points)[:, candidates:].double()


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param((3, 5), id="3 and 5 targets"),
        pytest.param((0, 4), id="an image without target"),
        pytest.param((QUERIES + 3, 2), id="more targets than queries"),
    ],
)
def test_losses_and_gradients_equal_the_reference(pair, counts, monkeypatch, tmp_path):
    reference, ours = pair
    x = images(2, 96, 128)
    masks, labels = random_targets(counts, LABELS, 96, 128)
    ids = [5, 11]
    targets = Targets.from_lists(masks, labels, num_labels=LABELS, ids=ids)
    reference.zero_grad()
    ours.zero_grad()
    seed = ours.criterion.seed.clone()
    out = ours(x, targets=targets)
    out.loss.backward()

    parts = {}
    weigh = reference.get_loss_dict
    monkeypatch.setattr(reference, "get_loss_dict", lambda **k: parts.update(weigh(**k)) or parts)
    SamePoints(monkeypatch, seed, ids, predictions=10)
    want = reference(x, mask_labels=[m.double() for m in masks], class_labels=labels)
    want.loss.backward()

    order = [f"_{r}" for r in range(9)] + [""]  # the reference's last prediction has no number
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    assert len(parts) == 30
    for name, weight in weights.items():
        for have, suffix in zip(out.losses[name] * weight, order, strict=True):
            value = parts[name + suffix]
            assert error(have, value) <= 1e-8 * value.abs().item() + 1e-12, name + suffix
    assert error(out.loss, want.loss) <= 1e-8 * want.loss.item()

    # the reference's gradients travel as if they were weights: that maps the names
    for p in reference.parameters():
        p.data, p.kept = (torch.zeros_like(p) if p.grad is None else p.grad), p.data
    reference.save_pretrained(tmp_path)
    for p in reference.parameters():
        p.data = p.kept
    _, gradients = huggingface.read_folder(tmp_path)
    everything = sum(p.grad.square().sum() for p in reference.parameters() if p.grad is not None)
    for name, p in ours.named_parameters():
        g = gradients[name]
        bound = 1e-6 * (g.norm() + 1e-6 * everything.sqrt())
        have = torch.zeros_like(p) if p.grad is None else p.grad
        assert (have - g).norm() <= bound, name


# --- float32 --------------------------------------------------------------------------------


class Replay:
    """Stands in for `mask_bits`: first records the masks of the layers, then plays them back."""

    def __init__(self, compute):
        self.compute, self.recorded, self.playing, self.flipped = compute, [], None, 0

    def __call__(self, queries, features):
        bits, open = self.compute(queries, features)
        if self.playing is None:
            self.recorded.append((bits, open, features.shape[2]))
            return bits, open
        kept = next(self.playing)
        self.flipped += sum(((bits ^ kept[0]) >> i & 1).sum().item() for i in range(32))
        return kept[:2]

    def play(self):
        self.playing = iter(self.recorded)

    def blocked(self):
        """Each recorded mask as the reference wants it: [B, Q, S] bool, True is blocked."""
        for bits, _, S in self.recorded:
            may = (bits[..., None] >> torch.arange(32, dtype=torch.int32)) & 1
            yield may.flatten(2)[..., :S] == 0


@torch.no_grad()
def test_float32_is_as_accurate_as_the_reference(pair, monkeypatch, record_property):
    reference, ours = pair
    x = images(1, 256, 320)
    exact = reference(x)
    replay = Replay(query_decoder.mask_bits)
    monkeypatch.setattr(query_decoder, "mask_bits", replay)
    ours(x)
    replay.play()
    try:
        have = ours.float()(x.float())
        masks = replay.blocked()
        predict = reference_module.Mask2FormerMaskPredictor.forward

        def with_same_mask(self, *args):
            logits, free = predict(self, *args)
            mask = next(masks, None)
            same = free if mask is None else mask.repeat_interleave(self.num_heads, 0)
            return logits, same

        monkeypatch.setattr(reference_module.Mask2FormerMaskPredictor, "forward", with_same_mask)
        eager = reference.float()(x.float())
    finally:
        reference.double()
        ours.double()
    for name in ("class_queries_logits", "masks_queries_logits"):
        # about a thousand operations follow one another: roundings add up as its root, 32
        rounding = 32 * torch.finfo(torch.float32).eps * getattr(exact, name).abs().max().item()
        allowed = max(2 * error(getattr(eager, name), getattr(exact, name)), rounding)
        assert error(getattr(have, name), getattr(exact, name)) <= allowed, name
    total = sum(b.shape[1] * S for b, _, S in replay.recorded)
    record_property("flipped mask bits", f"{replay.flipped} of {total}")
    assert replay.flipped <= 1e-5 * total + 2


# --- files ----------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_folder_opens_again_and_in_the_reference(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path)
    x = images(1, 64, 96)
    again = Mask2Former.from_pretrained(tmp_path).double()
    assert torch.equal(again(x).masks_queries_logits, ours(x).masks_queries_logits)
    theirs, loading = Reference.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert error(theirs.double()(x).class_queries_logits, ours(x).class_queries_logits) < 1e-8


def test_another_class_count_starts_a_new_class_head(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path)
    model = Mask2Former.from_pretrained(tmp_path, num_labels=3).double()
    assert model.query_decoder.class_embed.weight.shape == (4, 256)
    assert model.criterion.empty_weight.shape == (4,)
    assert model.config.num_labels == 3
    assert torch.equal(model.query_decoder.query_feat.weight, ours.query_decoder.query_feat.weight)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("pixel_decoder.level_embed"), "missing: pixel_decoder.level_embed"),
        (lambda w: w.update(foreign=torch.zeros(1)), "unexpected: foreign"),
        (
            lambda w: w.update({"pixel_decoder.level_embed": torch.zeros(2, 256)}),
            r"another shape: pixel_decoder.level_embed \[2, 256\] instead of \[3, 256\]",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_named(pair, tmp_path, monkeypatch, spoil, message):
    pair[1].save_pretrained(tmp_path)
    settings, weights = huggingface.read_folder(tmp_path)
    spoil(weights)
    monkeypatch.setattr(huggingface, "read_folder", lambda *a: (settings, weights))
    with pytest.raises(ValueError, match=message):
        Mask2Former.from_pretrained(tmp_path)
