"""Seq2Seg against a plain model with PyTorch's transformer layers, and its settings."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segkern
from segkern import Seq2Seg, Seq2SegConfig
from support.two_heads import instance_loss, semantic_loss, shaken, targets_of

SIZES = {"patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "image_size": (32, 40), "dropout": 0.0, "mask_channels": 12}


def built(head="semantic", **changes):
    torch.manual_seed(0)
    return Seq2Seg(Seq2SegConfig(5, head, **(SIZES | {"mask_size": (6, 7)} | changes)))


def states_of(model, image):
    """Of the queries and patches, by PyTorch's own layers with the same weights."""
    encoder, c = model.encoder, model.config
    D, p, grid = c.hidden_size, c.patch_size, encoder.grid
    conv = encoder.patch_embed["proj"]
    H, W = image.shape[2:]
    x = F.conv2d(F.pad(image, (0, -W % p, 0, -H % p)), conv.weight, conv.bias, stride=p)
    h, w = x.shape[2:]
    positions = encoder.pos_embed.view(1, *grid, D).movedim(3, 1)
    x = (x + F.interpolate(positions, (h, w), mode="bilinear")).flatten(2).mT
    if c.task_head == "instance":
        x = torch.cat((model.queries.weight.expand(len(x), -1, -1), x), 1)
    states = [encoder.norm(x)]
    for block in encoder.blocks:
        sizes = (D, c.num_attention_heads, c.intermediate_size, 0.0, "gelu", 1e-12, True)
        layer = nn.TransformerEncoderLayer(*sizes).double()
        names = ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2.")
        parts = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        names, parts = (*names, "norm1.", "norm2."), (*parts, block.norm1, block.norm2)
        weights = {a + b: v for a, m in zip(names, parts) for b, v in m.named_parameters()}
        states.append(torch.func.functional_call(layer, weights, (states[-1],)))
    return states, (h, w)


def plain(model, image):
    """Logits [B, K, H, W], or class logits and mask logits [B, Q, h, w]."""
    c, (states, (h, w)) = model.config, states_of(model, image)
    if c.task_head == "semantic":
        x = torch.stack(states).sum(0) if c.skip else states[-1]
        x = x.mT.unflatten(2, (h, w))
        x = F.conv_transpose2d(x, model.decoder.weight, model.decoder.bias, stride=c.patch_size)
        return x[:, :, : image.shape[2], : image.shape[3]]
    q, x = states[-1][:, : c.num_queries], states[-1][:, c.num_queries :]
    linear = {n: lambda v, m=m: v @ m.weight.mT + m.bias for n, m in model.named_children()}
    classes, masks = linear["class_embed"](q), linear["mask_embed"](q)
    if c.mask == "linear":
        masks = masks.view(*masks.shape[:2], *c.mask_size)
    elif c.mask == "attention":
        masks = masks @ linear["mask_features"](x).mT / c.hidden_size**0.5
        masks = masks.unflatten(2, (h, w))
    else:
        maps, m = x.mT.unflatten(2, (h, w)), model.mask_features
        maps = F.conv_transpose2d(maps, m.weight, m.bias, stride=c.patch_size // 4)
        masks = torch.einsum("bqc,bchw->bqhw", masks, maps)
    if c.class_from == "mask":
        cells = F.interpolate(masks, (h, w), mode="bilinear")
        if c.mask == "fine":
            cells = F.adaptive_avg_pool2d(masks, (h, w))
        share = cells.sigmoid().flatten(2)
        under = torch.einsum("bqn,bnd->bqd", share, x) / (1 + share.sum(2))[..., None]
        classes = classes + under @ model.patch_class_embed.weight.mT
    return classes, masks


def gradients(loss, model):
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))


def assert_same_gradients(found, wanted):
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-10, msg=name)


IMAGES = [(32, 40), (45, 26)]


@pytest.mark.parametrize("size", IMAGES, ids=str)
@pytest.mark.parametrize("skip", [True, False], ids=["sum of all layers", "last layer"])
def test_the_semantic_head_is_the_plain_one(skip, size):
    model = shaken(built(skip=skip))
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    *_, packed, maps = targets_of(size)
    wanted = plain(model, image)
    found = model(image).logits
    assert found.shape == (2, 5, *size)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)
    loss, losses = model.loss(image, packed)
    want = semantic_loss(wanted, maps)
    torch.testing.assert_close(loss, want, rtol=1e-8, atol=0)
    torch.testing.assert_close(model(image, labels=maps).loss, want, rtol=1e-8, atol=0)
    assert losses["loss_bce"].item() == loss.item()
    assert_same_gradients(gradients(loss, model), gradients(want, model))


@pytest.mark.parametrize("size", IMAGES, ids=str)
@pytest.mark.parametrize("mask", ["linear", "attention", "fine"])
@pytest.mark.parametrize("class_from", ["query", "mask"])
def test_the_instance_head_is_the_plain_one(class_from, mask, size):
    model = shaken(built("instance", mask=mask, class_from=class_from))
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    masks, labels, packed, _ = targets_of(size)
    classes, logits = plain(model, image)
    out = model.eval()(image)
    torch.testing.assert_close(out.class_queries_logits, classes, rtol=0, atol=1e-8)
    torch.testing.assert_close(out.masks_queries_logits, logits, rtol=0, atol=1e-8)
    want, entropy, dice = instance_loss(classes, logits, logits, masks, labels, model.config)
    loss, losses = model.train().loss(image, packed)
    torch.testing.assert_close(loss, want, rtol=1e-8, atol=0)
    assert sorted(losses) == ["loss_cross_entropy", "loss_dice"]
    torch.testing.assert_close(losses["loss_cross_entropy"][0], entropy, rtol=1e-8, atol=0)
    torch.testing.assert_close(losses["loss_dice"][0], dice, rtol=1e-8, atol=0)
    assert_same_gradients(gradients(loss, model), gradients(want, model))
    again = model(image, mask_labels=masks, class_labels=labels)
    assert torch.equal(again.loss, loss)
    torch.testing.assert_close(again.masks_queries_logits, logits, rtol=0, atol=1e-8)


def true_class_loss(model, image, masks, labels):
    """The mean cross entropy of the true objects, each from the patches under its own mask."""
    states, grid = states_of(model, image)
    total = 0
    for y, truth, label in zip(states[-1][:, model.config.num_queries :], masks, labels):
        share = F.adaptive_avg_pool2d(truth[:, None].double(), grid).flatten(1)
        under = share @ y / (1 + share.sum(1, keepdim=True))
        logits = under @ model.patch_class_embed.weight.mT + model.class_embed.bias
        total = total + F.cross_entropy(logits, label, reduction="sum")
    return total / sum(map(len, labels))


@pytest.mark.parametrize("size", IMAGES, ids=str)
def test_the_loss_of_classes_under_true_masks_is_the_plain_one(size):
    settings = {"mask": "fine", "class_from": "mask", "true_mask_weight": 0.7}
    model = shaken(built("instance", **settings))
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    masks, labels, packed, _ = targets_of(size)
    classes, logits = plain(model, image)
    want, *_ = instance_loss(classes, logits, logits, masks, labels, model.config)
    true = true_class_loss(model, image, masks, labels)
    want = want + 0.7 * true
    loss, losses = model.loss(image, packed)
    torch.testing.assert_close(loss, want, rtol=1e-8, atol=0)
    torch.testing.assert_close(losses["loss_true_class"][0], true, rtol=1e-8, atol=0)
    assert_same_gradients(gradients(loss, model), gradients(want, model))
    assert torch.equal(model(image, targets=packed).loss, loss)
    model.config.true_mask_weight = 0.0
    assert "loss_true_class" not in model.loss(image, packed)[1]


def test_a_mask_that_covers_nothing_adds_no_class():
    model = built("instance", mask="fine", class_from="mask").eval()
    with torch.no_grad():
        model.mask_embed.weight.zero_()
        model.mask_embed.bias.zero_()[0] = -1
        model.mask_features.weight.zero_()
        model.mask_features.bias.zero_()[0] = 1e3  # mask logits of -1000 everywhere
        image = torch.randn(2, 3, 32, 40)
        found = model.predict(image).classes
        queries = model.encoder(image, model.queries.weight)[-1][:, : model.config.num_queries]
        torch.testing.assert_close(found, model.class_embed(queries), rtol=0, atol=1e-6)


def test_queries_of_a_local_start_begin_at_places():
    model = built("instance", local_start=True, image_size=(48, 72))  # 6 x 9 patches, 6 queries
    positions = model.encoder.pos_embed[0].unflatten(0, (6, 9))
    centres = positions[1::3, 1::3].flatten(0, 1)  # of 2 x 3 parts of 3 x 3 patches
    torch.testing.assert_close(model.queries.weight[:, :16], centres[:, :16])


def test_recomputation_changes_nothing():
    grads = []
    for enable in (False, True):
        model = built("instance", dropout=0.2).train()
        model.gradient_checkpointing_enable(enable)
        torch.manual_seed(2)
        model.loss(torch.ones(2, 3, 32, 40), targets_of((32, 40))[2])[0].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_the_papers_models():
    with torch.device("meta"):
        model = Seq2Seg(Seq2SegConfig.preset("semantic", 34))
    count = sum(p.numel() for p in model.parameters())
    # 50.8 million in the paper, with what BERT has besides: a pooler, positions up to 512, types
    pooler, positions, types = 768 * 768 + 768, (512 - 128) * 768, 2 * 768
    assert count == 49_902_370
    assert round((count + pooler + positions + types) / 1e6, 1) == 50.8
    c = Seq2SegConfig.preset("instance")
    assert (c.num_queries, c.class_weight, c.dice_weight, c.no_object_weight) == (6, 0.1, 1, 0.5)
    assert not Seq2SegConfig.preset("semantic-no-skip").skip


def test_its_settings_follow_from_the_head():
    pixels, objects = (Seq2SegConfig.tiny(7, head) for head in ("semantic", "instance"))
    assert pixels.tasks == ("semantic",)
    assert pixels.labels.stuff == tuple(range(7))
    assert pixels.num_queries is None
    assert objects.tasks == ("instance", "panoptic", "semantic")
    assert objects.num_queries == 6
    assert pixels.input.crop == (64, 64)
    for config in (pixels, objects):
        assert segkern.models.build_model(config).config == config


BAD = [
    ({"task_head": "panoptic"}, "task_head must be 'semantic' or 'instance', got 'panoptic'"),
    ({"mask": "box"}, "mask must be one of linear, attention, fine, got 'box'"),
    ({"class_from": "box"}, "class_from must be one of query, mask, got 'box'"),
    ({"true_mask_weight": -1}, "true_mask_weight must be >= 0, got -1"),
    (
        {"true_mask_weight": 0.5, "task_head": "instance"},
        "must be 0 but for task_head 'instance' with class_from 'mask', got 0.5",
    ),
    ({"image_size": (30, 40)}, r"image_size must be \(H, W\), multiples of 8, got \(30, 40\)"),
    ({"hidden_size": 33}, r"hidden_size must be a multiple of num_attention_heads \(2\), got 33"),
    ({"num_attention_heads": 8, "local_start": True}, "at least 8 a head with local_start"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ({"dice_weight": -1}, "dice_weight must be >= 0, got -1"),
    ({"mask_size": (0, 4)}, r"mask_size must be a height and width of at least 1, got \(0, 4\)"),
    ({"num_queries": 0, "task_head": "instance"}, "num_queries must be >= 1, got 0"),
    (
        {"task_head": "instance", "mask": "fine", "patch_size": 2, "image_size": (32, 40)},
        "patch_size must be a multiple of 4 with mask='fine', got 2",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=str)
def test_settings_that_it_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        Seq2SegConfig(5, **(SIZES | settings))


def test_no_such_preset():
    with pytest.raises(ValueError, match=r"name must be semantic, .*, got 'large'"):
        Seq2SegConfig.preset("large")


IMAGE, MAP = torch.zeros(2, 3, 32, 40), torch.zeros(2, 32, 40, dtype=torch.int64)
LISTS = {"mask_labels": [MAP[:1].bool()] * 2, "class_labels": [torch.zeros(1).long()] * 2}
WRONG = {
    "channels": (
        "semantic",
        {"pixel_values": IMAGE[:, :2]},
        r"pixel_values must be \[B, 3, H, W\]",
    ),
    "empty": ("semantic", {"pixel_values": IMAGE[:0]}, "pixel_values must not be empty"),
    "a label": ("semantic", {"labels": MAP + 5}, r"labels must be in \[0, 5\)"),
    "labels of another size": ("semantic", {"labels": MAP[:, :9]}, "labels must be"),
    "masks for pixels": ("semantic", LISTS, "are for task_head 'instance': give labels"),
    "labels for objects": ("instance", {"labels": MAP}, "labels are for task_head 'semantic'"),
    "masks alone": (
        "instance",
        {"mask_labels": LISTS["mask_labels"]},
        "together, or targets alone",
    ),
    "both": (
        "instance",
        LISTS | {"targets": targets_of((32, 40))[2]},
        "together, or targets alone",
    ),
    "no map": (
        "semantic",
        {"targets": targets_of((32, 40))[2]._replace(semantic=None)},
        "targets must have a semantic map, got None",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_are_wrong(case):
    head, arguments, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        built(head)(**({"pixel_values": IMAGE} | arguments))
