"""EoMT against transformers on random weights: logits, losses, gradients, files; of both encoders.

Both sides get the same weights (ours through a folder written by transformers), the same draws of
masks and positions by one seed and, in the loss tests, the same random points.
"""

import pytest
import torch
from transformers import EomtConfig as Reference2Config
from transformers import EomtDinov3Config as Reference3Config
from transformers import EomtDinov3ForUniversalSegmentation as Reference3
from transformers import EomtForUniversalSegmentation as Reference2
from transformers.models.eomt import modeling_eomt
from transformers.models.eomt_dinov3 import modeling_eomt_dinov3

from segkern.models import EoMT, open_model
from segkern.models.eomt import huggingface
from segkern.ops import random_points
from segkern.ops.point_sample import MATCHING
from segkern.structures.targets import Targets
from support.inputs import random_targets

LABELS, QUERIES, POINTS, SIDE = 7, 6, 112, 64
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
    "num_queries": QUERIES,
    "num_blocks": 2,
    "num_labels": LABELS,
    "train_num_points": POINTS,
}
ROPE = {"rope_type": "default", "rope_theta": 50.0}
FORMS = {
    "dinov2": lambda: Reference2(Reference2Config(num_upscale_blocks=1, **SIZES)),
    "dinov2, gated": lambda: Reference2(
        Reference2Config(use_swiglu_ffn=True, num_register_tokens=0, **SIZES)
    ),
    "dinov3": lambda: Reference3(
        Reference3Config(
            intermediate_size=96,
            num_upscale_blocks=1,
            rope_parameters=ROPE,
            pos_embed_rescale=None,
            **SIZES,
        )
    ),
    "dinov3, gated": lambda: Reference3(
        Reference3Config(
            intermediate_size=80,
            use_gated_mlp=True,
            hidden_act="silu",
            key_bias=True,
            rope_parameters=ROPE,
            pos_embed_shift=0.1,
            pos_embed_jitter=1.2,
            **SIZES,
        )
    ),
}
MODULES = {Reference2: modeling_eomt, Reference3: modeling_eomt_dinov3}
SHARES = {"all masks": (1.0, 1.0), "no mask": (0.0, 0.0), "some masks": (0.3, 0.7)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy_reference(form):
    """transformers' model with random weights, of which none is 0 or 1 and masks are half open."""
    torch.manual_seed(0)
    model = FORMS[form]().eval()
    g = generator(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "token" in name:
                p.copy_(noise)
            else:
                wide = "upscale" in name or "mask_head" in name
                p.add_(noise * (0.2 if p.ndim == 1 else 0.1 if wide else 0.0))
    for layer in model.layers:  # in float64 its mask, which stays float32, is misread
        layer.register_forward_pre_hook(_exact_mask, with_kwargs=True)
    return model


def _exact_mask(layer, args, kwargs):
    exact = [x.to(args[0].dtype) if isinstance(x, torch.Tensor) else x for x in args]
    mask = kwargs.get("attention_mask")
    return tuple(exact), kwargs | ({} if mask is None else {"attention_mask": mask.double()})


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    """(reference, ours), both float64 in eval mode, with the same weights."""
    reference = noisy_reference(request.param)
    folder = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(folder)
    with pytest.warns(UserWarning, match="have not faded"):
        ours = open_model(folder)
    assert isinstance(ours, EoMT)
    return reference.double(), ours.double()


def images(B=2):
    return torch.randn(B, 3, SIDE, SIDE, generator=generator(2)).double()


def share(pair, values):
    for model in pair:
        model.attn_mask_probs.copy_(torch.tensor(values))


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


# --- logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@torch.no_grad()
def test_logits_of_all_predictions_equal_the_reference(pair, shares, monkeypatch):
    reference, ours = pair
    share(pair, shares)
    found, predict = [], reference.predict

    def recorded(x):
        found.append(predict(x))
        return found[-1]

    monkeypatch.setattr(reference, "predict", recorded)
    torch.manual_seed(3)
    want = reference(images())
    torch.manual_seed(3)
    have = ours(images(), output_auxiliary_logits=True)
    assert error(have.last_hidden_state, want.last_hidden_state) < 1e-8
    assert len(found) == (3 if any(shares) else 1)
    given = [*(list(x.values()) for x in have.auxiliary_logits), [*have[:2]]]
    for (masks, classes), (our_classes, our_masks) in zip(reversed(found), reversed(given)):
        assert masks.shape == our_masks.shape
        assert error(our_masks, masks) < 1e-8
        assert error(our_classes, classes) < 1e-8
    assert 0.02 < (found[0][0] > 0).double().mean() < 0.98  # neither all open nor all closed


@torch.no_grad()
def test_a_prediction_has_no_mask(pair):
    reference, ours = pair
    share(pair, (0.0, 0.0))
    want = reference(images()).masks_queries_logits
    share(pair, (1.0, 1.0))
    classes, embeddings, features = ours.predict(images())
    assert error(torch.einsum("bqc,bchw->bqhw", embeddings, features), want) < 1e-8
    out = ours(images(), patch_offsets=[torch.ones(2, 3)])
    assert error(out.masks_queries_logits, want) < 1e-8
    assert torch.equal(out.class_queries_logits, classes)
    assert torch.equal(out.patch_offsets[0], torch.ones(2, 3))
    assert error(ours(images(), output_auxiliary_logits=True).masks_queries_logits, want) > 1e-3


# --- losses and gradients -------------------------------------------------------------------


class SamePoints:
    """Stands in for the reference's torch.rand where it draws points: gives it ours, in the order
    it asks. It treats one prediction after the other; for each it matches image by image, then
    draws the candidates and the random rest of all matched pairs, image by image."""

    def __init__(self, monkeypatch, module, seed, ids, training):
        self.seed, self.ids, self.training = seed, ids, training
        self.matched, self.calls, self.prediction = None, 0, -1
        self.draw = torch.rand
        name = next(n for n in dir(module) if n.endswith("HungarianMatcher"))
        match = getattr(module, name).forward

        def recorded(*args):
            self.calls, self.prediction = 0, self.prediction + 1
            self.matched = match(*args)
            return self.matched

        monkeypatch.setattr(getattr(module, name), "forward", recorded)
        monkeypatch.setattr(module.torch, "rand", self)

    def __call__(self, n, points, *two, device=None):
        if not two:  # not of points: which masks are left out
            return self.draw(n, points, device=device)
        call, self.calls = self.calls, self.calls + 1
        if call < len(self.ids):
            slots = [(self.ids[call], 0, MATCHING)]
        else:
            slots = [
                (self.ids[b], 0, t)
                for b, (_, targets) in enumerate(self.matched)
                for t in targets.tolist()
            ]
        assert n == len(slots)
        slots = torch.tensor(slots, dtype=torch.int64).view(-1, 3)
        seed = self.seed + (self.prediction if self.training else 0)
        if call <= len(self.ids):
            return random_points(seed, slots, points).double()
        candidates = int(POINTS * 3.0)
        return random_points(seed, slots, candidates + points)[:, candidates:].double()


@pytest.mark.parametrize(
    ("counts", "shares", "training"),
    [
        pytest.param((3, 5), SHARES["all masks"], True, id="all masks"),
        pytest.param((0, 4), SHARES["some masks"], False, id="an image without target"),
        pytest.param((QUERIES + 3, 2), SHARES["no mask"], True, id="more targets than queries"),
    ],
)
def test_losses_and_gradients_equal_the_reference(
    pair, counts, shares, training, monkeypatch, tmp_path
):
    reference, ours = pair
    share(pair, shares)
    masks, labels = random_targets(counts, LABELS, SIDE, SIDE)
    ids = [5, 11]
    targets = Targets.from_lists(masks, labels, num_labels=LABELS, ids=ids)
    seed = ours.criterion.seed.clone()
    for model in pair:
        model.zero_grad()
        model.train(training)
    torch.manual_seed(3)
    out = ours(images(), targets=targets)
    out.loss.backward()

    parts, weigh = [], reference.get_loss_dict
    monkeypatch.setattr(
        reference, "get_loss_dict", lambda **k: parts.append(weigh(**k)) or parts[-1]
    )
    SamePoints(monkeypatch, MODULES[type(reference)], seed, ids, training)
    torch.manual_seed(3)
    want = reference(images(), mask_labels=[m.double() for m in masks], class_labels=labels)
    want.loss.backward()
    for model in pair:
        model.eval()

    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    have = [{name: out.losses[name][r] * w for name, w in weights.items()} for r in range(3)]
    for r in range(1, len(parts) + 1):
        for name, value in parts[-r].items():
            assert error(have[-r][name], value) <= 1e-8 * value.abs().item() + 1e-12, (name, r)
    if len(parts) < 3:  # in eval mode without masks it has the last prediction alone
        return
    assert error(out.loss, want.loss) <= 1e-8 * want.loss.item()

    # the reference's gradients travel as if they were weights: that maps the names
    for p in reference.parameters():
        p.data, p.kept = (torch.zeros_like(p) if p.grad is None else p.grad), p.data
    reference.save_pretrained(tmp_path)
    for p in reference.parameters():
        p.data = p.kept
    gradients = huggingface.from_huggingface(
        huggingface.files.read_weights(tmp_path), ours.config.encoder
    )
    everything = sum(p.grad.square().sum() for p in reference.parameters() if p.grad is not None)
    for name, p in ours.named_parameters():
        g = gradients[name]
        bound = 1e-6 * (g.norm() + 1e-6 * everything.sqrt())
        given = torch.zeros_like(p) if p.grad is None else p.grad
        assert (given - g).norm() <= bound, name


# --- files ----------------------------------------------------------------------------------


@torch.no_grad()
def test_saved_folder_opens_again_and_in_the_reference(pair, tmp_path):
    reference, ours = pair
    share(pair, (0.0, 0.0))
    ours.save_pretrained(tmp_path)
    again = EoMT.from_pretrained(tmp_path).double()
    assert again.config == ours.config
    want = ours(images()).masks_queries_logits
    assert torch.equal(again(images()).masks_queries_logits, want)
    theirs, loading = type(reference).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    assert error(theirs.double()(images()).masks_queries_logits, want) < 1e-8
