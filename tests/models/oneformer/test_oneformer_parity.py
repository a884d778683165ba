"""OneFormer against transformers on random weights: logits of all tasks, losses, gradients.

Both sides get the same weights (ours through a folder written by transformers) and the same random
points. Where transformers departs from the paper's code in training, the reference is corrected
here, a fault at a time; each fault has a test that shows it.
"""

import pytest
import torch
from transformers import OneFormerConfig as ReferenceConfig
from transformers import OneFormerForUniversalSegmentation as Reference
from transformers import SwinConfig
from transformers.models.oneformer import modeling_oneformer as module

from segkern.models import OneFormer
from segkern.models.oneformer import huggingface
from segkern.models.oneformer.prompts import TASK_TOKENS, known_words, sentences
from segkern.structures.targets import TASKS, Targets
from support.inputs import random_targets
from support.same_points import SamePoints

LABELS, QUERIES, LEARNED, POINTS, CONTEXT = 7, 12, 3, 112, 20
NAMES = ("person", "dog", "traffic light", "tree", "sky", "road", "potted plant")
FULL = pytest.param("full depth", marks=pytest.mark.slow)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy_reference(size: str) -> Reference:
    """transformers' model with random weights, away from the points where its gradient jumps:
    at initialisation sampling offsets sit on the kinks of bilinear sampling, and biases are 0."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = {"drop_path_rate": 0.0, "out_features": stages}
    if size == "small":
        swin |= {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 6]}
        widths = {name: 64 for name in ("hidden_dim", "conv_dim", "mask_dim")}
        widths |= {"dim_feedforward": 96, "encoder_feedforward_dim": 48, "encoder_layers": 2}
        widths |= {"text_encoder_width": 64, "text_encoder_num_layers": 2, "decoder_layers": 5}
    else:
        widths = {}
    model = Reference(
        ReferenceConfig(
            backbone_config=SwinConfig(**swin),
            num_labels=LABELS,
            num_queries=QUERIES,
            train_num_points=POINTS,
            is_training=True,
            dropout=0.0,  # which its pixel decoder has in evaluation, too: see the faults
            text_encoder_n_ctx=LEARNED,
            text_encoder_context_length=CONTEXT,
            **widths,
        )
    ).eval()
    g = generator(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            sigma = {"sampling_offsets.bias": 0.3, "sampling_offsets.weight": 0.01}
            scale = sigma.get(".".join(name.split(".")[-2:]), 0.05 if p.ndim == 1 else 0.0)
            p.add_(torch.randn(p.shape, generator=g) * scale)
    return model


@pytest.fixture(scope="module", params=["small", FULL])
def pair(request, tmp_path_factory):
    """(reference, ours), both float64 in eval mode, with the same weights."""
    reference = noisy_reference(request.param)
    folder = tmp_path_factory.mktemp("oneformer")
    reference.save_pretrained(folder)
    return reference.double(), OneFormer.from_pretrained(folder).double()


def tokens(text, length=CONTEXT):
    row = known_words(text)
    return row + [0] * (length - len(row))


def texts(classes, task):
    """The paper's sentences of an image, in tokens [Q - learned, L]."""
    said = [sentences(NAMES)[k] for k in sorted(classes)][: QUERIES - LEARNED]
    said += [sentences(())[TASKS.index(task)]] * (QUERIES - LEARNED - len(said))
    return torch.tensor([tokens(text) for text in said])


def task_rows(*tasks):
    rows = [TASK_TOKENS[task] for task in tasks]
    return torch.tensor([[*row, *[0] * (77 - len(row))] for row in rows])


def images(B, H, W):
    return torch.randn(B, 3, H, W, generator=generator(2)).double()


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


def with_causal_text(monkeypatch):
    """The reference passes the mask that it has built."""

    def forward(self, hidden_states, key_padding_mask=None):
        x = self.layer_norm1(hidden_states)
        mask = self.attn_mask.to(x)
        hidden_states = hidden_states + self.self_attn(x, x, x, attn_mask=mask)[0]
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))

    monkeypatch.setattr(module.OneFormerTextTransformerLayer, "forward", forward)


def in_float64(monkeypatch):
    """The reference's losses, which it brings to float32 whatever the model's dtype."""
    count = module.OneFormerLoss.get_num_masks
    monkeypatch.setattr(module.OneFormerLoss, "get_num_masks", lambda *a, **k: count(*a, **k)[0])
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


# --- logits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [(1, 160, 224), (2, 97, 130)], ids=["160x224", "two of 97x130"])
@torch.no_grad()
def test_logits_of_all_predictions_equal_the_reference(pair, task, size):
    reference, ours = pair
    x = images(*size)
    rows = task_rows(*[task] * len(x))
    asked = torch.zeros(len(x), QUERIES - LEARNED, CONTEXT, dtype=torch.int64)
    want = reference(x, rows, asked, output_auxiliary_logits=True)
    have = ours(x, task, output_auxiliary_logits=True)
    predictions = [*want.auxiliary_predictions, want], [*have.auxiliary_logits, have]
    assert len(predictions[0]) == len(predictions[1]) == ours.config.decoder_layers + 1
    for r, (a, b) in enumerate(zip(*predictions)):
        for name in ("class_queries_logits", "masks_queries_logits"):
            u, v = (o[name] if isinstance(o, dict) else getattr(o, name) for o in (a, b))
            assert u.shape == v.shape
            assert error(u, v) < 1e-8, f"prediction {r}, {name}"
    assert want.masks_queries_logits.std() > 0.1  # the masks are not all open or all closed
    assert torch.equal(ours(x, rows).class_queries_logits, have.class_queries_logits)
    *_, queries = ours.all_predictions(x, rows)
    assert error(queries, want.transformer_decoder_contrastive_queries) < 1e-8


@torch.no_grad()
def test_tasks_differ_and_may_differ_within_a_batch(pair):
    _, ours = pair
    x = images(1, 64, 96)
    each = [ours(x, task).class_queries_logits for task in TASKS]
    assert min(error(each[i], each[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
    mixed = ours(x.expand(3, -1, -1, -1), TASKS).class_queries_logits
    assert error(mixed, torch.cat(each)) < 1e-10


# --- losses and gradients -------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param((3, 5), id="3 and 5 targets"),
        pytest.param((0, 4), id="an image without target"),
        pytest.param((QUERIES + 3, 2), id="more targets than queries"),
    ],
)
@pytest.mark.parametrize("given", ["text_inputs", "prompts"])
def test_losses_and_gradients_equal_the_reference(pair, counts, given, monkeypatch, tmp_path):
    reference, ours = pair
    x, tasks = images(2, 96, 128), ("semantic", "panoptic")
    masks, labels = random_targets(counts, LABELS, 96, 128)
    text_inputs = torch.stack([texts(k.tolist(), t) for k, t in zip(labels, tasks)])
    ids = [5, 11]
    targets = Targets.from_lists(masks, labels, num_labels=LABELS, ids=ids)
    reference.zero_grad()
    ours.zero_grad()
    seed = ours.criterion.seed.clone()
    if given == "prompts":
        rows = torch.tensor([tokens(text) for text in sentences(NAMES)])
        monkeypatch.setitem(ours._buffers, "sentences", rows)
        targets = targets._replace(task=torch.tensor([TASKS.index(t) for t in tasks]))
        loss, losses = ours.loss(x, targets)
    else:
        out = ours(x, tasks, text_inputs, targets=targets)
        loss, losses = out.loss, out.losses
    loss.backward()

    parts = {}
    weigh = reference.get_loss_dict
    monkeypatch.setattr(reference, "get_loss_dict", lambda **k: parts.update(weigh(**k)) or parts)
    with_causal_text(monkeypatch)
    in_float64(monkeypatch)
    predictions = ours.config.decoder_layers + 1
    matcher = module.OneFormerHungarianMatcher
    SamePoints(monkeypatch, module, matcher, seed, ids, predictions, POINTS)
    want = reference(
        x,
        task_rows(*tasks),
        text_inputs,
        mask_labels=[m.double() for m in masks],
        class_labels=labels,
    )
    want.loss.backward()

    order = [f"_{r}" for r in range(predictions - 1)] + [""]  # the last has no number there
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    assert len(parts) == 3 * predictions + 1
    for name, weight in weights.items():
        for have, suffix in zip(losses[name] * weight, order, strict=True):
            value = parts[name + suffix]
            assert error(have, value) <= 1e-8 * value.abs().item() + 1e-12, name + suffix
    assert error(losses["loss_contrastive"] * 0.5, parts["loss_contrastive"]) <= 1e-9
    assert error(loss, want.loss) <= 1e-8 * want.loss.item()

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


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text_encoder", [True, False], ids=["training branch", "inference"])
@torch.no_grad()
def test_saved_folder_opens_again_and_in_the_reference(pair, text_encoder, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path, text_encoder)
    x = images(1, 64, 96)
    again = OneFormer.from_pretrained(tmp_path).double()
    assert (again.text_encoder is not None) == text_encoder
    want = ours(x, "instance")
    assert torch.equal(again(x, "instance").masks_queries_logits, want.masks_queries_logits)
    theirs, loading = Reference.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    asked = torch.zeros(1, QUERIES - LEARNED, CONTEXT, dtype=torch.int64)
    have = theirs.double()(x, task_rows("instance"), asked if text_encoder else None)
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert error(getattr(have, name), getattr(want, name)) < 1e-8
    if text_encoder:
        parts = theirs.model.text_mapper.state_dict(), theirs.config.text_encoder_n_ctx
        assert parts[1] == LEARNED
        assert len(parts[0]) == len(ours.text_encoder.state_dict())
