"""`Processor` against transformers' image processors: pixels, masks and labels for every field."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

import segkern
from segkern import Processor
from segkern.models import Mask2FormerConfig
from support.models import Squares
from support.processors import CASES, KINDS, SIDE, picture, theirs

SIZES = (61, 93), (97, 50)
IMAGES = [picture(*size) for size in SIZES]
MAPS = [np.random.default_rng(w).integers(0, 4, (h, w)) for h, w in SIZES]


def equal_pixels(have, want):
    """Scale and mean in another order: a few roundings of the largest value."""
    assert have.dtype == want.dtype
    bound = 4 * torch.finfo(torch.float32).eps * want.abs().max().item()
    torch.testing.assert_close(have, want, rtol=0, atol=bound)


@pytest.mark.parametrize(("flag", "kind"), CASES, ids=lambda v: v.replace(" ", "_"))
def test_every_field(flag, kind, tmp_path):
    reference = theirs(kind, flag)
    reference.save_pretrained(tmp_path / "theirs")
    processor = Processor.from_pretrained(tmp_path / "theirs")
    assert processor.kind == KINDS[kind].__name__
    maps = {} if kind == "oneformer" else {"segmentation_maps": MAPS}  # its own need class names
    want = reference(IMAGES, return_tensors=None, **maps)
    have = processor(IMAGES, return_tensors=None, **maps)
    assert have.keys() == set(want)
    for x, y in zip(have["pixel_values"], want["pixel_values"], strict=True):
        equal_pixels(x, torch.as_tensor(y))
    for name in ("pixel_mask", "labels", "class_labels", "patch_offsets"):
        for x, y in zip(have.get(name, ()), want.get(name, ()), strict=True):
            assert torch.equal(x, y)
    same_masks(processor, have, want)
    processor.save_pretrained(tmp_path / "ours")
    again = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert type(again) is KINDS[kind]
    third = again(IMAGES, return_tensors=None, **maps)
    for name in ("pixel_values", "labels", "mask_labels", "class_labels"):
        for x, y in zip(third.get(name, ()), want.get(name, ()), strict=True):
            assert torch.equal(x, y)


def same_masks(processor, have, want):
    """Alike where the image is; beside it theirs have `ignore_index`, or count as label 0."""
    assert ("mask_labels" in have) == ("mask_labels" in want)
    if "mask_labels" not in have:
        return
    ends = [tuple(map(int, mask.nonzero().amax(0) + 1)) for mask in have.get("pixel_mask", ())]
    if not ends:
        takes = processor._input()
        ends = [takes.resized(size) for size in SIZES]
        if len(have["patch_offsets"]):
            ends = [(SIDE, SIDE)] * len(have["patch_offsets"])
    for x, y, (h, w) in zip(have["mask_labels"], want["mask_labels"], ends, strict=True):
        assert x.shape == y.shape
        assert torch.equal(x[:, :h, :w], y[:, :h, :w])
        assert x.sum() == x[:, :h, :w].sum() == h * w or "ignore_index" in vars(processor)
        assert x.max() == 1


INSTANCES = {
    "for all": {0: 5, 1: 2, 2: 2, 3: 0},
    "for each": [{0: 5, 1: 2, 2: 2, 3: 0}, {0: 1, 1: 1, 2: 1, 3: 1, 4: 1}],
}


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("case", INSTANCES)
@pytest.mark.parametrize("kind", ["mask2former", "maskformer", "eomt"])
def test_ids_of_instances(kind, case, reduce):
    fields = {"size": {"height": SIDE, "width": SIDE}}
    if reduce:
        fields |= {"ignore_index": 255}
        fields |= {} if kind == "eomt" else {"do_reduce_labels": True}
    reference, processor = KINDS[kind](**fields), Processor(KINDS[kind].__name__, **fields)
    given = {"segmentation_maps": MAPS, "instance_id_to_semantic_id": INSTANCES[case]}
    want, have = reference(IMAGES, **given), processor(IMAGES, **given)
    for name in ("mask_labels", "class_labels"):
        for x, y in zip(have[name], want[name], strict=True):
            assert torch.equal(x, y)
    assert have.class_labels[0].tolist() == [4, 1, 1, -1][1:] if reduce else [5, 2, 2, 0]


PICTURES = {
    "pil": lambda x: Image.fromarray(x),
    "channels first": lambda x: x.transpose(2, 0, 1),
    "tensor": lambda x: torch.from_numpy(x).movedim(2, 0),
    "floats": lambda x: x.astype(np.float32),
    "doubles": lambda x: x.astype(np.float64),
    "wide integers": lambda x: x.astype(np.int64),
}


@pytest.mark.parametrize("form", PICTURES)
@pytest.mark.parametrize("kind", ["mask2former", "segformer"])
def test_forms_of_pictures(kind, form, tmp_path):
    reference, image = theirs(kind, "as it is"), PICTURES[form](IMAGES[0])
    reference.save_pretrained(tmp_path)
    want = reference(image, return_tensors="pt")["pixel_values"]
    have = Processor.from_pretrained(tmp_path)(image)["pixel_values"]
    # integers that are no bytes are rounded where they are resized
    step = 1.01 / 255 / 0.22 if form == "wide integers" else 2e-6
    torch.testing.assert_close(have, want.float(), rtol=0, atol=step)


def test_a_file_and_grey(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "picture.png")
    processor = Processor(size={"height": 32, "width": 32})
    assert torch.equal(
        processor(tmp_path / "picture.png").pixel_values, processor(IMAGES[0]).pixel_values
    )
    grey = IMAGES[0][..., 0]
    want = processor(np.repeat(grey[..., None], 3, 2)).pixel_values
    assert torch.equal(processor(grey).pixel_values, want)


@pytest.mark.parametrize("kind", ["mask2former", "segformer", "eomt"])
@pytest.mark.parametrize("of", [np.asarray, torch.as_tensor], ids=["arrays", "tensors"])
def test_a_batch_in_one_piece(kind, of):
    images, maps = np.stack([IMAGES[0], IMAGES[0][::-1]]), np.stack([MAPS[0], MAPS[0][::-1]])
    processor, reference = Processor(KINDS[kind].__name__), KINDS[kind]()
    given = {"size": {"shortest_edge": 40, "longest_edge": 64}, "segmentation_maps": of(maps)}
    want = reference(of(images), return_tensors="pt", **given)
    have = processor(of(images), **given)
    equal_pixels(have.pixel_values, want.pixel_values)
    assert len(have.pixel_values) == 2
    for name in have.keys() & {"labels", "class_labels"}:
        assert all(torch.equal(x, y) for x, y in zip(have[name], want[name], strict=True))


def test_arrays_that_run_backwards():
    """Such as the colours of OpenCV turned by `image[..., ::-1]`."""
    processor = Processor(size={"height": 32, "width": 32})
    have = processor(IMAGES[0][::-1, :, ::-1], MAPS[0][::-1])
    want = processor(IMAGES[0][::-1, :, ::-1].copy(), MAPS[0][::-1].copy())
    assert torch.equal(have.pixel_values, want.pixel_values)
    assert torch.equal(have.mask_labels[0], want.mask_labels[0])


def test_a_field_that_eomt_has_not_is_passed_over(tmp_path):
    found = theirs("eomt", "as it is").to_dict() | {"do_reduce_labels": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
    have = Processor.from_pretrained(tmp_path)(IMAGES[0], MAPS[0])
    want = AutoImageProcessor.from_pretrained(tmp_path)(IMAGES[0], MAPS[0], return_tensors="pt")
    assert torch.equal(have.class_labels[0], want["class_labels"][0])


def test_floats_up_to_1_are_named():
    processor, image = Processor(size={"height": 32, "width": 32}), IMAGES[0] / 255
    with pytest.warns(UserWarning, match="do_rescale=False"):
        processor(image)
    have = processor(image, do_rescale=False).pixel_values
    # resized in floats, without roundings to 255 steps
    want = processor(IMAGES[0]).pixel_values
    torch.testing.assert_close(have, want, rtol=0, atol=1.01 / 255 / 0.22)


@pytest.mark.parametrize("kind", KINDS)
def test_fields_of_a_call(kind):
    reference, processor = KINDS[kind](), Processor(KINDS[kind].__name__)
    fields = {"size": {"height": 40, "width": 56}, "do_normalize": False, "rescale_factor": 0.5}
    fields |= {"do_pad": False} if kind == "eomt" else {}
    if kind in ("mask2former", "maskformer"):
        fields |= {"size_divisor": 9}
    want = reference(IMAGES, return_tensors="pt", **fields)["pixel_values"]
    equal_pixels(processor(IMAGES, **fields)["pixel_values"], want)
    for name, value in fields.items():
        setattr(processor, name, value)
    equal_pixels(processor(IMAGES)["pixel_values"], want)


def test_padding_of_a_call():
    sides = {"size": {"shortest_edge": SIDE, "longest_edge": SIDE}}
    for own, given in ((True, False), (False, True)):
        reference = KINDS["eomt"](**sides, do_pad=own)
        processor = Processor("EomtImageProcessor", **sides, do_pad=own)
        want = reference(IMAGES[0], do_pad=given, return_tensors="pt")["pixel_values"]
        equal_pixels(processor(IMAGES[0], do_pad=given).pixel_values, want)


def test_forms_of_returns():
    processor = Processor(size={"height": 32, "width": 32})
    out = processor(IMAGES, MAPS, return_tensors="np")
    assert all(isinstance(x, np.ndarray) for x in (out.pixel_values, *out.mask_labels))
    half = processor(IMAGES, MAPS).to("cpu", torch.bfloat16)
    assert half.pixel_values.dtype == half.mask_labels[0].dtype == torch.bfloat16
    assert half.pixel_mask.dtype == half.class_labels[0].dtype == torch.int64
    assert processor(IMAGES).to(torch.float64).pixel_values.dtype == torch.float64
    with pytest.raises(AttributeError, match="labels"):
        _ = out.labels


def test_tasks():
    processor = Processor("OneFormerImageProcessor", size={"height": 32, "width": 32})
    reference = KINDS["oneformer"](size={"height": 32, "width": 32})
    for tasks in (None, ["semantic", "instance"]):
        want = reference(IMAGES[:1] if tasks is None else IMAGES, task_inputs=tasks)
        have = processor(IMAGES[:1] if tasks is None else IMAGES, task_inputs=tasks)
        assert have["task_inputs"] == want["task_inputs"]
    assert processor(IMAGES, task_inputs="panoptic").task_inputs == 2 * ["the task is panoptic"]


def test_what_segment_takes_is_what_the_processor_gives(tmp_path):
    """Of a model of ours, too: its sides are rounded and padded, as in the papers' code."""
    config = Mask2FormerConfig.tiny(2)
    config.shortest_edge, config.longest_edge = 50, 90
    segkern.models.build_model(config).save_pretrained(tmp_path)
    model, processor = Squares().eval(), Processor.from_pretrained(tmp_path)
    model.config.input = segkern.open_model(tmp_path).config.input
    segkern.segment(model, IMAGES[0])
    equal_pixels(processor(IMAGES[0]).pixel_values, model.seen[0])
    assert model.seen[0].shape == (1, 3, 64, 80)  # 50 x 76, padded to multiples of 16
    processor.save_pretrained(tmp_path / "again")
    again = Processor.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IMAGES[0]).pixel_values, processor(IMAGES[0]).pixel_values)


def test_other_fields_stay(tmp_path):
    found = theirs("oneformer", "edges").to_dict() | {"num_text": 134, "class_info_file": "x.json"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
    processor = Processor.from_pretrained(tmp_path / "preprocessor_config.json")
    processor.save_pretrained(tmp_path / "new/folder")
    written = json.loads((tmp_path / "new/folder/preprocessor_config.json").read_text())
    assert {k: written[k] for k in found} == json.loads(json.dumps(found))


def test_a_field_named_as_a_method_does_not_take_its_place(tmp_path):
    found = theirs("mask2former", "edges").to_dict()
    found |= {"kind": "x", "post_process_panoptic_segmentation": 1}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
    processor = Processor.from_pretrained(tmp_path)
    assert processor.kind == "Mask2FormerImageProcessor"
    assert callable(processor.post_process_panoptic_segmentation)


@pytest.mark.parametrize("named", ["ConvNextImageProcessor", 3])
def test_a_kind_that_is_not_known_is_one_warning(named, tmp_path):
    found = {"image_processor_type": named, "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
    with pytest.warns(UserWarning, match=f"image_processor_type {named} is not known") as told:
        processor = Processor.from_pretrained(tmp_path)
    assert len(told) == 1
    assert processor(IMAGES[0]).pixel_values.shape == (1, 3, 32, 32)


FAULTS = {
    "kind": (lambda: Processor("BeitImageProcessor"), "kind must be one of"),
    "field": (lambda: Processor(resample=5), "resample must be one of"),
    "size": (lambda: Processor(size={"longest_edge": 600}), "Processor: size .* must have height"),
    "field of a call": (lambda: Processor()(IMAGES, do_rezise=False), "has no do_rezise"),
    "field of a kind": (
        lambda: Processor("SegformerImageProcessor")(IMAGES, size_divisor=4),
        "a SegformerImageProcessor has no size_divisor",
    ),
    "sizes": (
        lambda: Processor("SegformerImageProcessor", do_resize=False)(IMAGES),
        "pixel_values must have one shape",
    ),
    "maps": (lambda: Processor()(IMAGES, MAPS[:1]), "segmentation_maps must be 2, as images, got"),
    "map": (lambda: Processor()(IMAGES[0], IMAGES[0]), r"maps\[0\]: must be \[H, W\]"),
    "file of a map": (
        lambda: Processor()(IMAGES[0], "map.png"),
        r"segmentation_maps\[0\]: must be a PIL image, array or tensor, got str",
    ),
    "nothing": (lambda: Processor()([]), "images must not be empty"),
    "map of floats": (lambda: Processor()(IMAGES[0], MAPS[0] + 0.5), "must hold whole numbers"),
    "another map": (lambda: Processor()(IMAGES[0], MAPS[1]), r"segmentation_maps\[0\] must be 61"),
    "reduce": (
        lambda: Processor(do_reduce_labels=True)(IMAGES, MAPS),
        "ignore_index must be given with do_reduce_labels",
    ),
    "id": (
        lambda: Processor()(IMAGES[0], MAPS[0], {0: 1}),
        "must have every id of the map, 1 too",
    ),
    "pad size": (
        lambda: Processor(pad_size={"height": 9, "width": 9})(IMAGES),
        "pad_size must be at least an image's size",
    ),
    "tensors": (lambda: Processor()(IMAGES, return_tensors="tf"), "return_tensors must be"),
    "task": (lambda: Processor()(IMAGES, task_inputs="panoptic"), "task_inputs must be left out"),
    "tasks": (
        lambda: Processor("OneFormerImageProcessor")(IMAGES, task_inputs="all"),
        "task_inputs must be panoptic, instance or semantic, got 'all'",
    ),
    "number of tasks": (
        lambda: Processor("OneFormerImageProcessor")(IMAGES, task_inputs=3 * ["panoptic"]),
        "task_inputs must be 1 or 2, as images, got 3",
    ),
    "windows": (
        lambda: Processor("EomtImageProcessor", do_split_image=True)(
            IMAGES, size={"height": 64, "width": 64}
        ),
        "size must have a shortest_edge",
    ),
    "picture": (lambda: Processor()(np.zeros((5, 6, 7))), r"images\[0\]: must be \[H, W\]"),
    "nan": (lambda: Processor()(np.full((8, 8, 3), np.nan)), "must be finite"),
    "labels of ids": (
        lambda: Processor()(IMAGES, MAPS, [dict.fromkeys(range(4), 0)]),
        "instance_id_to_semantic_id must be 2, as images, got 1",
    ),
    "deviation": (
        lambda: Processor(image_std=[0, 1, 1]),
        r"Processor: preprocessor_config.json: image_std must be numbers above 0",
    ),
    "divisor": (
        lambda: Processor(size_divisor="32"),
        "size_divisor of preprocessor_config.json must be an integer, got '32'",
    ),
    "no file": (lambda: Processor.from_pretrained("/"), "has no preprocessor_config.json"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_refused(case):
    run, message = FAULTS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        run()
