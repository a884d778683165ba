"""MaskFormer against transformers on random weights: logits, losses, gradients, files.

Both sides get the same weights, ours through a folder written by transformers.
"""

import pytest
import torch
from transformers import MaskFormerConfig as ReferenceConfig
from transformers import MaskFormerForInstanceSegmentation as Reference
from transformers import ResNetConfig, SwinConfig

from segkern.models import MaskFormer
from segkern.models.maskformer import huggingface
from segkern.structures.targets import Targets
from support.inputs import random_targets

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 3, 4], "window_size": 4}
NARROW = {"depths": [1, 2, 1, 1], "hidden_sizes": [32, 64, 64, 64]}  # as wide as the decoder
BACKBONES = {
    "swin": lambda: SwinConfig(**SMALL, drop_path_rate=0.0, out_features=STAGES),
    "resnet": lambda: ResNetConfig(**NARROW, out_features=STAGES),
    "swin_tiny, full size": lambda: SwinConfig(drop_path_rate=0.0, out_features=STAGES),
    "resnet50, full size": lambda: ResNetConfig(out_features=STAGES),
}
DECODER = {"d_model": 64, "decoder_layers": 3, "decoder_ffn_dim": 96, "decoder_attention_heads": 4}
LABELS, QUERIES = 7, 12


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy_reference(backbone: str) -> Reference:
    """transformers' model with random weights, no bias zero and no statistics of batch norms 0
    and 1, so that an error in any of them shows."""
    torch.manual_seed(0)
    full = "full" in backbone
    decoder = {"model_type": "detr", "num_queries": QUERIES, "dropout": 0.1}
    config = ReferenceConfig(
        backbone_config=BACKBONES[backbone](),
        decoder_config=decoder if full else decoder | DECODER,
        num_labels=LABELS,
        fpn_feature_size=256 if full else 64,
        mask_feature_size=256 if full else 32,
    )
    model, g = Reference(config).eval(), generator(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (0.05 if p.ndim == 1 else 0.0))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                # small ones: no norm stands between a ResNet's map, which grows, and attention
                module.weight.copy_(torch.rand(module.weight.shape, generator=g) * 0.3 + 0.2)
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
    return reference.double(), MaskFormer.from_pretrained(folder).double()


def images(B, H, W):
    return torch.randn(B, 3, H, W, generator=generator(2)).double()


def padded_batch():
    x = images(2, 96, 160)
    x[1, :, 80:] = 0
    x[1, :, :, 64:] = 0
    return x


def error(a, b):
    return (a - b).abs().max().item()


def reference_predictions(reference, x):
    """Class and mask logits after each layer, from normalised states as in the paper.

    transformers takes the earlier predictions from states that are not normalised, and one more
    from before the first layer.
    """
    out = reference.model(x, output_hidden_states=True)
    norm = reference.model.transformer_module.decoder.layernorm
    states = [norm(state) for state in out.transformer_decoder_hidden_states[1:-1]]
    states.append(out.transformer_decoder_last_hidden_state)
    features = out.pixel_decoder_last_hidden_state
    return [
        {
            "class_queries_logits": reference.class_predictor(state),
            "masks_queries_logits": torch.einsum(
                "bqc,bchw->bqhw", reference.mask_embedder(state), features
            ),
        }
        for state in states
    ]


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(lambda: images(1, 128, 128), id="128x128"),
        pytest.param(padded_batch, id="two sizes padded"),
        pytest.param(lambda: images(1, 97, 130), id="97x130 no multiple of 32"),
    ],
)
@torch.no_grad()
def test_logits_of_all_predictions_equal_the_reference(pair, batch):
    reference, ours = pair
    x = batch()
    have = ours(x, output_auxiliary_logits=True)
    predictions = [*have.auxiliary_logits, vars(have)]
    last = vars(reference(x))
    for r, want in enumerate(reference_predictions(reference, x)):
        for name, value in want.items():
            assert predictions[r][name].shape == value.shape
            assert error(predictions[r][name], value) < 1e-8, f"prediction {r}, {name}"
    assert len(predictions) == r + 1 == ours.config.decoder_layers
    for name in want:
        assert error(getattr(have, name), last[name]) < 1e-8, name
        assert error(getattr(ours(x), name), getattr(have, name)) < 1e-10, name
    assert last["masks_queries_logits"].std() > 0.1  # masks are not all open or all closed


@pytest.mark.parametrize(
    ("counts", "deep"),
    [
        pytest.param((3, 5), True, id="3 and 5 targets, every prediction"),
        pytest.param((0, 4), True, id="an image without target, every prediction"),
        pytest.param((QUERIES + 3, 2), False, id="more targets than queries, the last prediction"),
    ],
)
def test_losses_and_gradients_equal_the_reference(pair, counts, deep, monkeypatch, tmp_path):
    reference, ours = pair
    x = images(2, 76, 102)
    masks, labels = random_targets(counts, LABELS, 76, 102)
    reference.zero_grad()
    ours.zero_grad()
    monkeypatch.setattr(ours.config, "use_auxiliary_loss", deep)
    out = ours(x, targets=Targets.from_lists(masks, labels, num_labels=LABELS))
    out.loss.backward()

    *earlier, last = reference_predictions(reference, x)
    given = [m.double() for m in masks], labels
    parts = reference.get_loss_dict(
        last["masks_queries_logits"],
        last["class_queries_logits"],
        *given,
        earlier if deep else [],
    )
    loss = reference.get_loss(parts)
    loss.backward()
    order = [f"_{r}" for r in range(len(earlier))] * deep + [""]  # the last has no number
    assert len(parts) == 3 * len(order)
    weights = {"loss_cross_entropy": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}
    for name, weight in weights.items():
        for have, suffix in zip(out.losses[name] * weight, order, strict=True):
            value = parts[name + suffix]
            assert error(have, value) <= 1e-8 * value.abs().item() + 1e-12, name + suffix
    assert error(out.loss, loss) <= 1e-8 * loss.item()
    if not deep:
        whole = reference(x, mask_labels=given[0], class_labels=labels).loss
        assert error(out.loss, whole) <= 1e-8 * loss.item()

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


@torch.no_grad()
def test_saved_folder_opens_again_and_in_the_reference(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path)
    x = images(1, 64, 96)
    want = ours(x)
    again = MaskFormer.from_pretrained(tmp_path).double()
    assert torch.equal(again(x).masks_queries_logits, want.masks_queries_logits)
    theirs, loading = Reference.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(loading.values()), loading  # nothing missing, nothing unexpected
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert error(getattr(theirs(x), name), getattr(want, name)) < 1e-8


@torch.no_grad()
def test_float32_is_as_accurate_as_the_reference(pair):
    """Over several images: the error of one is a draw of luck, which attention then multiplies."""
    reference, ours = pair
    x = images(4, 96, 128)
    exact = reference(x)
    try:
        have, eager = ours.float()(x.float()), reference.float()(x.float())
    finally:
        reference.double()
        ours.double()
    for name in ("class_queries_logits", "masks_queries_logits"):
        want = getattr(exact, name)
        off, theirs = ((getattr(out, name) - want).norm() for out in (have, eager))
        # some hundred operations follow one another: roundings add up as its root, 16
        assert off <= max(2 * theirs, 16 * torch.finfo(torch.float32).eps * want.norm()), name


def test_the_earlier_predictions_of_transformers_are_not_the_papers(pair):
    """There they come from states that no norm has seen, and one from before the first layer."""
    reference, ours = pair
    x = images(1, 64, 64)
    reference.config.use_auxiliary_loss = True
    try:
        with torch.no_grad():
            theirs = reference(x, output_auxiliary_logits=True, output_hidden_states=True)
            have = ours(x, output_auxiliary_logits=True).auxiliary_logits
    finally:
        reference.config.use_auxiliary_loss = False
    theirs = theirs.auxiliary_logits
    assert len(theirs) == len(have) + 1
    name = "class_queries_logits"
    assert error(theirs[0][name], theirs[0][name][:, :1]) == 0  # all queries say the same
    assert all(error(a[name], b[name]) > 1e-3 for a, b in zip(theirs[1:], have))
