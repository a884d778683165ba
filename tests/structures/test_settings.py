"""Labels and settings: facts that agree with one another, defaults, and what is refused."""

import re
from pathlib import Path

import pytest

from segkern.structures.labels import CITYSCAPES, DATASETS, PASCAL_CONTEXT, known_stuff
from segkern.structures.processing import Processing
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


SIZED = {  # settings, an image's size, resized, padded
    "edges": ({"shortest_edge": 48, "longest_edge": 80}, (61, 93), (48, 73), (64, 96)),
    "cut": (
        {"shortest_edge": 48, "longest_edge": 80, "multiple": 1},
        (61, 93),
        (48, 73),
        (48, 73),
    ),
    "multiple": (
        {"shortest_edge": 48, "longest_edge": 80, "multiple": 32},
        (61, 93),
        (64, 96),
        (64, 96),
    ),
    "size": ({"size": (40, 50)}, (61, 93), (40, 50), (64, 64)),
    "within": ({"within": (70, 90), "multiple": 1}, (61, 93), (59, 90), (59, 90)),
    "its own": ({"multiple": 32}, (61, 93), (61, 93), (61, 93)),
    "its own, padded": ({}, (61, 93), (61, 93), (64, 96)),
    "pad size": ({"size": (40, 50), "pad_size": (100, 90)}, (61, 93), (40, 50), (100, 90)),
}


@pytest.mark.parametrize("case", SIZED)
def test_sizes(case):
    settings, size, resized, padded = SIZED[case]
    config = InputConfig((0.5,) * 3, (0.5,) * 3, divisor=32, **settings)
    assert config.resized(size) == resized
    assert config.padded(config.resized(size)) == padded


def test_sizes_at_a_scale():
    config = InputConfig((0.5,), (0.5,), size=(40, 50), within=(7, 8), pad_size=(64, 64))
    assert (config.at(0.5).size, config.at(0.5).within) == ((20, 25), (4, 4))
    with pytest.raises(
        ValueError, match=r"pad_size must be at least .*\(80, 100\), got \(64, 64\)"
    ):
        config.at(2).padded(config.at(2).resized((9, 9)))


@pytest.mark.parametrize(
    ("fields", "mean", "std"),
    [
        ({}, 0.5, 0.25),
        ({"rescale_factor": 1 / 127.5}, 0.25, 0.125),
        ({"do_rescale": False}, 0.5 / 255, 0.25 / 255),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_normalize": False, "do_rescale": False}, 0.0, 1 / 255),
    ],
)
def test_scale_and_normalisation_are_one(fields, mean, std):
    plain = InputConfig((0.5,) * 3, (0.25,) * 3, 800, 1333)
    found = Processing(**fields).input(plain)
    assert found.mean == pytest.approx((mean,) * 3)
    assert found.std == pytest.approx((std,) * 3)
    assert Processing().input(plain) == plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": (0, 5)}, "size must be .*, got 0"),
        ({"max_size": 5}, "max_size must be height and width, got 5"),
        ({"pad_size": (5, 6, 7)}, "pad_size must be height and width"),
        ({"ignore_index": 2.5}, "ignore_index must be an int"),
        ({"multiple": 0}, "multiple must be"),
        ({"do_rescale": 1}, "do_rescale must be true or false, got 1"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a number above 0"),
    ],
)
def test_processing_that_is_none(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Processing(**fields)
