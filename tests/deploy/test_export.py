"""Files of ONNX and OpenVINO, each run by its own runtime: they compute what the model does."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch.utils._sympy.functions import FloorDiv

import segkern
from segkern.deploy import compare, export, formats
from segkern.deploy.decompositions import decomposed
from segkern.deploy.graph import Graph, run
from segkern.structures.settings import Options
from support.small_models import EXPORTED

BOUND = 1e-4


def model_of(kind):
    torch.manual_seed(0)
    return EXPORTED[kind]()


def opened(path):
    """The file as anyone opens it: a function of pixels that gives results by name."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        names = [o.name for o in session.get_outputs()]
        return lambda x: dict(zip(names, session.run(None, {"pixel_values": x.numpy()})))
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    names = [port.get_any_name() for port in compiled.outputs]
    return lambda x: dict(zip(names, compiled(x.numpy()).values()))


def assert_same(have, want, atol=BOUND):
    assert have.keys() == want.keys()
    for name, value in want.items():
        value = value.numpy()
        assert have[name].shape == value.shape
        assert have[name].dtype == value.dtype
        np.testing.assert_allclose(have[name], value, rtol=0, atol=atol, err_msg=name)


def samples(graph, sizes):
    channels = graph.model.config.input.channels
    return [torch.randn(b, channels, h, w) for b, h, w in sizes]


def assert_equal_to_the_model(path, graph, sizes):
    """Logits to 1e-4, and every mask is the same but where its logit is nearer to zero."""
    file = opened(path)
    for x in samples(graph, sizes):
        have, want = file(x), run(graph, x)
        assert_same(have, want)
        masks = want.get("masks_queries_logits")
        if masks is not None:
            clear = masks.abs().numpy() > BOUND
            assert clear.mean() > 0.9
            same = (have["masks_queries_logits"] > 0) == (masks.numpy() > 0)
            assert same[clear].all()


def written(graph, folder, size, batches, sides, grid_sample=False):
    """Both files of one trace."""
    program = export.traced(graph, size, 1, batches, sides)
    program = decomposed(program, grid_sample)
    files = folder / "model.onnx", folder / "model.xml"
    formats.write_onnx(program, files[0], graph, batches, sides, 20)
    formats.write_openvino(*files, graph)
    return files


# levels, stages of a transformer, positions, windows that move: what makes a graph for any sides
# differ. All kinds are in the table of tools/export_table.py
ANY_SIDES = ("Mask2Former, ResNet", "MaskFormer", "Segmenter", "SegFormer", "U-Net, instance")
RECORDED = ("Mask2Former, Swin", "Mask2Former, DiNAT")  # as files they take half a minute each


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in EXPORTED if kind not in ANY_SIDES])
def test_files_for_any_number_of_pictures_equal_the_model(kind, tmp_path):
    """Deformable attention by GridSample here, by gathers below."""
    graph, (h, w) = Graph(model_of(kind)), (32, 32) if kind == "EoMT" else (96, 128)
    for path in written(graph, tmp_path, (h, w), True, False, grid_sample=True):
        assert_equal_to_the_model(path, graph, [(1, h, w), (3, h, w)])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", ANY_SIDES)
def test_files_for_pictures_of_any_sides_equal_the_model(kind, tmp_path):
    """One, two and three pictures, each of other sides."""
    graph = Graph(model_of(kind))
    for path in written(graph, tmp_path, (128, 128), True, True):
        assert_equal_to_the_model(path, graph, [(1, 128, 160), (2, 160, 96), (3, 96, 224)])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", RECORDED)
def test_a_graph_for_any_sides_knows_its_maps_as_multiples(kind):
    """Sizes that are floors of floors take PyTorch minutes; it runs on sizes that it has not
    seen."""
    graph = Graph(model_of(kind))
    program = export.traced(graph, (128, 128))
    floors = {
        atom
        for node in program.graph.nodes
        for side in getattr(node.meta.get("val"), "shape", ())
        if isinstance(side, torch.SymInt)
        for atom in side.node.expr.atoms(FloorDiv)
    }
    assert {atom.args[1] for atom in floors} == {graph.model.config.input.divisor}
    for x in samples(graph, [(1, 160, 96), (3, 96, 224)]):
        have = dict(zip(graph.form.outputs, program.module(check_guards=False)(x), strict=True))
        assert_same({name: value.detach().numpy() for name, value in have.items()}, run(graph, x))


def test_a_graph_for_any_sides_leaves_out_what_is_no_multiple():
    graph = Graph(model_of("U-Net, semantic"), post="semantic")
    program = export.traced(graph, (128, 128))
    d = graph.model.config.input.divisor
    assert d > 1
    (x,) = samples(graph, [(1, 33 * d + 1, 40 * d - 1)])
    (labels,) = program.module(check_guards=False)(x)  # as other runtimes do
    assert labels.shape == (1, 33 * d, 39 * d)
    assert torch.equal(labels, run(graph, x[:, :, : 33 * d, : 39 * d])["labels"])


@pytest.mark.slow
@pytest.mark.long
def test_files_for_pictures_of_one_size_equal_the_model(tmp_path):
    graph = Graph(model_of("Seq2Seg, instance"))
    for path in written(graph, tmp_path, (96, 128), False, False):
        assert_equal_to_the_model(path, graph, [(1, 96, 128)])


QUICK = {
    ("EoMT", ".onnx"): {},
    ("Segmenter", ".xml"): {"dynamic": False, "batch": 2},
    ("U-Net, semantic", ".onnx"): {"dynamic": "batch", "post": "semantic"},
}


@pytest.mark.parametrize(("kind", "suffix"), QUICK)
def test_export_compares_what_it_wrote(kind, suffix, tmp_path):
    model, given = model_of(kind), QUICK[kind, suffix]
    model.train()
    made = segkern.export(model, tmp_path / f"model{suffix}", bound=BOUND, **given)
    assert model.training
    beside = {"model.bin"} if suffix == ".xml" else set()
    assert {p.name for p in tmp_path.iterdir()} == {made.path.name} | beside
    assert made.batch == given.get("batch")
    assert made.size == (32, 32)
    assert len(made.differences) == (1 if given.get("dynamic") is False else 2)
    for line, difference in zip(made.lines(), made.differences, strict=True):
        assert line.startswith(str(list(difference.shape)))
        assert difference.largest.keys() == set(made.form.outputs)
        assert max(difference.largest.values()) <= BOUND
    graph = Graph(model, post=given.get("post"))
    (x,) = samples(graph, [(given.get("batch", 3), 32, 32)])
    assert_same(opened(made.path)(x), run(graph, x))
    if suffix == ".onnx":
        read = onnx.load(made.path)
        assert read.producer_name == "segkern"
        assert read.opset_import[0].version == 20
        (said,) = (json.loads(p.value) for p in read.metadata_props if p.key == "segkern")
        assert said["outputs"] == list(made.form.outputs)
        assert said["task"] == made.form.task
        assert not {n.domain for n in read.graph.node} - {""}, "operators that only one tool has"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize("post", ["instance", "panoptic"])
def test_results_are_part_of_a_file(post, suffix, tmp_path):
    model, options = model_of("EoMT"), Options(0.05, top_k=9) if post == "instance" else None
    options = options or Options(0.05, 0.1)
    made = segkern.export(model, tmp_path / f"m{suffix}", post=post, options=options)
    graph = Graph(model, post=post, options=options)
    (x,) = samples(graph, [(2, 32, 32)])
    want = run(graph, x)
    assert_same(opened(made.path)(x), want)
    found = want["masks" if post == "instance" else "ids"]
    assert found.float().mean() > 0
    assert len(found.unique()) > 1


def test_a_file_that_differs_is_not_left(tmp_path, monkeypatch):
    """What stood there stays."""
    path = tmp_path / "model.onnx"
    path.write_text("before")
    right = formats.write_onnx

    def wrong(program, *args):
        for name, value in program.state_dict.items():
            if name.endswith("class_predictor.weight") or "class" in name:
                program.state_dict[name] = torch.nn.Parameter(value * 1.01)
        right(program, *args)

    monkeypatch.setattr(export, "write_onnx", wrong)
    message = r"must equal the model to 0\.001, but class_queries_logits differs by .*nothing was"
    with pytest.raises(ValueError, match=message):
        segkern.export(model_of("EoMT"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "before"


def test_a_bound_that_is_missed_is_an_error():
    graph = Graph(model_of("EoMT"))
    (x,) = samples(graph, [(1, 32, 32)])
    want = [t.numpy() for t in run(graph, x).values()]

    def compared(*results):
        return compare.compared(graph, lambda pixels: results, [x], 1e-3, "model.onnx")

    (found,) = compared(*want)
    assert found.largest == {"class_queries_logits": 0, "masks_queries_logits": 0}
    shifted = want[1].copy()
    shifted[0, 0, 0, 0] += 0.01 * np.abs(want[1]).max().clip(1)
    with pytest.raises(ValueError, match=r"masks_queries_logits differs by 0\.01 for pixels \[1,"):
        compared(want[0], shifted)
    with pytest.raises(ValueError, match="masks_queries_logits differs by nan"):
        compared(want[0], want[1] * np.nan)
    with pytest.raises(
        ValueError, match=r"must give masks_queries_logits of shape \[1, 4, 8, 8\]"
    ):
        compared(want[0], want[1][:, :2])


def test_masks_of_equal_scores_may_come_in_either_order():
    """And at the end of the table either may be there, but no other row may differ."""
    graph = Graph(model_of("EoMT"), post="instance", options=Options(top_k=4))
    (x,) = samples(graph, [(1, 32, 32)])
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.1]])
    labels, masks = torch.tensor([[0, 1, 2, 1]]), torch.randn(1, 4, 32, 32) > 0
    graph.forward = lambda pixels: (masks, labels, scores)

    def worst(changed):
        rows = [masks.numpy().copy(), labels.numpy().copy(), scores.numpy().copy()]
        changed(*rows)
        (found,) = compare.compared(graph, lambda pixels: rows, [x], 1e-3, "model.onnx")
        return max(found.largest.values())

    def swapped(*rows):
        for row in rows:
            row[:, [1, 2]] = row[:, [2, 1]]

    def other_end(masks, labels, scores):
        labels[0, 3], scores[0, 3], masks[0, 3] = 2, 0.1001, True

    def other_start(masks, labels, scores):
        labels[0, 0] = 2

    assert worst(swapped) == 0
    assert worst(other_end) == 0
    with pytest.raises(ValueError, match=r"labels differs by 0\.25"):
        worst(other_start)


def test_a_graph_for_some_sizes_alone_is_not_taken_for_one_for_all():
    graph = Graph(model_of("Segmenter"))  # of multiples of 16: the last one below 500 is 496

    def forward(pixel_values):
        return (pixel_values * 2 if pixel_values.shape[2] < 500 else pixel_values,)

    graph.forward = forward
    with pytest.raises(ValueError, match=r"axis 2 .* for this Segmenter, .* to 496 alone"):
        export.traced(graph, (128, 128))
    assert export.traced(graph, (128, 128), sides=False)


@pytest.fixture(scope="module")
def small():
    return model_of("EoMT")


def test_what_cannot_be_exported_is_named(small, tmp_path):
    path = tmp_path / "model.onnx"
    for given, words in (
        (
            {"path": tmp_path / "model.tflite"},
            r"path must end in \.onnx, \.xml, \.pt2, got .*tflite",
        ),
        ({"post": "masks"}, "post must be left out or one of"),
        ({"task": "things"}, "task must be"),
        ({"size": (30, 32)}, r"size must be .* multiples of 32 for a EoMT, got \(30, 32\)"),
        ({"dynamic": "all"}, "dynamic must be a bool, 'batch' or 'sides', got 'all'"),
        ({"dynamic": "sides"}, "takes pictures of one size: EoMT: pixel_values must be"),
        ({"batch": 2}, "batch must be left out unless dynamic is False"),
        ({"batch": 0, "dynamic": False}, "export: batch must be >= 1, got 0"),
        ({"opset": 12}, "opset must be from 18 to 23, got 12"),
    ):
        with pytest.raises(ValueError, match=words):
            segkern.export(small, **{"path": path} | given)
    with pytest.raises(ValueError, match=r"must be in float32 on the CPU .*, got torch\.bfloat16"):
        segkern.export(model_of("EoMT").bfloat16(), path)
    with pytest.raises(ValueError, match="task must be 'semantic' for a Segmenter"):
        segkern.export(model_of("Segmenter"), path, post="panoptic")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "package"), [(".onnx", "onnxscript"), (".xml", "openvino")])
def test_a_missing_package_comes_with_the_remedy(small, suffix, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"a {suffix} file needs {package}: pip install .*{package}.*'\.\[export\]'"
    with pytest.raises(ImportError, match=message):
        segkern.export(small, tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_found_first(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into folder .*file"):
        segkern.export(small, tmp_path / "file" / "model.onnx")
