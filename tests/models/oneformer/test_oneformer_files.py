"""OneFormer's files: names of weights, settings, tokens of sentences, the original's format."""

import json
import pickle
import re
from ast import literal_eval
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    OneFormerForUniversalSegmentation,
    ResNetConfig,
    TimmBackboneConfig,
)
from transformers import OneFormerConfig as ReferenceConfig

from segkern.models import OneFormer, OneFormerConfig, initialize, open_model
from segkern.models.oneformer import huggingface, original
from segkern.models.oneformer.huggingface_keys import from_huggingface, to_huggingface
from segkern.models.oneformer.prompts import hashed_words, known_words, token_rows
from segkern.structures.labels import CLASS_NAMES, known_stuff
from segkern.structures.targets import Targets
from segkern.weights.state_dicts import misfits
from support.detectron2_files import BACK

EXPECTED = Path(__file__).parents[2] / "expected"
SWIN = {"embed_dim": 24, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 3, 6], "window_size": 4}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
TEXT = "model.text_mapper."


def listed(file):
    rows = (line.split("\t") for line in (EXPECTED / file).read_text().splitlines())
    return {row[0]: literal_eval(row[1]) for row in rows if row[0][0] != "#"}


def small(**settings):
    """A model that every other tool opens: a Swin, and sizes that are fixed there."""
    config = replace(
        OneFormerConfig.tiny(7),
        backbone="swin_tiny",
        backbone_options=SWIN,
        size_divisor=32,
        tokens="clip",
        text_encoder_vocab_size=49408,
        id2label=dict(enumerate(CLASS_NAMES["cityscapes"][:7])),
        **settings,
    )
    torch.manual_seed(0)
    return OneFormer(config.with_prompts()).eval()


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training branch", "inference"])
def test_names_and_shapes_are_those_that_transformers_writes(training):
    config = OneFormerConfig.preset("swin_tiny", "ade20k")
    with torch.device("meta"):
        model = OneFormer(config.with_prompts() if training else config)
    have = to_huggingface(model.state_dict(), "swin")
    want = listed("oneformer_huggingface_keys.txt")
    if not training:
        want = {name: shape for name, shape in want.items() if not name.startswith(TEXT)}
    assert {name: tuple(value.shape) for name, value in have.items()} == want
    back = from_huggingface(have, "swin")
    own = {k: v for k, v in model.state_dict().items() if k != "criterion.seed"}
    assert misfits(back, own) == []


def test_names_of_transformers_4_are_read():
    with torch.device("meta"):
        model = OneFormer(OneFormerConfig.preset("swin_tiny"))
    hub = to_huggingface(model.state_dict(), "swin")
    old = {k: v for k, v in hub.items() if ".swin.layernorm." not in k}
    for name in [name for name in old if name.endswith("relative_position_bias_table")]:
        old[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.int64)
    assert from_huggingface(old, "swin").keys() == model.state_dict().keys() - {"criterion.seed"}


BODIES = {
    "resnet": lambda: ResNetConfig(depths=[1, 1, 1, 1], out_features=STAGES),
    "timm": lambda: TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3, 4]),
}


@pytest.mark.parametrize("body", BODIES)
@torch.no_grad()
def test_transformers_models_of_other_backbones_open(body, tmp_path):
    sizes = dict.fromkeys(("hidden_dim", "conv_dim", "mask_dim"), 64)
    sizes |= {"encoder_layers": 1, "decoder_layers": 3, "num_queries": 5, "num_labels": 4}
    torch.manual_seed(0)
    theirs = OneFormerForUniversalSegmentation(
        ReferenceConfig(backbone_config=BODIES[body](), **sizes)
    )
    for name, value in theirs.named_parameters():
        # at the start samples sit on the kinks of bilinear interpolation
        value += torch.randn_like(value) * (0.3 if "offsets.bias" in name else 0.02)
    theirs.eval().save_pretrained(tmp_path)
    ours, x = open_model(tmp_path).double(), torch.randn(1, 3, 64, 96).double()
    want = theirs.double()(x, ours.task_inputs("panoptic", 1))
    have = ours(x)
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert (getattr(have, name) - getattr(want, name)).abs().max() < 1e-8


# --- settings -------------------------------------------------------------------------------


def test_a_saved_model_has_its_settings_and_trains_again_without_a_tokenizer(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    again = OneFormer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.sentences, model.sentences)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.num_queries, theirs.is_training, theirs.decoder_layers) == (10, True, 4)
    assert theirs.id2label == model.config.id2label
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__.startswith("OneFormerImageProcessor")
    assert processor.num_text == 8
    model.save_pretrained(tmp_path, text_encoder=False)
    inference = OneFormer.from_pretrained(tmp_path)
    assert inference.text_encoder is None
    assert not any(name.startswith(TEXT) for name in load_file(tmp_path / "model.safetensors"))
    assert inference.config == replace(model.config, is_training=False)


def test_a_text_encoder_is_there_where_its_weights_are(tmp_path):
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["segkern"]["prompts"], config["is_training"]  # as on the hub
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = OneFormer.from_pretrained(tmp_path)
    assert model.text_encoder is not None
    assert model.sentences is None
    targets = Targets.from_lists([torch.ones(1, 64, 64)], [torch.tensor([1])])
    with pytest.raises(ValueError, match=r"config\.with_prompts\(names\) makes them"):
        model.loss(torch.randn(1, 3, 64, 64), targets._replace(task=torch.tensor([0])))


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_task_norm", False), ("pre_norm", True), ("norm", "BN"), ("enforce_input_proj", True)],
)
def test_what_is_not_here_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"hub/name: {field} must be .*, got {value}"):
        huggingface.read_config({"model_type": "oneformer", field: value}, "hub/name")


def test_another_class_count_starts_a_new_class_head_and_forgets_the_sentences(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    other = OneFormer.from_pretrained(tmp_path, num_labels=3)
    assert other.query_decoder.class_embed.weight.shape == (4, 64)
    assert (other.config.prompts, other.sentences) == ((), None)
    kept = "task_queries.task_mlp.0.weight"
    assert torch.equal(other.state_dict()[kept], model.state_dict()[kept])


# --- sentences ------------------------------------------------------------------------------


def clip_like(folder, words):
    """A tokenizer.json with CLIP's frame and a vocabulary of whole words and their ids."""
    vocabulary = words | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 49406), ("<|endoftext|>", 49407)],
    )
    tokenizer.enable_padding(length=77)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_folders_vocabulary_tells_other_words(tmp_path):
    words = {"a": 320, "an": 550, "photo": 1125, "with": 593, "dog": 1929, "narwhal": 7}
    clip_like(tmp_path, words | {"panoptic": 24755, "instance": 34572, "semantic": 1550})
    config = replace(OneFormerConfig.preset("swin_tiny"), num_labels=1, stuff=())
    with pytest.raises(ValueError, match=r"tokens of 'narwhal' in .* must come from CLIP's"):
        config.with_prompts(["narwhal"])
    found = config.with_prompts(["narwhal"], tmp_path)
    assert found.prompts[0] == (49406, 320, 1125, 593, 320, 7, 49407)
    assert (found.is_training, found.id2label) == (True, {0: "narwhal"})
    clip_like(tmp_path, dict.fromkeys(words, 5))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/tokenizer.json").write_text('{"version": ')
    for other in (tmp_path, tmp_path / "nothing", tmp_path / "torn"):
        with pytest.raises(ValueError, match="must hold"):
            config.with_prompts(["narwhal"], other)


TOKENIZERS = {
    "a list": known_words,
    "a tensor": lambda text: torch.tensor(known_words(text)),
    "a batch of one": lambda text: torch.tensor([known_words(text)]),
    "padded with zeros": lambda text: known_words(text) + [0] * 9,
    "padded with the end": lambda text: known_words(text) + [49407] * 9,
    "a dict": lambda text: {"input_ids": known_words(text), "attention_mask": []},
}


@pytest.mark.parametrize("given", TOKENIZERS)
def test_a_tokenizer_is_any_function_of_text(given):
    names = CLASS_NAMES["coco"]
    want = token_rows(names, known_words, 77, 49408)
    assert token_rows(names, TOKENIZERS[given], 77, 49408) == want
    assert want[0] == (49406, 320, 1125, 593, 320, 2533, 49407)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda text: [3, 9, 5], "must end a text with its largest id"),
        (lambda text: [], "must give ids"),
        (lambda text: [1, 50000], r"must give ids in \[0, 49408\)"),
        (str.split, "must give ids"),
    ],
    ids=["no end", "empty", "too large", "words"],
)
def test_what_is_no_tokenizer_is_refused(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        token_rows(["dog"], tokenizer, 77, 49408)


def test_a_long_name_loses_words_and_keeps_its_end():
    (row, *_) = token_rows(["person " * 90], known_words, 77, 49408)
    assert len(row) == 77
    assert row[-1] == max(row) == 49407


def test_words_of_ones_own_scheme_have_one_number_whatever_the_others():
    tokens = hashed_words(1024)
    assert tokens("a photo with a 7")[1:-1] == [*tokens("a photo with a")[1:-1], tokens("7")[1]]
    assert max(tokens("zebra crossing")) == tokens("zebra crossing")[-1] == 1023
    model = OneFormer(OneFormerConfig.tiny(11))
    assert model.sentences.shape == (14, 8)  # "10" is two words
    assert len({tuple(row) for row in model.sentences.tolist()}) == 14


def test_tables_of_classes_are_those_that_checkpoints_name():
    assert [len(names) for names in CLASS_NAMES.values()] == [133, 150, 19]
    assert len(set(CLASS_NAMES["coco"])) == 133
    for names, things in zip(CLASS_NAMES.values(), (80, 100, 8)):
        assert len(names) - len(known_stuff(dict(enumerate(names)))) == things


# --- the original's -------------------------------------------------------------------------

OWN = [  # from our names to the original's, beside those of Mask2Former's parts
    (r"task_queries\.task_mlp\.", "task_mlp.layers."),
    (r"task_queries\.input_proj\.", "sem_seg_head.predictor.class_input_proj."),
    (r"task_queries\.layers\.(\d+)\.self_norm\.", r"START.layers.\1.norm1."),
    (r"task_queries\.layers\.(\d+)\.cross_norm\.", r"START.layers.\1.norm2."),
    (r"task_queries\.layers\.(\d+)\.norm\.", r"START.layers.\1.norm3."),
    (r"task_queries\.layers\.(\d+)\.cross_attn\.", r"START.layers.\1.multihead_attn."),
    (r"task_queries\.", "START."),
    (r"text_encoder\.token_embed\.", "text_encoder.token_embedding."),
    (r"text_encoder\.position_embed", "text_encoder.positional_embedding"),
    (r"text_encoder\.norm\.", "text_encoder.ln_final."),
    (r"text_encoder\.projector\.", "text_projector.layers."),
    (r"text_encoder\.learned\.", "prompt_ctx."),
    (r"text_encoder\.layers\.(\d+)\.qkv\.", r"BLOCK.\1.attn.in_proj_"),
    (r"text_encoder\.layers\.(\d+)\.proj\.", r"BLOCK.\1.attn.out_proj."),
    (r"text_encoder\.layers\.(\d+)\.norm(\d)\.", r"BLOCK.\1.ln_\2."),
    (r"text_encoder\.layers\.(\d+)\.fc1\.", r"BLOCK.\1.mlp.c_fc."),
    (r"text_encoder\.layers\.(\d+)\.fc2\.", r"BLOCK.\1.mlp.c_proj."),
    (r"contrastive\.", "criterion."),
]
LONG = {
    "START": "sem_seg_head.predictor.class_transformer.decoder",
    "BLOCK": "text_encoder.transformer.resblocks",
}


def as_the_original(model):
    """The state dict of a model under the original's names."""
    state = {}
    for name, value in model.state_dict().items():
        if name == "criterion.seed":
            continue
        for pattern, replacement in (*OWN, *BACK):
            name, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        for short, long in LONG.items():
            name = name.replace(short, long)
        if found := re.fullmatch(r"(sem_seg.*_attn\.)([qkv])_proj\.(weight|bias)", name):
            state.setdefault(f"{found[1]}in_proj_{found[3]}", {})[found[2]] = value
        else:
            state[name] = value.reshape(()) if name == "criterion.logit_scale" else value
    return {
        name: torch.cat([value[part] for part in "qkv"]) if isinstance(value, dict) else value
        for name, value in state.items()
    }


def test_every_name_of_a_published_checkpoint_has_its_place():
    rows = listed("oneformer_original_keys.txt")
    state = {name: torch.empty(shape, device="meta") for name, shape in rows.items()}
    weights = original.from_original(state)
    config = OneFormerConfig(**original.read_sizes(weights, "model.pth"))
    preset = OneFormerConfig.preset("swin_tiny", "ade20k")
    assert config == replace(preset, is_training=True)
    with torch.device("meta"):
        model = OneFormer(config)
    own = model.state_dict()
    own.pop("criterion.seed")
    assert misfits(weights, own) == []
    computed = {name for name in rows if name.endswith("relative_position_index")}
    assert as_the_original(model).keys() == rows.keys() - computed


@pytest.mark.filterwarnings("ignore:.*has 7 classes, of which segkern knows no names")
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@torch.no_grad()
def test_a_file_under_the_originals_names_opens_to_the_same_model(suffix, tmp_path):
    model = small(num_attention_heads=8)  # as the original has them
    state, path = as_the_original(model), tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"model": state, "iteration": 9, "__author__": "someone"}, path)
    else:
        arrays = {name: value.numpy() for name, value in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "matching_heuristics": True}))
    opened = open_model(path)
    for name, value in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    x = torch.randn(1, 3, 64, 64)
    for task in model.config.tasks:
        have, want = opened(x, task), model(x, task)
        assert torch.equal(have.class_queries_logits, want.class_queries_logits)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {"weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="no checkpoint of OneFormer's original code"):
        OneFormer.from_pretrained(path)
    with pytest.raises(ValueError, match=r"(?i)segformer.*oneformer"):
        open_model(path)


# --- a start from another -------------------------------------------------------------------


def test_training_starts_from_a_model_without_text_encoder(tmp_path):
    model = small()
    model.save_pretrained(tmp_path, text_encoder=False)
    new = small()
    with torch.no_grad():
        for p in new.parameters():
            p.fill_(0.5)
    text = initialize(new, tmp_path)
    states = model.state_dict(), new.state_dict()
    assert torch.equal(*(s["task_queries.norm.weight"] for s in states))
    assert (new.text_encoder.token_embed.weight == 0.5).all()
    assert "are those of" in text
