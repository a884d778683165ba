"""preprocessor_config.json as transformers writes it: the pixels that go into a model are those of
transformers' own processor, for every field, and a file of ours gives transformers the same."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Mask2FormerImageProcessor
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width

import segkern
from segkern.inference.predict_files import predict_files
from segkern.io.images import cut_size, fitted_size
from segkern.models import (
    EoMTConfig,
    Mask2Former,
    Mask2FormerConfig,
    MaskFormerConfig,
    SegFormerConfig,
    open_model,
)
from segkern.models.eomt import huggingface as eomt
from segkern.models.preprocessor import find_preprocessor, read_preprocessor, write_preprocessor
from segkern.models.segformer import huggingface as segformer
from segkern.structures.processing import Processing
from segkern.weights.hf_folders import SIZES_TOLD
from support.models import Squares
from support.processors import CASES, FIXED, KINDS, SIDE, SIZES, picture, theirs


def config_of(kind, folder):
    """The config of a model with the processor's file in that folder."""
    found, names = find_preprocessor(folder), {"num_labels": 2}
    if kind == "eomt":
        read = eomt.read_pictures(found, {"image_size": SIDE}, "x", False)
        return EoMTConfig(image_size=SIDE, **names | read)
    if kind == "segformer":
        return SegFormerConfig(**names | segformer.read_pictures(found, {}, "x", False))
    config = MaskFormerConfig if kind == "maskformer" else Mask2FormerConfig
    return config(**names | read_preprocessor(found, KINDS[kind].__name__, "x"))


def written(kind, config):
    """The file that a model of that config has."""
    settings = vars(config)
    if kind == "eomt":
        return eomt.write_pictures(settings)
    if kind == "segformer":
        return segformer.write_pictures(settings)
    return write_preprocessor(settings, KINDS[kind].__name__)


def taken(config, image, size=None):
    """What goes into a model of that config for an image."""
    model = Squares().eval()
    model.config.input = config.input
    if config.input.window is not None:
        model.config.tasks = ("semantic",)
    segkern.segment(model, image, "semantic", size=size)
    return torch.cat(model.seen)


@pytest.mark.parametrize("size", SIZES, ids=lambda v: "x".join(map(str, v)))
@pytest.mark.parametrize(("flag", "kind"), CASES, ids=lambda v: v.replace(" ", "_"))
def test_pixels_are_those_of_the_processor(flag, kind, size, tmp_path):
    processor, image = theirs(kind, flag), picture(*size)
    processor.save_pretrained(tmp_path)
    want = processor(image, return_tensors="pt")["pixel_values"].float()
    config = config_of(kind, tmp_path)
    have = taken(config, image)
    assert have.shape == want.shape
    # scale and mean in another order: a few roundings of the largest value
    bound = 4 * torch.finfo(torch.float32).eps * want.abs().max().item()
    torch.testing.assert_close(have, want, rtol=0, atol=bound)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written(kind, config)))
    assert config_of(kind, tmp_path) == config
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is KINDS[kind]
    assert torch.equal(again(image, return_tensors="pt")["pixel_values"].float(), want)
    for name in ("do_reduce_labels", "ignore_index"):
        assert getattr(again, name, None) == getattr(processor, name, None)


@pytest.mark.parametrize("longest", [None, 1333, 801])
def test_sides_are_those_of_the_processors(longest):
    g = np.random.default_rng(0)
    for h, w, shortest in g.integers(1, 3000, (3000, 3)).tolist():
        shortest = shortest % 800 + 50
        most = longest and max(longest, shortest)
        want = get_size_with_aspect_ratio((h, w), shortest, most)
        if min(want) > 0:  # theirs may be 0 of a line
            assert cut_size((h, w), shortest, most) == want
        fitted = get_image_size_for_max_height_width((h, w), shortest, most or 900)
        if min(fitted) > 0:
            assert fitted_size((h, w), (shortest, most or 900)) == fitted


def test_a_batch_is_padded_as_each_of_its_images_alone(tmp_path):
    """Where transformers pads an image to the largest of its batch, results here do not depend on
    the others; the pixels of the image are the same."""
    processor = theirs("mask2former", "edges")
    processor.save_pretrained(tmp_path)
    images = [picture(61, 93), picture(97, 50)]
    want = processor(images, return_tensors="pt")["pixel_values"]
    for image, pixels in zip(images, want):
        have = taken(config_of("mask2former", tmp_path), image)[0]
        torch.testing.assert_close(have, pixels[:, : have.shape[1], : have.shape[2]])
        assert pixels[:, have.shape[1] :].count_nonzero() == 0


OLD = {  # files of before transformers 4.27, and what they say now
    "numbers": (
        {"size": 800, "max_size": 1333, "size_divisibility": 32, "reduce_labels": True},
        {"size": {"shortest_edge": 800, "longest_edge": 1333}, "do_reduce_labels": True},
    ),
    "extractor": ({"feature_extractor_type": "MaskFormerFeatureExtractor"}, {}),
    "fast": ({"image_processor_type": "Mask2FormerImageProcessorFast"}, {}),
    "pil": ({"image_processor_type": "Mask2FormerImageProcessorPil"}, {}),
    "pair": ({"size": [40, 50]}, {"size": {"height": 40, "width": 50}}),
    "nothing": ({"size": None, "image_mean": None, "pad_size": None}, {}),
    "what does not matter": (
        {"do_center_crop": True, "do_convert_rgb": True, "num_text": 134, "_max_size": 1333}
        | {"image_processor_type": "OneFormerImageProcessor", "size_divisor": 32},
        {"image_processor_type": "OneFormerImageProcessor"},
    ),
}


@pytest.mark.parametrize("case", OLD)
def test_other_spellings(case):
    old, new = (read_preprocessor(x, "Mask2FormerImageProcessor", "x") for x in OLD[case])
    assert old == new


REFUSED = {
    "longest edge": (
        {"size": {"longest_edge": 600}},
        r"x: size .* must have .*'longest_edge': 600",
    ),
    "pixels": ({"size": {"min_pixels": 9, "max_pixels": 99}}, "size .* must have"),
    "zero": ({"size": {"height": 0, "width": 5}}, "size .* positive integers, got"),
    "text": ({"size": "large"}, "size .* must have"),
    "resample": ({"resample": 4}, r"resample must be one of 0 \(nearest-exact\), .* got 4"),
    "factor": ({"rescale_factor": 0}, "rescale_factor must be a number above 0, got 0"),
    "flag": ({"do_resize": "yes"}, "do_resize must be true or false, got 'yes'"),
    "pad": (
        {"pad_size": {"height": 5}},
        "preprocessor_config.json: pad_size must be an int.* got None",
    ),
    "crop": (
        {"image_processor_type": "BeitImageProcessor", "do_center_crop": True},
        "do_center_crop .* must be false",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    found, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        read_preprocessor(found, "Mask2FormerImageProcessor", "x")


def test_another_processor_is_named():
    found = {"image_processor_type": "BeitImageProcessor", "size": {"height": 64, "width": 64}}
    with pytest.warns(UserWarning, match="BeitImageProcessor is not known here"):
        read = read_preprocessor(found, "SegformerImageProcessor", "x")
    assert read["processing"].size == (64, 64)


def test_the_part_of_a_processors_file(tmp_path):
    """OneFormer's whole processor, of images and of text, writes one file."""
    part = theirs("oneformer", "edges").to_dict()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": part}))
    assert config_of("oneformer", tmp_path).shortest_edge == 48
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(part | {"size": FIXED}))
    assert config_of("oneformer", tmp_path).shortest_edge == 48  # as transformers prefers it
    (tmp_path / "processor_config.json").write_text("{}")
    assert config_of("oneformer", tmp_path).input.size == (37, 96)


def test_a_file_beside_a_model_of_ours(tmp_path):
    """A file of transformers is obeyed, one that an older version of ours wrote has its sizes."""
    segkern.models.build_model(Mask2FormerConfig.tiny(2)).save_pretrained(tmp_path)
    assert segkern.open_model(tmp_path).config.input.multiple is None
    theirs("mask2former", "edges").save_pretrained(tmp_path)
    assert segkern.open_model(tmp_path).config.input.multiple == 32
    assert segkern.Processor.from_pretrained(tmp_path)._input().multiple == 32
    config = json.loads((tmp_path / "config.json").read_text())
    del config["segkern"][SIZES_TOLD]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert segkern.open_model(tmp_path).config.input.multiple is None
    assert segkern.Processor.from_pretrained(tmp_path)._input().multiple is None


def test_a_model_that_takes_pictures_as_they_are_is_saved_so(tmp_path):
    config = Mask2FormerConfig.tiny(3)
    config.shortest_edge = config.longest_edge = None
    Mask2Former(config).save_pretrained(tmp_path)
    assert open_model(tmp_path).config.input == config.input
    assert not AutoImageProcessor.from_pretrained(tmp_path).do_resize


def test_a_fixed_size_and_edges_are_no_size():
    config = Mask2FormerConfig.tiny(2)
    config.processing = Processing(size=(32, 32))
    with pytest.raises(ValueError, match="shortest_edge must be None where processing"):
        _ = config.input


# size=


WANTED = {
    "short": (32, (1, 3, 32, 48)),
    "pair": ((40, 56), (1, 3, 40, 56)),
    "edges": ({"shortest_edge": 32, "longest_edge": 40}, (1, 3, 27, 40)),
    "none": (None, (1, 3, 60, 90)),
}


@pytest.mark.parametrize("case", WANTED)
def test_segment_at_another_size(case):
    size, shape = WANTED[case]
    config = Mask2FormerConfig.tiny(2)
    config.shortest_edge, config.longest_edge, config.size_divisor = 60, 90, 1
    model = Squares().eval()
    model.config.input = config.input
    found = segkern.segment(model, picture(100, 150), size=size)
    assert model.seen[0].shape == shape
    assert found.segmentation.shape == (100, 150)


def test_another_size_than_the_files(tmp_path):
    """COCO's own, from a checkpoint that squashes; sides go up to multiples, as its file says."""
    theirs("mask2former", "square").save_pretrained(tmp_path)
    config, image = config_of("mask2former", tmp_path), picture(75, 100)
    size = {"shortest_edge": 80, "longest_edge": 133}
    want = Mask2FormerImageProcessor(size=size)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(taken(config, image, size), want, rtol=0, atol=2e-6)


def test_windows_need_their_side(tmp_path):
    theirs("eomt", "windows").save_pretrained(tmp_path)
    config, image = config_of("eomt", tmp_path), picture(61, 93)
    assert taken(config, image, 80).shape == (4, 3, SIDE, SIDE)  # 80 x 121, two by two
    with pytest.raises(ValueError, match="segment: size must give no side below the window's, 64"):
        taken(config, image, 40)


def test_evaluate_and_predict_at_another_size(tmp_path):
    image, model = picture(40, 60), Squares().eval()
    sample = {"image": image, "semantic": np.zeros((40, 60), np.int64)}
    data = type("Data", (list,), {"classes": ["ground", "square"], "stuff": (0,)})([sample])
    segkern.evaluate(model, data, ("semantic",), size=32, progress=False)
    del sample["image"]
    with pytest.raises(ValueError, match="size must be None for samples without image, got 32"):
        segkern.evaluate(model, data, ("semantic",), size=32, progress=False)
    Image.fromarray(image).save(tmp_path / "a.png")
    predict_files(model, [tmp_path / "a.png"], tmp_path / "out", size=(48, 64))
    assert [x.shape[2:] for x in model.seen] == [(32, 48), (48, 64)]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("large", "segment: size must be an integer"),
        ((1, 2, 3), "segment: size must be .height, width."),
        ({"longest": 5}, "segment: size must be a number"),
        (0, "segment: size must be"),
    ],
)
def test_sizes_that_are_none(size, message):
    with pytest.raises((TypeError, ValueError), match=message):
        segkern.segment(Squares().eval(), picture(9, 9), size=size)
