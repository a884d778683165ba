"""OneFormer with a DiNAT: Hugging Face's files both ways, and those of the original code."""

import json
import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from test_oneformer_files import as_the_original
from transformers import OneFormerForUniversalSegmentation
from transformers.models.dinat import modeling_dinat

from segkern.models import OneFormer, OneFormerConfig, open_model
from segkern.models.oneformer import original
from segkern.nn.backbones import dinat
from segkern.nn.backbones.dinat import Dinat
from segkern.structures.labels import CLASS_NAMES

SMALL = {
    "embed_dim": 24,
    "depths": [1, 2, 1, 1],
    "num_heads": [3, 3, 4, 8],
    "kernel_size": 3,
    "dilations": [[2], [1, 3], [1], [1]],
    "mlp_ratio": 2.0,
    "layer_scale": 0.1,
}


def small(**options):
    config = replace(
        OneFormerConfig.tiny(19),
        backbone="dinat_tiny",
        backbone_options=SMALL | options,
        size_divisor=32,
        tokens="clip",
        text_encoder_vocab_size=49408,
        id2label=dict(enumerate(CLASS_NAMES["cityscapes"])),
    )
    torch.manual_seed(0)
    return OneFormer(config.with_prompts()).eval()


def assert_same(opened, model):
    for name, value in opened.state_dict().items():
        if name != "criterion.seed":
            assert torch.equal(model.state_dict()[name], value), name
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        have, want = opened(x, "panoptic"), model(x, "panoptic")
    assert torch.equal(have.class_queries_logits, want.class_queries_logits)


def test_weights_that_transformers_wrote_and_reads(tmp_path, monkeypatch):
    """transformers asks for NATTEN before it makes a DiNAT, though it makes no use of it there."""
    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *_: None)
    model = small()
    model.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert written["backbone_config"]["model_type"] == "dinat"
    theirs = OneFormerForUniversalSegmentation.from_pretrained(tmp_path / "ours")
    assert theirs.config.backbone_config.dilations == SMALL["dilations"]
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(open_model(tmp_path / "theirs"), model)


@pytest.mark.filterwarnings("ignore:.*of which segkern knows no names")
def test_a_file_of_the_original_code_opens_and_says_what_it_lacks(tmp_path):
    model = small(dilations=[[1], [1, 4], [1], [1]], layer_scale=1e-5)
    state = OrderedDict(
        (name.replace("backbone.layers.", "backbone.levels."), value)
        for name, value in as_the_original(model).items()
    )
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.warns(UserWarning, match="dilations .* are taken to be a classifier's"):
        opened = open_model(tmp_path / "model.pth")
    assert_same(opened, model)


COCO = [[1, 20, 1], [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5] * 2 + [1, 5], [1, 2, 1, 2, 1]]
STREETS = [[1, 18, 1], [1, 5, 1, 9], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]]


@pytest.mark.parametrize(("kernel", "dilations"), [(11, COCO), (7, STREETS)], ids=["11", "7"])
def test_published_dilations_are_told_from_the_kernel(kernel, dilations):
    with torch.device("meta"):
        body = Dinat(**dinat.VARIANTS["dinat_large"] | {"kernel_size": kernel}).state_dict()
    weights = {f"backbone.{name}": value for name, value in body.items()}

    def count(pattern):
        return len({found[0] for key in weights if (found := re.match(pattern, key))})

    read = original.shared.read_backbone(weights, count, "x", original._DILATIONS)
    assert read["backbone"] == "dinat_large"
    assert read["backbone_options"].get("kernel_size", 7) == kernel
    assert read["backbone_options"]["dilations"] == dilations
