"""U-Net against plain convolutions with the same weights, and its settings."""

import pytest
import torch
import torch.nn.functional as F

from segkern import UNet, UNetConfig
from support.two_heads import instance_loss, semantic_loss, shaken, targets_of

SIZES = {"image_size": (32, 48), "channels": 4, "depth": 3, "dropout": 0.0}
BERT = {"bert_layers": 2, "num_attention_heads": 4}


def built(head="semantic", **changes):
    torch.manual_seed(0)
    model = shaken(UNet(UNetConfig(5, head, **(SIZES | {"num_queries": 6} | changes))))
    for norm in model.modules():  # moments that are not where they start
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model


def plain_block(block, x):
    for conv, norm in ((block.conv1, block.norm1), (block.conv2, block.norm2)):
        x = F.conv2d(x, conv.weight, padding=1)
        moments = (None, None) if norm.training else (norm.running_mean, norm.running_var)
        x = F.batch_norm(x, *moments, norm.weight, norm.bias, norm.training, eps=norm.eps).relu()
    return x


def plain_maps(model, image):
    """The coarsest and the finest map of the padded image."""
    c, (H, W) = model.config, image.shape[2:]
    n = 2**c.depth
    x, maps = F.pad(image, (0, -W % n, 0, -H % n)), []
    for i, block in enumerate(model.encoder):
        x = plain_block(block, F.max_pool2d(x, 2) if i else x)
        maps.append(x)
    if model.bert is not None:
        conv = model.bert.patch_embed["proj"]
        h, w = x.shape[2:]
        grid = model.bert.pos_embed.view(1, *model.bert.grid, -1).movedim(3, 1)
        positions = F.interpolate(grid, (h, w), mode="bilinear")
        x = (F.conv2d(x, conv.weight, conv.bias) + positions).flatten(2).mT
        x = model.bert.norm(x)
        for block in model.bert.blocks:  # which tests/nn/test_bert.py compares
            x = block(x)
        x = x.mT.unflatten(2, (h, w))
    y = coarsest = x
    for i, (up, block) in enumerate(zip(model.up, model.decoder)):
        y = F.conv_transpose2d(y, up.weight, up.bias, stride=2)
        y = plain_block(block, torch.cat((y, maps[-2 - i]), 1))
    return coarsest, y


def classes_under(model, share, coarsest):
    """Of what lies under masks that have such shares [B, M, h, w] of the places of a map."""
    sums = torch.einsum("bmhw,bdhw->bmd", share, coarsest)
    mean = sums / (1 + share.sum((2, 3)))[..., None]
    return mean @ model.map_class_embed.weight.mT + model.map_class_embed.bias


def plain(model, image):
    """Logits [B, K, H, W], or class logits and mask logits of the padded image."""
    c, (H, W) = model.config, image.shape[2:]
    coarsest, y = plain_maps(model, image)
    if c.task_head == "semantic":
        y = F.conv2d(y, model.classify.weight, model.classify.bias)
        return y[:, :, :H, :W]
    classes = coarsest.mean((2, 3)) @ model.class_embed.weight.mT + model.class_embed.bias
    classes, masks = classes.view(len(image), c.num_queries, -1), F.conv2d(y, model.masks.weight)
    if c.class_from == "mask":
        share = F.avg_pool2d(masks, 2**c.depth).sigmoid()
        classes = classes + classes_under(model, share, coarsest)
    return classes, masks


def true_class_loss(model, image, masks, labels):
    """The mean cross entropy of the true objects, each from what lies under its own mask."""
    coarsest, total = plain_maps(model, image)[0], 0
    for y, truth, label in zip(coarsest, masks, labels):
        share = F.adaptive_avg_pool2d(truth[None].double(), y.shape[1:])
        logits = classes_under(model, share, y[None])[0]
        total = total + F.cross_entropy(logits, label, reduction="sum")
    return total / sum(map(len, labels))


def assert_same_gradients(loss, want, model):
    parameters = dict(model.named_parameters())
    pair = [torch.autograd.grad(x, parameters.values()) for x in (loss, want)]
    for name, found, wanted in zip(parameters, *pair, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9, msg=name)


BUILDS = {"convolutions": {}, "transformer layers": BERT}
HUNGARIAN = BUILDS | {
    "classes under masks": {"class_from": "mask"},
    "and under true masks": BERT | {"class_from": "mask", "true_mask_weight": 0.7},
}
IMAGES = [(32, 48), (27, 42)]


@pytest.mark.parametrize("size", IMAGES, ids=str)
@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_semantic_head_is_the_plain_one(mode, kind, size):
    model = built(**BUILDS[kind]).train(mode == "train")
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    *_, packed, maps = targets_of(size)
    wanted = plain(model, image)
    torch.testing.assert_close(model(image).logits, wanted, rtol=0, atol=1e-8)
    loss, want = model.loss(image, packed)[0], semantic_loss(wanted, maps)
    torch.testing.assert_close(loss, want, rtol=1e-8, atol=0)
    assert_same_gradients(loss, want, model)


@pytest.mark.parametrize("size", IMAGES, ids=str)
@pytest.mark.parametrize("kind", HUNGARIAN)
def test_the_hungarian_head_is_the_plain_one(kind, size):
    model = built("instance", **HUNGARIAN[kind]).eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    masks, labels, packed, _ = targets_of(size)
    classes, logits = plain(model, image)
    out = model(image)
    torch.testing.assert_close(out.class_queries_logits, classes, rtol=0, atol=1e-8)
    torch.testing.assert_close(out.masks_queries_logits, logits, rtol=0, atol=1e-8)
    h, w = (n // model.config.match_stride for n in logits.shape[2:])
    coarse = F.interpolate(logits, (h, w), mode="bilinear")
    want, *_ = instance_loss(classes, logits, coarse, masks, labels, model.config)
    loss, losses = model.loss(image, packed)
    parts = ["loss_cross_entropy", "loss_dice"]
    if weight := model.config.true_mask_weight:
        parts.append("loss_true_class")
        true = true_class_loss(model, image, masks, labels)
        torch.testing.assert_close(losses["loss_true_class"][0], true, rtol=1e-8, atol=0)
        want = want + weight * true
    assert sorted(losses) == parts
    torch.testing.assert_close(loss, want, rtol=1e-8, atol=0)
    assert_same_gradients(loss, want, model)


def test_recomputation_changes_nothing():
    """Neither the gradients nor the norms' averages, which count each image once."""
    grads, buffers = [], []
    for enable in (False, True):
        model = built(**BERT).train()
        model.gradient_checkpointing_enable(enable)
        torch.manual_seed(2)
        image = torch.randn(2, 3, 32, 48, dtype=torch.float64)
        model.loss(image, targets_of((32, 48))[2])[0].backward()
        grads.append([p.grad for p in model.parameters()])
        buffers.append(list(model.buffers()))
    for one, other in zip(grads[0] + buffers[0], grads[1] + buffers[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_the_papers_models():
    with torch.device("meta"):
        models = {
            name: UNet(UNetConfig.preset(name, K))
            for name, K in (("semantic", 1), ("hungarian", 19))
        }
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    assert count["semantic"] == 7_763_041
    assert count["hungarian"] == 7_763_008 + 100 * 32 + 513 * 100 * 20
    config = UNetConfig.preset("semantic-bert2", 34)
    assert (config.bert_layers, config.task_head, config.num_labels) == (2, "semantic", 34)
    assert UNetConfig.preset("hungarian").num_queries == 100


BAD = [
    ({"task_head": None}, "task_head must be 'semantic' or 'instance', got None"),
    ({"image_size": (30, 48)}, r"image_size must be \(H, W\), multiples of 8, got \(30, 48\)"),
    ({"bert_layers": -1}, "bert_layers must be an integer of at least 0, got -1"),
    (BERT | {"num_attention_heads": 5}, r"coarsest maps \(32\), got 5"),
    ({"match_stride": 0}, "match_stride must be >= 1, got 0"),
    ({"class_from": "box"}, "class_from must be one of query, mask, got 'box'"),
    ({"true_mask_weight": 0.5, "task_head": "instance"}, "with class_from 'mask', got 0.5"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=str)
def test_settings_that_it_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(5, **(SIZES | settings))


@pytest.mark.parametrize("name", ["large", "semantic-bert", "semantic-bert0", "semantic-bertx"])
def test_no_such_preset(name):
    with pytest.raises(ValueError, match=rf"name must be semantic or hungarian.*, got '{name}'"):
        UNetConfig.preset(name)
