"""OneFormer itself: what it is asked, what it refuses, and a training that is one graph."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import segkern
from segkern import recipes
from segkern.cli import main
from segkern.inference import segment as inference
from segkern.models import OneFormer, OneFormerConfig
from segkern.models.oneformer.prompts import TASK_TOKENS
from segkern.structures.targets import TASKS, Targets
from support.inputs import random_targets


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return OneFormer(OneFormerConfig.tiny(11)).eval()


def images(B=2):
    return torch.randn(B, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def targets(task=(0, 2)):
    masks, labels = random_targets((3, 1), 11, 64, 96)
    return Targets.from_lists(masks, labels)._replace(task=torch.tensor(task))


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


# --- what it is asked -----------------------------------------------------------------------


def test_tasks_are_constants_of_the_model(tiny):
    for task, row in TASK_TOKENS.items():
        (rows,) = tiny.inputs(task, 3)
        assert rows.shape == (3, 77)
        assert rows[2].tolist() == [*row, *[0] * (77 - len(row))]
        assert rows.data_ptr() == tiny.inputs(task, 2)[0].data_ptr()  # nothing is made
    assert "task_rows" not in tiny.state_dict()


def test_tokens_outlive_to_empty(tiny):
    """As FSDP makes a model: without memory first, and then with that of its weights."""
    with torch.device("meta"):
        model = OneFormer(tiny.config)
    assert model.task_rows.is_meta
    pair = torch.nn.ModuleList([model]).to_empty(device="cpu")
    pair[0].load_state_dict(tiny.state_dict())
    for name, table in tiny.named_buffers():
        assert torch.equal(pair[0].get_buffer(name), table), name
    at = model.task_rows.data_ptr()
    assert model.to("cpu").task_rows.data_ptr() == at  # which a CUDA graph may read


@torch.no_grad()
def test_segment_asks_as_of_every_model(tiny):
    picture = (torch.rand(3, 70, 90) * 255).byte()
    for task in (None, *TASKS):
        found = segkern.segment(tiny, picture, task=task)
        assert (found.task, found.segmentation.shape) == (task or "panoptic", (70, 90))


def test_a_result_has_the_papers_thresholds_unless_told(tiny, monkeypatch):
    seen, find = [], inference.find_maps

    def recorded(*arguments):
        seen.append(arguments[-1])
        return find(*arguments)

    monkeypatch.setattr(inference, "find_maps", recorded)
    picture = (torch.rand(3, 64, 64) * 255).byte()
    for task, given in (("panoptic", {}), ("instance", {}), ("panoptic", {"threshold": 0.9})):
        segkern.segment(tiny, picture, task=task, **given)
    assert [(o.threshold, o.overlap_threshold, o.top_k) for o in seen] == [
        (0.5, 0.8, None),
        (None, None, 10),
        (0.9, 0.8, None),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("things", "task_inputs must be of panoptic, instance, semantic.*got 'things'"),
        (["panoptic"], "one or 2, one for each image"),
        (torch.zeros(2, 5), r"task_inputs must be tokens \[2, 77\], got \[2, 5\] float32"),
        ([[49406] * 77] * 2, r"or a tensor of their tokens, got \[\[49406, 49406.{,80}$"),
        (7, "or a tensor of their tokens, got 7"),
    ],
    ids=["name", "count", "shape", "a list of tokens", "a number"],
)
def test_a_wrong_task_is_refused(tiny, given, message):
    with pytest.raises(ValueError, match=message):
        tiny(images(), given)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "uint8", "bool"])
def test_tokens_that_a_dtype_rounds_are_refused(tiny, dtype):
    rows = tiny.task_rows[:2]
    for whole in (torch.int32, torch.float32, torch.float64):
        assert torch.equal(
            tiny.predict(images(), rows.to(whole))[0], tiny.predict(images(), rows)[0]
        )
    with pytest.raises(TypeError, match=rf"task_inputs must be int64, .*got \[2, 77\] {dtype}"):
        tiny(images(), rows.to(getattr(torch, dtype)))


@torch.no_grad()
def test_what_a_processor_gives_is_taken(tiny):
    processor = segkern.Processor("OneFormerImageProcessor", size={"height": 64, "width": 96})
    pictures = [(torch.rand(3, 64, 96) * 255).byte() for _ in range(2)]
    tasks = ["semantic", "instance"]
    batch = processor(pictures, task_inputs=tasks)
    assert batch["task_inputs"] == ["the task is semantic", "the task is instance"]
    have, want = tiny(**batch), tiny(batch["pixel_values"], tasks)
    assert torch.equal(have.class_queries_logits, want.class_queries_logits)


def test_wrong_texts_are_refused(tiny):
    with pytest.raises(ValueError, match=r"text_inputs must be \[B, Q-n_ctx, L\].*with B = 2"):
        tiny(images(), "panoptic", torch.zeros(2, 3, 16, dtype=torch.int64), targets=targets())
    with pytest.raises(ValueError, match="at most 16 tokens a text, got"):
        tiny(images(), "panoptic", torch.zeros(2, 8, 77, dtype=torch.int64), targets=targets())
    with pytest.raises(ValueError, match=r"targets\.task must say what is to be found"):
        tiny.loss(images(), targets()._replace(task=None))
    for task_inputs in (None, "panoptic"):
        with pytest.raises(
            ValueError, match=r"targets\.task must be \[B\] int64 with B = 2, got \[1\]"
        ):
            tiny(images(), task_inputs, targets=targets((0,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_queries": 2}, "num_queries must be >= 3, got 2"),
        ({"task_seq_len": 6}, "task_seq_len must be >= 7, got 6"),
        ({"text_encoder_width": 96}, "text_encoder_width must be a multiple of 64, got 96"),
        ({"text_encoder_width": 128}, r"must equal hidden_dim \(64\) where text_encoder_n_ctx"),
        ({"contrastive_temperature": 0}, "contrastive_temperature must be > 0, got 0"),
        ({"tokens": "bert"}, "tokens must be clip or words, got 'bert'"),
        ({"feature_size": 32}, r"feature_size must equal hidden_dim \(64\), got 32"),
        ({"dropout": 2.0}, r"dropout must be in \[0, 1\], got 2.0"),
        ({"prompts": [[1024]] * 6}, r"prompts must be rows .* in \[0, 1023\], got \(1024,\)"),
        ({"prompts": [[1] * 17] * 6}, "prompts must be rows of 1 to 16 tokens"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"OneFormerConfig: .*{message}"):
        replace(OneFormerConfig.tiny(3), **settings)


def test_sentences_of_other_classes_are_refused():
    config = OneFormerConfig.preset("swin_tiny", "cityscapes").with_prompts()
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"must be 10 rows of tokens.*got 22"),
    ):
        OneFormer(replace(config, num_labels=7, id2label=None, stuff=()))
    with pytest.raises(ValueError, match="names must be 19, one a label, got 2"):
        config.with_prompts(["a", "b"])
    with pytest.raises(ValueError, match=r"backbone must be one of .*dataset one of"):
        OneFormerConfig.preset("vit", "coco")


# --- precision ------------------------------------------------------------------------------


@torch.no_grad()
def test_the_tokens_numbers_are_not_rounded_in_half_precision(tiny):
    rows, norm = tiny.task_rows, tiny.query_decoder.norm
    half = OneFormer(tiny.config).eval()
    half.load_state_dict(tiny.state_dict())
    half = half.bfloat16()
    weights = OneFormer(tiny.config).double()
    weights.load_state_dict(half.state_dict())  # as they are rounded
    want = weights.task_queries.token(rows, weights.query_decoder.norm)
    have = half.task_queries.token(rows, half.query_decoder.norm)
    assert have.dtype == torch.bfloat16
    assert error(have, want) <= 2.0**-8 * want.abs().max().item()  # the result's own rounding
    with torch.autocast("cpu", torch.bfloat16):
        have = tiny.task_queries.token(rows, norm)
    assert torch.equal(have, tiny.task_queries.token(rows, norm))


@torch.no_grad()
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_half_precision_runs(tiny, way):
    model, x = OneFormer(tiny.config).eval(), images()
    model.load_state_dict(tiny.state_dict())
    if way == "weights":
        out = model.bfloat16()(x.bfloat16(), "instance")
    else:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x, "instance")
    assert out.class_queries_logits.isfinite().all()


# --- training -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_step_is_one_graph(tiny):
    x, given = images(), targets()
    shallow = replace(tiny.config, encoder_layers=1, decoder_layers=1, text_encoder_num_layers=1)
    model = OneFormer(shallow).eval()
    want, parts = model.loss(x, given)
    assert {name: len(value) for name, value in parts.items()} == {
        "loss_cross_entropy": 2,
        "loss_mask": 2,
        "loss_dice": 2,
        "loss_contrastive": 1,
    }
    have, _ = torch.compile(model.loss, fullgraph=True, backend="eager")(x, given)
    assert have.item() == pytest.approx(want.item(), rel=1e-5)


def test_padded_targets_change_no_text(tiny):
    given = targets()
    wide = given._replace(
        labels=torch.nn.functional.pad(given.labels, (0, 4), value=3),
        masks=torch.nn.functional.pad(given.masks, (0, 0, 0, 0, 0, 4)),
    )
    assert torch.equal(tiny.text_queries(given), tiny.text_queries(wide))


@pytest.mark.parametrize("texts", [True, False], ids=["texts", "no texts"])
def test_every_weight_learns(tiny, texts):
    """Of those that say so: DDP waits for each."""
    model = OneFormer(replace(tiny.config, is_training=texts)).train()
    loss, _ = model.loss(images(), targets())
    loss.backward()
    still = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert still == []
    assert model.contrastive.logit_scale.requires_grad == texts
    assert model.parameter_roles().keys() == dict(model.named_parameters()).keys()


def test_an_opened_model_learns_classes_of_ones_own(tmp_path):
    config = replace(OneFormerConfig.tiny(3), tokens="clip", text_encoder_vocab_size=49408)
    start = OneFormer(config.with_prompts(["dog", "cat", "sky"]))
    for texts in (True, False):
        start.save_pretrained(tmp_path / "start", text_encoder=texts)
        opened = OneFormer.from_pretrained(tmp_path / "start", num_labels=12)
        model = OneFormer(opened.config.with_prompts(["horse"] * 12))
        model.load_state_dict(opened.state_dict(), strict=False)
        assert torch.equal(
            model.query_decoder.level_embed.weight, start.query_decoder.level_embed.weight
        )
        assert "loss_contrastive" in model.loss(images(), targets())[1]


def test_one_training_gives_a_model_of_three_tasks(tmp_path, capsys):
    run, figures = tmp_path / "run", tmp_path / "figures.json"
    short = ["--steps", "2", "--batch-size", "4", "--evaluate-every", "0", "--no-tensorboard"]
    command = ["train", "--recipe", "digits-oneformer", "--output", str(run), *short]
    assert main(command) == 0
    opened = segkern.open_model(run)
    assert opened.config.labels.names[10] == "background"
    assert opened.text_encoder is not None
    assert main(["evaluate", str(run), "--scenes", "2", "--out", str(figures)]) == 0
    measured = json.loads(figures.read_text())
    assert measured["tasks"] == list(TASKS)
    assert {"pq", "ap", "miou"} <= measured.keys()
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "picture.png")
    for task in TASKS:
        out = ["--out", str(tmp_path / task), "--task", task]
        assert main(["predict", str(tmp_path / "picture.png"), "--model", str(run), *out]) == 0
    assert "written" in capsys.readouterr().out


def test_maps_of_classes_alone_teach_no_instances():
    config = recipes.digits_oneformer()
    with pytest.raises(ValueError, match=r"data\.task must be panoptic or instance"):
        replace(config, data=replace(config.data, task="semantic"))
