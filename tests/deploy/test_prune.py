"""Models that are cut: what they compute, what they are written as, and how they train on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import segkern
from segkern import recipes
from segkern.cli import main
from segkern.data import DigitsConfig, build_dataset
from segkern.deploy.prune import Uses, used_queries
from segkern.models import (
    EoMT,
    EoMTConfig,
    Mask2Former,
    Mask2FormerConfig,
    MaskFormer,
    MaskFormerConfig,
    OneFormer,
    OneFormerConfig,
    SegFormer,
    SegFormerConfig,
    open_model,
)
from segkern.models.smaller import (
    free_queries,
    parts_of,
    weights_of_layers,
    with_layers,
    with_queries,
    zero_weights,
)
from segkern.structures.logits import QueryLogits
from segkern.training.loop import train
from segkern.training.zeros import Zeros

NAMES = dict(enumerate([*map(str, range(10)), "background"]))
LABELS = {"id2label": NAMES, "stuff": (10,)}
MAKERS = {
    "Mask2Former": lambda: Mask2Former(
        replace(Mask2FormerConfig.tiny(11), decoder_layers=4, num_queries=9, **LABELS)
    ),
    "MaskFormer": lambda: MaskFormer(
        replace(MaskFormerConfig.tiny(11), decoder_layers=4, num_queries=9, **LABELS)
    ),
    "OneFormer": lambda: OneFormer(
        replace(OneFormerConfig.tiny(11), decoder_layers=4, num_queries=9, **LABELS)
    ),
    "EoMT": lambda: EoMT(replace(EoMTConfig.tiny(11), num_queries=9, **LABELS)),
}
WITH_LAYERS = ("Mask2Former", "MaskFormer", "OneFormer")


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    made = {name: make().eval() for name, make in MAKERS.items()}
    for model in made.values():  # far from one another, as trained queries are
        for name in parts_of(model).queries:
            torch.nn.init.normal_(model.get_parameter(name))
    return made


@pytest.fixture(scope="module")
def scenes():
    return build_dataset(DigitsConfig(size=(64, 64), level="easy", task="panoptic"), "val")


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", WITH_LAYERS)
@torch.no_grad()
def test_a_cut_model_gives_the_whole_ones_prediction_after_that_layer(models, kind, layers):
    model, x = models[kind], torch.randn(2, 3, 64, 96)
    inputs = model.inputs("panoptic", 2)
    cut = with_layers(model, layers)
    assert cut.config.decoder_layers == layers
    assert model.config.decoder_layers == 4
    every = model.all_predictions(x, *inputs)
    first = 1 if kind == "MaskFormer" else 0  # which predicts nothing before its first layer
    have = cut.predict(x, *inputs)
    for found, wanted in ((have.classes, every[0]), (have.masks, every[1])):
        assert not torch.equal(found, wanted[:, -1])
        assert torch.equal(found, wanted[:, layers - first])
    assert torch.equal(have.features, every[2])


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_the_rows_of_the_queries_that_stay_are_equal(models, kind):
    model, kept = models[kind], [1, 2, 6]
    cut = with_queries(model, kept)
    fixed = [8] if kind == "OneFormer" else []
    assert cut.config.num_queries == 3 + len(fixed)
    for name in parts_of(model).queries:
        assert torch.equal(cut.get_parameter(name), model.get_parameter(name)[kept + fixed])
    rest = {k: v for k, v in cut.state_dict().items() if k not in parts_of(model).queries}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in rest.items())
    out = cut.predict(torch.randn(1, 3, 64, 64), *cut.inputs("panoptic", 1))
    assert out.classes.shape[1] == out.masks.shape[1] == 3 + len(fixed)


def test_uses_are_segments_that_are_the_best_somewhere_in_their_mask():
    """Of five queries: "no object", the best of two on one place, the other, another place, and
    one that is best only outside of its mask."""
    classes = torch.full((1, 5, 3), -9.0)
    classes[0, 0, 2] = 9
    classes[0, 1:, 0] = torch.tensor([9.0, 2.0, 3.0, 0.0])
    masks = torch.full((1, 5, 1, 4), -9.0)
    masks[0, 1:3, 0, :2] = 9
    masks[0, 3, 0, 2] = 9
    masks[0, 4, 0, 3] = -1
    uses = Uses(5)
    uses(None, QueryLogits(classes, masks))
    assert uses.segments.tolist() == [0, 1, 0, 1, 0]
    assert uses.most(2, 5) == [1, 3]
    assert uses.most(3, 5) == [1, 2, 3]  # ties: the greater score
    assert uses.most(1, 1) == [0]
    uses(None, QueryLogits(classes, torch.eye(5)[None, :, 1:], masks.new_ones(1, 4, 2, 2)))
    assert uses.segments.sum() == 3  # one query everywhere, of two factors


@pytest.mark.parametrize("kind", ["Mask2Former", "OneFormer"])
def test_queries_are_chosen_by_use_and_always_the_same(models, scenes, kind):
    model, tasks = models[kind], ("panoptic",)
    found = [used_queries(model, scenes, tasks, 3, limit=2) for _ in range(2)]
    assert found[0] == found[1] == sorted(set(found[0]))
    assert len(found[0]) == 3
    free = free_queries(model)
    turned = with_queries(model, range(free)[::-1])
    again = used_queries(turned, scenes, tasks, 3, limit=2)
    assert sorted(free - 1 - q for q in again) == found[0]  # the same queries at other places


@pytest.mark.parametrize("everywhere", [False, True], ids=["together", "everywhere"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_zeros_is_exact_and_sensitive_parts_stay(share, everywhere):
    torch.manual_seed(1)
    model = MAKERS["OneFormer"]()
    for weight in weights_of_layers(model).values():  # some begin as zeros
        torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count = zero_weights(model, share, everywhere, keep=("backbone.*",))
    weights = weights_of_layers(model, keep=("backbone.*",))
    zeros = {name: int((w == 0).sum()) for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    if everywhere:
        assert zeros == {name: round(share * w.numel()) for name, w in weights.items()}
    else:
        assert sum(zeros.values()) == round(share * total)
        assert len({round(n / weights[k].numel(), 1) for k, n in zeros.items()}) > 1
    assert count == sum(zeros.values())
    for name, value in model.state_dict().items():
        if name not in weights:
            assert torch.equal(value, before[name]), name
        else:
            kept = value != 0
            assert torch.equal(value[kept], before[name][kept])
            if everywhere:  # the least are gone
                assert before[name][kept].abs().min() >= before[name][~kept].abs().max()
    for part in ("task_mlp", "sampling_offsets", "class_embed", "backbone", "norm"):
        assert any(part in name for name in before)
        assert not any(part in name for name in weights)


@pytest.mark.slow
def test_what_is_written_opens_again_and_its_table_is_that_of_the_file(models, scenes, tmp_path):
    model, out = models["Mask2Former"], tmp_path / "small"
    settings = {"dataset": scenes, "limit": 2, "runs": 1, "progress": False}
    report = segkern.prune(model, out, layers=2, queries=4, zeros=0.6, **settings)
    stored = json.loads((out / "pruning.json").read_text())
    assert stored == report
    opened = open_model(out)
    assert (opened.config.decoder_layers, opened.config.num_queries) == (2, 4)
    rows = [model.query_decoder.query_feat.weight[q] for q in report["queries"]]
    assert torch.equal(opened.query_decoder.query_feat.weight, torch.stack(rows))
    zeros = sum(int((w == 0).sum()) for w in weights_of_layers(opened).values())
    assert zeros == report["zeros"]["count"] == round(0.6 * report["zeros"]["of"])
    before, after = report["rows"]
    whole = segkern.evaluate(model, scenes, limit=2, batch_size=1, progress=False)
    small = segkern.evaluate(opened, scenes, limit=2, batch_size=1, progress=False)
    for row, value in ((before, whole), (after, small)):
        assert {k: row[k] for k in ("pq", "ap", "miou")} == {
            k: value[k] for k in ("pq", "ap", "miou")
        }
        assert row["ms"] > 0
    bytes_of = (out / "model.safetensors").stat().st_size
    assert after["mb"] == round(bytes_of / 1e6, 3) < before["mb"]
    assert after["gzip_mb"] < 0.7 * after["mb"]
    assert before["gzip_mb"] > 0.85 * before["mb"]
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


@pytest.mark.slow
def test_transformers_opens_a_pruned_mask2former(scenes, tmp_path):
    sizes = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 32)
    swin = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
    config = Mask2FormerConfig(
        11,
        backbone="swin_tiny",
        backbone_options=swin,
        num_queries=6,
        encoder_layers=1,
        decoder_layers=3,
        dim_feedforward=16,
        shortest_edge=64,
        **LABELS,
        **sizes,
    )
    model = Mask2Former(config).eval()
    settings = {"dataset": scenes, "limit": 1, "runs": 1, "progress": False}
    segkern.prune(model, tmp_path / "small", layers=2, queries=3, zeros=0.3, **settings)
    kind = transformers.Mask2FormerForUniversalSegmentation
    theirs, info = kind.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"] - {"criterion.empty_weight"}
    assert not info["unexpected_keys"]
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        have, want = theirs.eval()(x), open_model(tmp_path / "small")(x)
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(getattr(have, name), getattr(want, name), atol=1e-3, rtol=1e-3)


FAULTS = [
    ("Mask2Former", {}, "layers, queries or zeros must be given"),
    ("Mask2Former", {"layers": 0}, "layers must be at least 1 and fewer than the 4 .* got 0"),
    ("Mask2Former", {"layers": 4}, "layers must be at least 1 and fewer than the 4 .* got 4"),
    ("EoMT", {"layers": 1}, "layers must be left out for a eomt"),
    ("Mask2Former", {"queries": 9}, "queries must be more than 0 and fewer than the 9 .* got 9"),
    ("OneFormer", {"queries": 1}, "queries must be more than 1 and fewer than the 9 .* got 1"),
    ("Mask2Former", {"queries": 3}, "dataset must be given"),
    ("SegFormer", {"queries": 3}, "queries must be left out for a segformer"),
    ("Mask2Former", {"zeros": 1.0}, r"zeros must be a share in \(0, 1\), got 1.0"),
    ("Mask2Former", {"zeros": 0.3, "keep": ("bakbone.*",)}, "keep must be patterns .*'bakbone"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), FAULTS, ids=lambda x: str(x)[:30])
def test_what_cannot_be_pruned_is_told_and_nothing_is_written(
    models, kind, settings, message, tmp_path
):
    model = models.get(kind) or SegFormer(SegFormerConfig.tiny(11)).eval()
    with pytest.raises(ValueError, match=message):
        segkern.prune(model, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(models, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="out must not be there yet"):
        segkern.prune(models["Mask2Former"], tmp_path, layers=1)
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_a_maskformer_without_auxiliary_losses_is_cut_with_a_warning():
    config = replace(MaskFormerConfig.tiny(3), use_auxiliary_loss=False, decoder_layers=2)
    with pytest.warns(UserWarning, match="use_auxiliary_loss is False"):
        with_layers(MaskFormer(config), 1)


def test_models_of_pixels_are_pruned_to_zeros(tmp_path):
    model = SegFormer(SegFormerConfig.tiny(3)).eval()
    report = segkern.prune(model, tmp_path / "out", zeros=0.5, runs=1, progress=False)
    assert report["rows"][1].keys() == {"name", "ms", "mb", "gzip_mb"}  # no data, no quality
    weights = load_file(tmp_path / "out/model.safetensors")
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    assert zeros >= report["zeros"]["count"] > 0
    image = np.zeros((40, 60, 3), np.uint8)
    assert segkern.segment(open_model(tmp_path / "out"), image).segmentation.shape == (40, 60)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_goes_on_with_the_pruned_sizes_and_keeps_zeros(
    models, scenes, optimizer, tmp_path
):
    start = tmp_path / "small"
    settings = {"dataset": scenes, "limit": 1, "runs": 1, "progress": False}
    segkern.prune(models["Mask2Former"], start, layers=2, queries=4, zeros=0.5, **settings)
    config = replace(
        recipes.digits("easy"),
        output=tmp_path / "run",
        init=str(start),
        keep_zeros=True,
        steps=2,
        warmup=0,
        batch_size=2,
        evaluate_every=0,
        tensorboard=False,
        optimizer=optimizer,
        model=open_model(start).config,
    )
    before = open_model(start)
    after = train(config, progress=False).model
    for name, weight in weights_of_layers(after).items():
        was = before.get_parameter(name)
        assert torch.equal(weight == 0, was == 0), name
    moved = [k for k, w in after.named_parameters() if not torch.equal(w, before.get_parameter(k))]
    assert len(moved) > 50
    again = replace(config, output=tmp_path / "free", keep_zeros=False)
    free = train(again, progress=False).model
    zeros = [
        sum(int((w == 0).sum()) for w in weights_of_layers(m).values()) for m in (free, after)
    ]
    assert zeros[0] < zeros[1] / 50  # but for those without a gradient


def test_keeping_zeros_that_are_not_there_is_refused(tmp_path):
    config = replace(recipes.digits("easy"), output=tmp_path, keep_zeros=True, evaluate_every=0)
    with pytest.raises(ValueError, match="keep_zeros must be False for a model of random weights"):
        train(config, progress=False)
    with pytest.raises(ValueError, match="keep_zeros must be False for a model that starts with"):
        Zeros(SegFormer(SegFormerConfig.tiny(3)))


@pytest.mark.slow
def test_the_commands_prune_and_train_on(models, tmp_path, capsys):
    whole, small = str(tmp_path / "whole"), str(tmp_path / "small")
    models["Mask2Former"].save_pretrained(whole)
    wanted = ["--layers", "2", "--queries", "5", "--zeros", "0.4", "--everywhere", "--limit", "2"]
    assert main(["prune", whole, small, *wanted]) == 0
    text = capsys.readouterr().out
    for word in ("PQ", "mIoU", "ms an image", "before", "after", "weights are 0", "--keep-zeros"):
        assert word in text
    run = tmp_path / "run"
    trained = f"train --init {small} --output {run} --keep-zeros --steps 2 --batch-size 2"
    trained += " --data.level easy --evaluate-every 0 --no-tensorboard"
    assert main(trained.split()) == 0, capsys.readouterr().err
    model = open_model(run)
    assert (model.config.decoder_layers, model.config.num_queries) == (2, 5)
    assert main(["prune", whole, small, "--layers", "1"]) == 2
    assert "out must not be there yet" in capsys.readouterr().err
