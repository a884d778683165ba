"""Checkpoints of our own that are not what they should be; tests/models/test_opening.py has those
that are."""

import json
from functools import partial

import pytest
from test_opening import convolutions, equal, sequence

import segkern

BUILDS = {
    "Seq2Seg": partial(sequence, head="instance", mask="attention"),
    "UNet": partial(convolutions, bert_layers=1),
}


def spoil(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FAULTS = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be read"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "broken weights": (lambda f: (f / "model.safetensors").write_bytes(b"x"), "cannot be read"),
    "another kind": (lambda f: spoil(f, model_type="other"), "config.json is not of a "),
    "unknown settings": (lambda f: spoil(f, colour=1), "has unknown settings: colour"),
    "another depth": (
        lambda f: spoil(f, num_hidden_layers=2, depth=3, image_size=[64, 64]),
        "has unknown settings: (depth|num_hidden_layers)",
    ),
    "a setting out of range": (lambda f: spoil(f, dropout=2), r"dropout must be in \[0, 1\)"),
    "other weights": (lambda f: spoil(f, task_head="panoptic"), "task_head must be"),
}


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("case", FAULTS)
def test_what_is_wrong_is_named(kind, case, tmp_path):
    model, (fault, message) = BUILDS[kind](), FAULTS[case]
    model.save_pretrained(tmp_path)
    fault(tmp_path)
    with pytest.raises(ValueError, match=rf"{kind}.*{message}|{kind}Config: {message}"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", BUILDS)
def test_weights_of_another_shape_are_named(kind, tmp_path):
    model = BUILDS[kind]()
    model.save_pretrained(tmp_path)
    spoil(tmp_path, image_size=[64, 32])
    with pytest.raises(ValueError, match=r"does not fit the model; of another shape: .*pos_embed"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", BUILDS)
def test_settings_come_back_as_they_were(kind, tmp_path):
    names = {0: "a", 1: "b", 2: "c"}
    model = BUILDS[kind](id2label=names, stuff=(1,), image_mean=(0.1,) * 4, image_std=(0.2,) * 4)
    model.eval().save_pretrained(tmp_path)
    again = segkern.open_model(tmp_path)
    assert again.config == model.config
    assert equal(again, model) == []
    assert not again.training
    fresh = type(model).from_pretrained(tmp_path, num_labels=5)
    assert (fresh.config.id2label, fresh.config.stuff) == (None, ())
