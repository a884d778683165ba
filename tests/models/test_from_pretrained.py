"""The keywords of `from_pretrained`, and what a model says of itself, as transformers has them."""

import json
import warnings
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_opening import equal, models, pixels, queries

import segkern
from segkern.models import Mask2Former, SegFormer
from segkern.models.build import new_labels

NAMES = {0: "cat", 1: "dog", 2: "sky"}


@contextmanager
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def saved(build, folder):
    model = build().eval()
    model.config.id2label = dict(NAMES)
    model.save_pretrained(folder)
    return model


KEPT = {
    "nothing": {},
    "their number": {"num_labels": 3},
    "their names": {"id2label": NAMES},
    "their names as JSON has them": {"id2label": {str(k): name for k, name in NAMES.items()}},
    "their names the other way round": {"label2id": {name: k for k, name in NAMES.items()}},
}


@models
@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
def test_the_class_head_stays_for_the_same_labels(build, options, tmp_path):
    model = saved(build, tmp_path)
    with silent():
        again = type(model).from_pretrained(tmp_path, **options)
    assert equal(again, model) == []
    assert again.config.labels == model.config.labels


NEW = {
    "other names": ({"id2label": NAMES | {1: "fox"}}, "label 1 is 'dog' there, 'fox' here"),
    "others, the other way round": (
        {"label2id": {"sky": 0, "cat": 1, "dog": 2}},
        "label 0 is 'cat' there, 'sky' here, and 2 more names differ",
    ),
    "another number": ({"num_labels": 5}, "3 labels there, 5 here"),
    "fewer names": ({"id2label": {0: "cat"}}, "3 labels there, 1 here"),
}


@models
@pytest.mark.parametrize(("options", "message"), NEW.values(), ids=NEW)
def test_the_class_head_starts_anew_for_other_labels_and_it_is_said(
    build, options, message, tmp_path
):
    model = saved(build, tmp_path)
    with pytest.warns(UserWarning, match=f"class head of {tmp_path} starts anew: {message}"):
        again = type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True, **options)
    labels = new_labels(**options)
    assert (again.config.num_labels, again.config.id2label) == labels
    there = model.state_dict()
    for name, value in again.state_dict().items():
        if name not in model.class_head:
            assert torch.equal(value, there[name]), name
    drawn = [n for n in model.class_head if n.endswith(("weight", "cls_emb")) and n in there]
    drawn = [n for n in drawn if "empty" not in n and "norm" not in n]
    assert drawn
    for name in drawn:
        value = again.state_dict()[name]
        assert value.shape != there[name].shape or not torch.equal(value, there[name]), name


def test_names_of_a_checkpoint_without_any_do_not_start_a_head(tmp_path):
    model = queries().eval()
    model.save_pretrained(tmp_path)  # as LABEL_0, LABEL_1, ...
    with silent():
        again = Mask2Former.from_pretrained(tmp_path, id2label=NAMES)
    assert equal(again, model) == []
    assert again.config.id2label == NAMES


CONTRADICTIONS = {
    "both ways": ({"id2label": NAMES, "label2id": {"x": 0}}, "the other way round"),
    "their number": ({"id2label": NAMES, "num_labels": 4}, r"that of id2label \(3\), got 4"),
    "gaps": ({"id2label": {0: "a", 2: "b"}}, r"must name labels 0, 1, 2, ..., got \[0, 2\]"),
    "dtypes": ({"dtype": "float64", "torch_dtype": "float16"}, "torch_dtype must be left out"),
    "no dtype": ({"dtype": "int64"}, "a floating dtype, its name or 'auto', got 'int64'"),
    "nonsense": ({"torch_dtype": "half of it"}, "a floating dtype, its name or 'auto'"),
}


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(options, message, tmp_path):
    saved(queries, tmp_path)
    with pytest.raises(ValueError, match=message):
        Mask2Former.from_pretrained(tmp_path, **options)


def test_weights_of_another_shape_start_anew_if_asked_for(tmp_path):
    model = saved(queries, tmp_path)
    name = "query_decoder.query_feat.weight"
    file, key = tmp_path / "model.safetensors", "model.transformer_module.queries_features.weight"
    save_file(load_file(file) | {key: torch.zeros(9, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"\[9, 32\] instead of .*ignore_mismatched_sizes=True"):
        Mask2Former.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"of another shape in {tmp_path}, start anew: {name}"):
        again = segkern.open_model(tmp_path, ignore_mismatched_sizes=True)
    assert equal(again, model) == [name]


DTYPES = {
    "float32 by default": ({}, torch.float32),
    "as it is": ({"dtype": "auto"}, torch.bfloat16),
    "by name": ({"dtype": "float16"}, torch.float16),
    "by transformers' older name": ({"torch_dtype": torch.float64}, torch.float64),
}


@models
@pytest.mark.parametrize(("options", "dtype"), DTYPES.values(), ids=DTYPES)
def test_weights_of_a_dtype(build, options, dtype, tmp_path):
    model = build().bfloat16()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, **options)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert again.dtype == dtype
    if not options.keys() & {"torch_dtype"}:
        assert segkern.open_model(tmp_path, **options).dtype == dtype


def test_the_hub_gets_the_keywords(tmp_path, monkeypatch):
    model, asked = saved(queries, tmp_path / "inner"), []

    def snapshot_download(name, **place):
        asked.append(place)
        return str(tmp_path)

    monkeypatch.setattr("segkern.weights.folders.snapshot_download", snapshot_download)
    place = {"revision": "v1", "cache_dir": "/cache", "token": "secret", "local_files_only": True}
    for way in (Mask2Former.from_pretrained, segkern.open_model):
        again = way("someone/model", subfolder="inner", **place)
        assert equal(again, model) == []
        files = asked.pop().pop("allow_patterns")
        assert all(file.startswith("inner/") for file in files)
    assert asked == []


def test_what_is_only_here_is_not_looked_for(tmp_path):
    with pytest.raises(ValueError, match="is no folder here, and the hub does not give it"):
        segkern.open_model("someone/model", cache_dir=tmp_path, local_files_only=True)


def test_a_subfolder(tmp_path):
    model = saved(pixels, tmp_path / "a/b")
    assert equal(segkern.open_model(tmp_path, subfolder="a/b"), model) == []
    assert equal(type(model).from_pretrained(tmp_path / "a", subfolder="b"), model) == []
    with pytest.raises(ValueError, match=r"no such folder: .*/c"):
        segkern.open_model(tmp_path, subfolder="c")


WRAPPED = {
    "DistributedDataParallel": "module.{}",
    "torch.compile": "_orig_mod.{}",
    "both": "module._orig_mod.{}",
    "twice": "module.module.{}",
}


@models
@pytest.mark.parametrize("prefix", WRAPPED.values(), ids=WRAPPED)
def test_weights_of_a_wrapped_model(build, prefix, tmp_path):
    model = saved(build, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({prefix.format(k): v for k, v in load_file(file).items()}, file)
    with silent():
        assert equal(type(model).from_pretrained(tmp_path), model) == []


def test_weights_of_a_compiled_part(tmp_path):
    model = saved(queries, tmp_path)
    file, part = tmp_path / "model.safetensors", "model.transformer_module."
    state = {k.replace(part, f"{part}_orig_mod."): v for k, v in load_file(file).items()}
    save_file(state, file)
    assert equal(Mask2Former.from_pretrained(tmp_path), model) == []


@models
def test_a_model_says_where_and_what_it_is(build):
    model = build()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert (model.to("meta").device.type, model.half().dtype) == ("meta", torch.float16)
    count = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == count
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    first = next(model.parameters()).requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == trained - first.numel()
    assert model.main_input_name == "pixel_values"


@models
def test_settings_are_plain_values(build):
    config = build().config
    settings = config.to_dict()
    assert settings.pop("model_type") == config.kind
    assert type(config)(**settings) == config
    assert json.loads(config.to_json_string())["num_labels"] == 3


def test_the_same_keywords_as_transformers(tmp_path):
    """What transformers does with them, on a folder that it wrote."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    sizes = {"hidden_sizes": [4, 8, 10, 16], "depths": [1] * 4, "decoder_hidden_size": 8}
    SegformerForSemanticSegmentation(SegformerConfig(**sizes, num_labels=3)).save_pretrained(
        tmp_path / "inner"
    )
    given = {"num_labels": 5, "ignore_mismatched_sizes": True, "subfolder": "inner"}
    given |= {"dtype": torch.float64, "local_files_only": True}
    theirs = SegformerForSemanticSegmentation.from_pretrained(tmp_path, **given).eval()
    with pytest.warns(UserWarning, match="starts anew: 3 labels there, 5 here"):
        ours = SegFormer.from_pretrained(tmp_path, **given)
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
    assert ours.num_parameters() == theirs.num_parameters()
    classifier = theirs.decode_head.classifier
    with torch.no_grad():
        ours.head.classifier.weight.copy_(classifier.weight.flatten(1))
        ours.head.classifier.bias.copy_(classifier.bias)
        x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
        torch.testing.assert_close(ours(x).logits, theirs(x).logits, rtol=0, atol=1e-10)
