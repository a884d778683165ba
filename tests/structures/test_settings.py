"""Labels and settings: facts that agree with one another, defaults, and what is refused."""

import re
from pathlib import Path

import pytest

from segkern.structures.labels import CITYSCAPES, DATASETS, PASCAL_CONTEXT, known_stuff
from segkern.structures.settings import InputConfig, Options, Views, one_of

ROOT = Path(__file__).parents[2]
PLAIN = InputConfig((0.5,) * 3, (0.5,) * 3, 480, None, divisor=32)
WINDOWED = InputConfig((0.5,) * 3, (0.5,) * 3, 512, 2048, 16, window=512, stride=384)


def test_facts_of_data_sets_agree():
    assert len(CITYSCAPES) == DATASETS["cityscapes"].labels["semantic"]
    assert len(PASCAL_CONTEXT) == DATASETS["pascal_context"].labels["semantic"]
    assert known_stuff(dict(enumerate(CITYSCAPES))) == DATASETS["cityscapes"].stuff
    assert known_stuff({0: "road"}) == ()
    coco = DATASETS["coco"].labels
    assert len(DATASETS["coco"].stuff) == coco["panoptic"] - coco["instance"]


@pytest.mark.parametrize("fact", ["vegetation", "tvmonitor", r"20_?210", r"2_?975", r"0\.485"])
def test_a_fact_stands_in_one_file(fact):
    files = (ROOT / "segkern").rglob("*.py")
    # a dictionary of words does not say whose classes they name
    files = (path for path in files if path.name != "clip_words.py")
    found = [path.name for path in files if re.search(fact, path.read_text())]
    assert found == ["labels.py"]


def test_options_that_are_not_given_are_those_of_others():
    own, others = Options(threshold=0.9), Options(0.5, 0.6, 150)
    assert own.over(others) == Options(0.9, 0.6, 150)
    assert own.over(None) is own
    assert Options(resize="scores").over(others) == Options(0.5, 0.6, 150, "scores")


def test_edges_at_a_scale_and_padding():
    assert WINDOWED.at(0.75).shortest_edge == 384
    assert WINDOWED.at(0.75).longest_edge == 1536
    assert WINDOWED.at(1.0) is WINDOWED
    assert PLAIN.at(2).longest_edge is None
    assert PLAIN.padded((33, 64)) == (64, 64)


def test_views_take_the_models_window_and_stride():
    assert Views().of(WINDOWED) == (512, 384)
    assert Views(window=256).of(WINDOWED) == (256, 256)
    assert Views(stride=100).of(WINDOWED) == (512, 100)
    assert Views().of(PLAIN) == (None, None)
    assert Views(window=64).of(PLAIN) == (64, 64)
    with pytest.raises(ValueError, match="stride needs a window"):
        Views(stride=8).of(PLAIN)
    with pytest.raises(ValueError, match=r"stride must be <= window \(512\), got 513"):
        Views(stride=513).of(WINDOWED)
    with pytest.raises(ValueError, match="scales must be positive"):
        Views(scales=())
    with pytest.raises(TypeError, match="window must be an integer"):
        Views(window=2.5)


def test_an_object_or_its_settings():
    assert one_of("f", None, Options(top_k=3)) == Options(top_k=3)
    assert one_of("f", Options(top_k=3), Options()) == Options(top_k=3)
    with pytest.raises(ValueError, match="f: give Views or its settings, not both"):
        one_of("f", Views(), Views(flip=True))
