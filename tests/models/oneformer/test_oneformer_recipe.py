"""The recipe of OneFormer on a folder of one's own: where the tokens of its classes come from."""

from dataclasses import replace

import pytest

from segkern import recipes
from segkern.cli import main
from segkern.models import Mask2Former, Mask2FormerConfig, OneFormer, OneFormerConfig
from segkern.models.oneformer.prompts import known_words
from segkern.training.loop import train
from support.pictures import CATEGORIES, write_coco

pytestmark = pytest.mark.filterwarnings("ignore:.*(instances_|pictures)")


def folder(root, *names):
    """A COCO folder whose categories have other names; the second is that of its first label."""
    kinds = [row | {"name": name} for row, name in zip(CATEGORIES, names, strict=True)]
    for split in ("train", "val"):
        write_coco(root, categories=kinds, name=split)
    return root


def clip_model(path, names):
    """A small model that reads CLIP's words."""
    config = replace(
        OneFormerConfig.tiny(len(names)), tokens="clip", text_encoder_vocab_size=49408
    )
    OneFormer(config.with_prompts(names)).save_pretrained(path)


def test_known_words_are_read_as_clip_has_them(tmp_path):
    root = folder(tmp_path / "own", "traffic light", "dog", "sky")
    config = recipes.oneformer(root, preset="swin_tiny")
    assert (config.model.tokens, config.model.is_training) == ("clip", True)
    assert config.model.prompts[0] == tuple(known_words("a photo with a dog"))
    assert (config.batch_size, config.model.backbone_pretrained) == (16, True)
    assert str(config.output) == "runs/oneformer"


def test_a_start_from_scratch_reads_other_words_by_its_own_scheme(tmp_path):
    root = folder(tmp_path / "own", "dog", "narwhal", "sky")
    assert recipes.oneformer(root, preset="tiny").model.tokens == "words"  # as it always does
    with pytest.warns(UserWarning, match=r"tokens of 'narwhal'.*by a scheme of its own"):
        config = recipes.oneformer(root)
    assert (config.model.tokens, config.model.prompts) == ("words", ())


def test_a_start_from_a_model_wants_its_vocabulary(tmp_path):
    root = folder(tmp_path / "own", "dog", "narwhal", "sky")
    clip_model(tmp_path / "start", ["dog", "cat", "bird", "sky"])
    with pytest.raises(ValueError, match=r"tokens of 'narwhal'.*give with_prompts a tokenizer"):
        recipes.oneformer(root, init=tmp_path / "start")
    Mask2Former(Mask2FormerConfig.tiny(7)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="init must be a oneformer, got a mask2former"):
        recipes.oneformer(root, init=tmp_path / "other")


def test_a_run_starts_from_a_model_of_other_classes(tmp_path, capsys):
    root = folder(tmp_path / "own", "horse", "dog", "sky")
    clip_model(tmp_path / "start", ["dog", "cat", "bird", "sky"])
    config = recipes.oneformer(root, init=tmp_path / "start")
    assert len(config.model.prompts) == len(CATEGORIES) + 3
    short = {"steps": 1, "batch_size": 2, "evaluate_every": 0, "tensorboard": False}
    done = train(replace(config, output=tmp_path / "run", **short), progress=False)
    assert done.steps == 1
    opened = OneFormer.from_pretrained(tmp_path / "run")
    assert opened.config.prompts == config.model.prompts
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "2"]) == 0
    capsys.readouterr()
