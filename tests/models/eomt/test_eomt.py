"""EoMT's settings, its masks in training, and what it shares with the other models."""

import json
from dataclasses import replace

import pytest
import torch

import segkern
from segkern import recipes
from segkern.models import EoMT, EoMTConfig
from segkern.models.eomt import huggingface
from segkern.ops import unpack_bits
from segkern.structures.targets import Targets
from segkern.training.config import TrainConfig
from segkern.training.optimizer import backbone_share, parameter_groups
from support.inputs import random_targets

FORMS = {"dinov2": {}, "dinov3": {"encoder": "dinov3", "key_bias": False, "local_start": False}}


def tiny(**changes):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"image_size": 32, "num_queries": 5, "train_num_points": 40}
    torch.manual_seed(0)
    return EoMT(replace(EoMTConfig.tiny(3), **(sizes | changes)))


def batch(seed=0):
    masks, labels = random_targets((2, 1), 3, 32, 32)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return x, Targets.from_lists(masks, labels, num_labels=3, ids=[3, 4])


@pytest.mark.parametrize("progress", [0, 0.25, 0.375, 0.5, 0.7, 0.75, 1])
def test_masks_fade_block_after_block(progress):
    model = tiny()  # of two last blocks: between quarters of the training
    model.anneal(progress)
    want = [(1 - min(max((progress - a) / 0.25, 0), 1)) ** 0.9 for a in (0.25, 0.5)]
    torch.testing.assert_close(model.attn_mask_probs.tolist(), want)
    kept = tiny(mask_annealing=False)
    kept.anneal(progress)
    assert kept.attn_mask_probs.tolist() == [1, 1]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_queries_without_mask_see_all_patches(share):
    model = tiny(num_queries=100).eval()
    (first, *_), _ = model.all_predictions(batch()[0])
    bits, open_ = model._mask(first, torch.tensor(share))
    seen = unpack_bits(bits, 1 + 64 + 100)
    assert seen[..., 0].all()
    assert seen[..., 65:].all()
    assert torch.equal(open_.long(), seen.sum(2))
    free = seen[..., 1:65].all(2).double().mean()
    assert abs(free - (1 - share)) < 0.15


def test_training_lowers_the_loss_and_draws_anew():
    model = tiny().train()
    x, targets = batch()
    seed = model.criterion.seed.clone()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    values = []
    for _ in range(8):
        loss, losses = model.loss(x, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]
    assert {name: value.shape for name, value in losses.items()} == dict.fromkeys(
        ("loss_cross_entropy", "loss_mask", "loss_dice"), (3,)
    )
    assert model.criterion.seed - seed == 8 * 3  # each prediction has points of its own
    weights = {"loss_cross_entropy": 5.0, "loss_mask": 2.0, "loss_dice": 5.0}
    total = sum(w * losses[name].sum() for name, w in weights.items())
    torch.testing.assert_close(loss, total)


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_changes_nothing(form):
    found = []
    for enable in (False, True):
        model = tiny(drop_path_rate=0.3, **FORMS[form]).double().train()
        model.gradient_checkpointing_enable(enable)
        torch.manual_seed(1)
        x, targets = batch()
        model.loss(x.double(), targets)[0].backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-12, atol=1e-12, msg=name)


def test_roles_and_rates():
    model = tiny()
    roles = model.parameter_roles()
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert roles["encoder.blocks.1.attn.qkv.weight"] == (True, True, True, 2)
    assert roles["encoder.pos_embed"] == (True, False, False, 3)
    assert roles["encoder.blocks.3.ls1"] == (True, False, False, 0)
    assert roles["query.weight"] == (False, False, False, 0)
    assert roles["mask_head.0.weight"] == (False, True, True, 0)
    assert roles["class_predictor.weight"] == (False, True, False, 0)
    config = TrainConfig(
        steps=100, warmup=10, backbone_warmup=20, backbone_level_decay=0.8, model=model.config
    )
    later = {id(p): g["later"] for g in parameter_groups(model, config) for p in g["params"]}
    for name, p in model.named_parameters():
        assert later[id(p)] == name.startswith("encoder.")
    shares = [backbone_share(step, config) for step in (0, 9, 10, 19, 29, 99)]
    assert shares == pytest.approx([0, 0, 0.05, 0.5, 1, 1])
    assert backbone_share(0, replace(config, backbone_warmup=0)) == 1


def test_the_encoder_waits_for_the_heads(tmp_path):
    model = tiny(num_labels=11, image_size=64, num_queries=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = replace(
        recipes.digits_eomt(),
        output=tmp_path,
        steps=4,
        batch_size=2,
        warmup=2,
        backbone_warmup=2,
        evaluate_every=0,
        optimizer="adamw",
        tensorboard=False,
    )
    with pytest.raises(KeyboardInterrupt):
        segkern.train(config, progress=False, model=_stopping(model, 1))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert "query.weight" in moved
    assert not [name for name in moved if name.startswith("encoder.")]
    assert model.attn_mask_probs.tolist() == [1, 1]  # a quarter is done
    run = segkern.train(config, resume=tmp_path, progress=False, model=model)
    assert not torch.equal(run.model.encoder.pos_embed, before["encoder.pos_embed"])
    assert run.model.attn_mask_probs.tolist() == [0, 0]  # three quarters


def _stopping(model, steps):
    """A model that is interrupted in the step after so many."""
    loss = model.loss

    def counted(*given, done=[0]):  # noqa: B006
        done[0] += 1
        if done[0] > steps:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
            del model.loss
        return loss(*given)

    model.loss = counted
    return model


# --- settings -------------------------------------------------------------------------------


PRESETS = {  # K, queries, side, stuff, windows
    ("small", "panoptic"): (133, 200, 640, 53, False),
    ("base", "instance"): (80, 200, 640, 0, False),
    ("large", "semantic"): (150, 100, 512, 150, True),
    ("large", "semantic", "cityscapes"): (19, 100, 1024, 19, True),
    ("giant", "panoptic", "ade20k", 1280): (150, 200, 1280, 50, False),
    ("small", "panoptic", "coco", 640, "dinov3"): (133, 200, 640, 53, False),
}


@pytest.mark.parametrize("case", PRESETS, ids=lambda case: "/".join(map(str, case)))
def test_presets(case):
    config = EoMTConfig.preset(*case)
    found = (config.num_labels, config.num_queries, config.image_size)
    assert (*found, len(config.labels.stuff), config.windows) == PRESETS[case]
    assert config.tasks == (("semantic",) if config.windows else EoMTConfig().tasks)
    written = huggingface.read_config(huggingface.write_config(vars(config)))
    names = set(written) & set(vars(config)) - {"id2label", "windows"}
    assert {k: written[k] for k in names} == {k: vars(config)[k] for k in names}
    with torch.device("meta"):
        model = EoMT(replace(config, num_hidden_layers=config.num_blocks))
        name = config.backbone.partition(".")[0]
        import timm

        options = {"img_size": config.image_size, "patch_size": 16, "num_classes": 0}
        theirs = timm.create_model(name, depth=config.num_blocks, **options)
    assert segkern.models.eomt.pretrained._fitting(theirs, model, name)


BAD = [
    ({"num_labels": 0}, "num_labels must be >= 1, got 0"),
    ({"encoder": "dino"}, "encoder must be 'dinov2' or 'dinov3', got 'dino'"),
    ({"image_size": 30}, r"image_size must be a multiple of patch_size \(4\), got 30"),
    ({"hidden_size": 34}, r"hidden_size must be a multiple of num_attention_heads \(4\), got 34"),
    ({"num_blocks": 5}, r"num_blocks must be at most num_hidden_layers \(4\), got 5"),
    ({"num_upscale_blocks": -1}, "num_upscale_blocks must be >= 0, got -1"),
    ({"drop_path_rate": 2}, r"drop_path_rate must be in \[0, 1\], got 2"),
    ({"key_bias": False}, "key_bias must be True with dinov2, got False"),
    ({"encoder": "dinov3"}, "local_start must be False but for a dinov2"),
    ({"backbone_pretrained": True}, "backbone must be a ViT of timm with backbone_pretrained"),
    ({"image_std": (0.5, 0.5, 0.0)}, "image_std must be numbers above 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (("tiny",), "size must be one of small, base, large, giant"),
        (("giant", "panoptic", None, None, "dinov3"), "giant, coco/panoptic with dinov3"),
        (("small", "semantic", "coco"), "coco/semantic"),
        (("small", "depth"), "None/depth"),
    ],
    ids=["size", "encoder", "data set", "task"],
)
def test_no_such_preset(name, message):
    with pytest.raises(ValueError, match=message):
        EoMTConfig.preset(*name)


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        (torch.zeros(1, 3, 32, 48), ValueError, r"must be \[B >= 1, C, 32, 32\].* got"),
        (torch.zeros(0, 3, 32, 32), ValueError, "pixel_values must be"),
        (torch.zeros(1, 4, 32, 32), ValueError, "pixel_values"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "pixel_values"),
    ],
    ids=["size", "empty", "channels", "dtype"],
)
def test_bad_pixels(pixels, error, message):
    with pytest.raises(error, match=message):
        tiny()(pixels)


def test_labels_together_or_targets():
    x, targets = batch()
    for given in (
        {"class_labels": []},
        {"mask_labels": [], "class_labels": [], "targets": targets},
    ):
        with pytest.raises(ValueError, match="give mask_labels and class_labels together"):
            tiny()(x, **given)


def spoil(path, **changes):
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(found))


SPOILT = {
    "act": ("config", {"hidden_act": "relu"}, "hidden_act must be gelu, got relu"),
    "dropout": ("config", {"attention_dropout": 0.1}, "attention_dropout must be 0.0, got 0.1"),
    "kind": ("config", {"model_type": "vit"}, "model_type must be one of .* got vit"),
    "side": ("config", {"image_size": [32, 64]}, r"image_size must be square, got \[32, 64\]"),
    "labels": ("config", {"id2label": {"0": "a", "2": "b"}}, "id2label must name labels 0, 1, 2"),
    "count": ("config", {"id2label": {"0": "a"}}, "names 1 classes, the weights have 3"),
    "blocks": ("config", {"num_blocks": 1}, r"attn_mask_probs \[2\] instead of \[1\]"),
    "size": ("preprocessor_config", {"size": {"shortest_edge": 64}}, "size .* must be image_size"),
    "mean": ("preprocessor_config", {"image_mean": [0.5]}, "image_mean .* must have num_channels"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_folder_is_refused(case, tmp_path):
    file, changes, message = SPOILT[case]
    tiny().save_pretrained(tmp_path)
    spoil(tmp_path / f"{file}.json", **changes)
    with pytest.raises(ValueError, match=message):
        segkern.open_model(tmp_path)


def test_weights_of_a_handed_on_model_may_lack_what_training_keeps(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for name in ("attn_mask_probs", "criterion.empty_weight"):
        weights.pop(name)
    weights["embeddings.mask_token"] = torch.zeros(1, 1, 32)
    save_file(weights, path, metadata={"format": "pt"})
    opened = segkern.open_model(tmp_path)
    assert opened.attn_mask_probs.tolist() == [0, 0]
    assert torch.equal(opened.criterion.empty_weight, model.criterion.empty_weight)


@pytest.mark.parametrize("windows", [False, True], ids=["whole", "windows"])
def test_a_replayed_prediction_is_the_same(windows, everywhere):
    model = tiny(windows=windows).eval()
    image = torch.rand(3, 40, 70)
    for _ in range(5):
        have = segkern.segment(model, image).segmentation
        want = segkern.segment(model, image, cuda_graphs=False).segmentation
        assert torch.equal(have, want)
