"""The hub where it cannot be reached: an answer at once, which says how to do without it."""

import time
from dataclasses import replace

import huggingface_hub
import pytest

import segkern
from segkern.models import Mask2Former, Mask2FormerConfig, Segmenter, SegmenterConfig

WAYS = {
    "Mask2Former": lambda: Mask2Former(
        replace(Mask2FormerConfig.tiny(3), backbone="resnet10t", backbone_pretrained=True)
    ),
    "Segmenter": lambda: Segmenter(
        replace(SegmenterConfig.preset("Seg-T/16", 3), backbone_pretrained=True)
    ),
    "a name": lambda: segkern.open_model("someone/no-model"),
}


@pytest.mark.parametrize("way", WAYS)
def test_without_the_hub_it_is_said_at_once(way, tmp_path, monkeypatch):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = "the hub does not give it" if way == "a name" else "--model.no-backbone-pretrained"
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as found:
        WAYS[way]()
    assert time.monotonic() - began < 10
    assert "http://127.0.0.1:9 does not answer" in str(found.value)
    assert "HF_HUB_OFFLINE" not in str(found.value)  # which the user has not set
    assert not constants.HF_HUB_OFFLINE
