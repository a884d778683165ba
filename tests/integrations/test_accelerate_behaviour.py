"""What an accelerated model of transformers is like: undone, copied, cast, compiled, trained."""

import copy
import io
import pickle
from importlib.metadata import version

import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import segkern
from segkern.integrations import accelerate as module
from support.transformers_models import SEGMENTATION, inputs, labels, noisy

SWITCHES = {  # and a class that each brings into a model
    "window_attention": ("mask2former", "SwinLayer"),
    "deformable_attention": ("mask2former", "Mask2FormerPixelDecoderEncoderLayer"),
    "masked_attention": ("mask2former", "Mask2FormerTransformerModule"),
    "attention": ("segformer", "SegformerAttention"),
    "feed_forward": ("segformer", "SegformerMixMLP"),
    "convolution": ("mask2former", "Conv3x3"),
    "linear": ("mask2former", "Linear"),
    "loss": ("mask2former", "Mask2FormerLoss"),
}
RECOMPUTE = "window_attention", "deformable_attention", "masked_attention"
BEFORE = module._BEFORE


def built(name="mask2former", dtype=torch.float64):
    torch.manual_seed(0)
    return noisy(SEGMENTATION[name]()).to(dtype)


def logits(out):
    return out.logits if "logits" in out else out.masks_queries_logits


def classes(model):
    return [type(m) for m in model.modules()]


def swapped(model):
    return {type(m).__name__ for m in model.modules() if BEFORE in vars(m)}


@torch.no_grad()
def result(model, name="mask2former", dtype=torch.float64):
    return logits(model(**inputs(name, dtype)))


def error(a, b):
    return (a.double() - b.double()).abs().max().item()


# --- on and off -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEGMENTATION)
def test_restored_models_give_the_same_bits(name):
    model = built(name)
    before, kinds, want = copy.deepcopy(model.state_dict()), classes(model), result(model, name)
    assert segkern.accelerate(model) is model
    assert classes(model) != kinds
    assert segkern.restore(model) is model
    assert classes(model) == kinds
    assert not swapped(model)
    assert torch.equal(result(model, name), want)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_other_instances_and_transformers_stay_as_they_are():
    forwards = {c: c.forward for c in classes(built())}
    model, other = built(), built()
    kinds = classes(other)
    segkern.accelerate(model)
    assert classes(other) == kinds == classes(built())
    assert all(c.forward is f for c, f in forwards.items())


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches(switch):
    name, brought = SWITCHES[switch]
    model = built(name)
    want = result(model, name)
    assert brought in swapped(segkern.accelerate(model))
    segkern.accelerate(model, **{switch: False})  # again: sets the switches anew
    assert brought not in swapped(model)
    assert error(result(model, name), want) < 1e-8
    others = dict.fromkeys(SWITCHES, False)
    assert brought in swapped(segkern.accelerate(model, **(others | {switch: True})))
    assert error(result(model, name), want) < 1e-8
    assert not swapped(segkern.accelerate(model, **others))


def test_what_changed_since_is_undone_first():
    model = segkern.accelerate(built("segformer"))
    want, kinds = result(model, "segformer"), classes(model)
    layer = model.decode_head.linear_projections[0].proj
    nn.utils.parametrizations.weight_norm(layer)
    message = (
        r"restore: decode_head\.linear_projections\.0\.proj must be the Linear that accelerate "
        "made it, got ParametrizedLinear: undo first"
    )
    for undo in (segkern.restore, segkern.accelerate):
        changed = classes(model)
        with pytest.raises(ValueError, match=message):
            undo(model)
        assert classes(model) == changed
    assert error(result(model, "segformer"), want) < 1e-8
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert classes(model) == kinds
    assert classes(segkern.restore(model)) == classes(built("segformer"))


def test_twice_is_once():
    model = segkern.accelerate(built())
    kinds = classes(model)
    assert classes(segkern.accelerate(model)) == kinds
    assert classes(segkern.restore(model)) == classes(built())


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (nn.Linear(1, 1), r"got torch\.nn\.modules\.linear\.Linear$"),
        (nn.Sequential(nn.Linear(1, 1)), r"container\.Sequential$"),
        (None, "got builtins.NoneType"),
    ],
    ids=["Linear", "Sequential", "None"],
)
def test_unknown_models_are_an_error_that_says_what_came(wrong, came):
    with pytest.raises(TypeError, match=f"accelerate: model must be one of .*mask2former.*{came}"):
        segkern.accelerate(wrong)


def test_a_wrapped_model_is_an_error_that_says_what_to_give():
    with pytest.raises(TypeError, match=r"got .*Sequential \(give the model inside of it\)"):
        segkern.accelerate(nn.Sequential(built()))


def test_a_version_that_is_not_known_is_a_warning_that_names_it(monkeypatch):
    model = built()
    monkeypatch.setattr(module, "version", lambda package: "5.99.1")
    message = r"transformers must be 5\.17, .* to be known, got 5\.99\.1"
    with pytest.warns(UserWarning, match=message):
        segkern.accelerate(model)


# --- what runs as transformers wrote it -----------------------------------------------------


class Doubled(nn.Linear):
    """What an adapter does to a layer: its weights are not all that there is."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_adapters_in_layers_are_not_passed_over(accelerated_first):
    model, names = built(), []
    if accelerated_first:
        segkern.accelerate(model)
    for name, layer in model.named_modules():
        if name.endswith(("q_proj", "fc1", "sampling_offsets", "mask_embedder.0.0")):
            layer.__class__ = Doubled
            names.append(name)
    assert len(names) > 10
    have = result(model if accelerated_first else segkern.accelerate(model))
    reference = built()
    for name in names:
        reference.get_submodule(name).__class__ = Doubled
    assert error(have, result(reference)) < 1e-8
    assert error(have, result(built())) > 1e-3


def test_hooks_inside_are_called():
    model, seen = segkern.accelerate(built()), []
    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda m, i, o, name=name: seen.append(name))
    result(model)
    reference, want = built(), []
    for name, layer in reference.named_modules():
        layer.register_forward_hook(lambda m, i, o, name=name: want.append(name))
    result(reference)
    assert set(want) == set(seen)


@pytest.mark.parametrize("name", ["mask2former", "maskformer", "oneformer"])
def test_dropout_in_training_draws_as_before(name):
    torch.manual_seed(0)
    # OneFormer asks `is_training`, which wants texts, and never drops in its queries' decoder
    model = noisy(SEGMENTATION[name](dropout=0.3)).train()
    for m in model.modules():
        if hasattr(m, "layerdrop"):
            m.layerdrop = 0.0  # where it leaves a layer out transformers fails
        if hasattr(m, "is_training"):
            m.is_training = True
    model.model.is_training = False
    found = []
    for m in (model, segkern.accelerate(copy.deepcopy(model))):
        torch.manual_seed(1)
        found.append(result(m, name))
    assert error(*found) < 1e-8
    torch.manual_seed(2)
    assert error(found[0], result(model, name)) > 1e-3


def test_attention_can_be_set_afterwards():
    model = segkern.accelerate(built("segformer"))
    want = result(model, "segformer")
    model.set_attn_implementation("eager")
    out = model(**inputs("segformer"), output_attentions=True)
    assert len(out.attentions) == 4
    assert error(out.logits, want) < 1e-8


# --- copies, files, dtypes ------------------------------------------------------------------


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# transformers' hooks on Swin cannot be pickled, whether it is accelerated or not
PICKLED = ("maskformer", "segformer", "eomt")
COPIES = [(copy.deepcopy, name) for name in SEGMENTATION]
COPIES += [(copied, name) for copied in (through_pickle, through_a_file) for name in PICKLED]


@pytest.mark.parametrize(("copied", "name"), COPIES)
def test_copies_are_accelerated_and_can_be_restored(copied, name):
    model = segkern.accelerate(built(name))
    other = copied(model)
    assert classes(other) == classes(model)
    assert torch.equal(result(other, name), result(model, name))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert result(model, name).any()  # nothing is shared
    assert classes(segkern.restore(other)) == classes(built(name))


@pytest.mark.parametrize("name", SEGMENTATION)
def test_files_are_those_of_the_model_itself(name, tmp_path):
    model = built(name, torch.float32)
    model.save_pretrained(tmp_path / "before")
    segkern.accelerate(model).save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors"):
        before, after = ((tmp_path / kind / file).read_bytes() for kind in ("before", "after"))
        assert before == after, file
    again = type(built(name)).from_pretrained(tmp_path / "after").eval()
    assert not swapped(again)
    assert error(result(again, name, torch.float32), result(model, name, torch.float32)) < 1e-4
    segkern.accelerate(again).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", SEGMENTATION)
def test_bfloat16_is_as_near_as_before(name):
    exact = result(built(name), name)
    cast = built(name, torch.bfloat16)
    own = result(segkern.accelerate(copy.deepcopy(cast)), name, torch.bfloat16)
    assert own.dtype == torch.bfloat16
    assert own.isfinite().all()
    try:
        theirs = result(cast, name, torch.bfloat16)
    except RuntimeError:  # 5.17's MaskFormer cannot
        return
    if theirs.isfinite().all():  # PyTorch's grid_sample of bfloat16 is not always
        # a mask bit that falls on the other side moves a logit by a few hundredths, on either side
        assert error(own, exact) <= 2 * error(theirs, exact) + 0.05 * exact.abs().max()


# 5.17's OneFormer fails where there are labels and no texts
TRAINED = [
    n for n in SEGMENTATION if n != "oneformer" or not version("transformers").startswith("5.17")
]


@pytest.mark.parametrize("name", TRAINED)
def test_autocast_trains(name):
    model = segkern.accelerate(built(name, torch.float32)).train()
    given = inputs(name, torch.float32) | labels(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**given).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, found = segkern.accelerate(built("segformer")).train(), []
    given = inputs("segformer") | labels("segformer")
    start = copy.deepcopy(model.state_dict())
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.load_state_dict(start)
        model.zero_grad()
        model(**given).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("off", [(), RECOMPUTE], ids=["all on", "recomputation off"])
def test_a_second_backward_needs_the_switches_that_recompute_off(off):
    model = segkern.accelerate(built("mask2former"), **dict.fromkeys(off, False))
    loss = logits(model(**inputs("mask2former"))).square().sum()
    loss.backward(retain_graph=True)
    if off:
        loss.backward()
        return
    with pytest.raises(RuntimeError, match="backward an extra time"):
        loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mask2former", "segformer"])
def test_compiled_models_give_the_same(name):
    model = segkern.accelerate(built(name))
    want = result(model, name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert error(result(compiled, name), want) < 1e-8
    torch.compiler.reset()


# --- transformers' ways of calling ----------------------------------------------------------


class Samples(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        given = inputs("mask2former", torch.float32, 1) | labels(
            "mask2former", (1 + i % 3,), torch.float32
        )
        return {k: v[0] for k, v in given.items()}


def together(samples):
    out = {k: [s[k] for s in samples] for k in samples[0]}
    return out | {"pixel_values": torch.stack(out["pixel_values"])}


def test_transformers_trainer_trains_it_unmodified(tmp_path):
    model = segkern.accelerate(built(dtype=torch.float32))
    settings = transformers.TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=2,
        max_steps=5,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=5,
        report_to=[],
        remove_unused_columns=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(model, settings, together, Samples())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert swapped(model)
    saved = type(built()).from_pretrained(tmp_path / "checkpoint-5").eval()
    own = result(model.eval(), dtype=torch.float32)
    assert error(result(saved, dtype=torch.float32), own) < 1e-4


def test_transformers_pipeline_takes_it():
    model = built(dtype=torch.float32)
    processor = transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 96})
    picture = Image.new("RGB", (90, 70), (200, 30, 60))
    found = []
    for m in (model, segkern.accelerate(copy.deepcopy(model))):
        run = transformers.pipeline("image-segmentation", model=m, image_processor=processor)
        found.append(run(picture, subtask="semantic"))
    assert [s["label"] for s in found[0]] == [s["label"] for s in found[1]]
    for a, b in zip(*found):
        assert a["mask"].tobytes() == b["mask"].tobytes()
