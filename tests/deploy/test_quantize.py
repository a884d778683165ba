"""Files with fewer bits: what is int8 in them, what is not, and that what loses too much is not
written."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import segkern
from segkern.cli import main
from segkern.data import DigitsConfig, build_dataset
from segkern.deploy import quantize_onnx, quantize_pt2
from segkern.deploy.decompositions import decomposed
from segkern.deploy.export import traced
from segkern.deploy.formats import write_onnx
from segkern.deploy.graph import Graph
from segkern.deploy.load import load
from segkern.deploy.quantize import QualityLostError
from segkern.io.images import prepare
from segkern.models import Mask2Former, Mask2FormerConfig, SegFormer, SegFormerConfig, open_model
from segkern.models.smaller import SENSITIVE
from segkern.structures.logits import PixelLogits
from support.models import model_config

NAMES = dict(enumerate([*map(str, range(10)), "background"]))
QUICK = {"limit": 2, "runs": 1, "progress": False, "pictures": 3}
ALONE = """import sys, torch
from segkern.deploy.load import load
path, x, y = sys.argv[1:]
torch.save(load(path)(torch.load(x))["logits"], y)
"""
HEAD = ((3, 64), (64, 3))  # the class head of `Brief`, as it may stand in a file


class Brief(nn.Module):
    """A model of pixels in few operations, which exports in a moment: a part that is computed of
    two weights, one of them split twice, and a norm's, a convolution, and a class head."""

    class_head = ("head.weight", "head.bias")

    def __init__(self):
        super().__init__()
        self.config = model_config(3, dict(enumerate("abc")), logits=PixelLogits, divisor=4)
        self.config.input = replace(self.config.input, window=32, stride=32)
        self.stem = nn.Conv2d(3, 64, 4, 4)
        self.fuse = nn.Linear(64, 64)
        self.turn = nn.Linear(64, 64, bias=False)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 3)
        self.eval()

    def inputs(self, task, batch):
        return ()

    def predict(self, pixel_values):
        x = F.relu(self.stem(pixel_values)).permute(0, 2, 3, 1)
        first, second = self.fuse.weight.split((48, 16))
        left, right = second.split(32, 1)
        weight = self.turn.weight @ torch.cat((torch.cat((right, left), 1), first))
        weight = self.norm.weight[:, None] * weight
        x = F.relu(F.linear(x, weight, self.fuse.bias))
        return PixelLogits(self.head(x).permute(0, 3, 1, 2), 4)


class Thirds:
    """Pictures whose label of a pixel is its brightest channel."""

    classes, stuff = list("abc"), ()

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 6

    def __getitem__(self, i):
        image = np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        image = image.repeat(4, 0).repeat(4, 1)
        values = prepare(torch.from_numpy(image).movedim(2, 0), self.model.config.input)
        with torch.no_grad():  # what the model says, so that any change of it is a loss
            maps = self.model.predict(values[None]).maps
        return {"pixel_values": values, "image": image, "semantic": labels_of(maps)}


def labels_of(maps):
    """[32, 32] of logits [1, 3, 8, 8]."""
    return F.interpolate(maps, (32, 32), mode="bilinear")[0].argmax(0).numpy()


def spread(model):
    """The model with weights where its initialisation has zeros, as trained ones have."""
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def brief():
    torch.manual_seed(0)
    return Brief()


@pytest.fixture(scope="module")
def segformer():
    """As wide as B0, and half as deep."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": (32, 64, 160, 256), "num_attention_heads": (1, 2, 5, 8)}
    tiny = SegFormerConfig.tiny(11)
    return spread(SegFormer(replace(tiny, id2label=NAMES, decoder_hidden_size=256, **sizes)))


@pytest.fixture(scope="module")
def mask2former():
    torch.manual_seed(0)
    wide = {"dim_feedforward": 1024, "encoder_feedforward_dim": 1024, "decoder_layers": 2}
    tiny = Mask2FormerConfig.tiny(11)
    return spread(Mask2Former(replace(tiny, id2label=NAMES, stuff=(10,), **wide)))


@pytest.fixture(scope="module")
def scenes():
    """Of each task."""
    return {
        task: build_dataset(DigitsConfig(size=(64, 64), level="easy", task=task), "val")
        for task in ("panoptic", "semantic")
    }


@pytest.fixture(scope="module")
def pixels(scenes):
    return [torch.as_tensor(scenes["semantic"][i]["pixel_values"])[None] for i in range(4)]


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory):
    """Gives the float32 file of a model by its name, for one picture of 64 x 64, which is traced
    soonest, and what its constants are made of; once."""
    folder, made = tmp_path_factory.mktemp("float32"), {}

    def path_of(kind):
        if kind not in made:
            path, graph = folder / f"{kind}.onnx", Graph(request.getfixturevalue(kind))
            program = decomposed(traced(graph, (64, 64), batches=False, sides=False))
            write_onnx(program, path, graph, False, False, 20)
            made[kind] = path, quantize_onnx.made_from(program)
        return made[kind]

    return path_of


def run(path, pixel_values):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": pixel_values.numpy()})


@torch.no_grad()
def logits_of(model, pixel_values):
    found = model.predict(pixel_values)
    if isinstance(found, PixelLogits):
        return (found.maps,)
    return found.classes, torch.einsum("bqc,bchw->bqhw", found.masks, found.features)


def off(have, want):
    """Root mean square of the difference over that of the values."""
    have, want = np.asarray(have, np.float64), np.asarray(want, np.float64)
    return float(np.sqrt(np.square(have - want).mean() / np.square(want).mean()))


def products(path):
    """Of each product and convolution with a constant: its operator, the dtype of the constant as
    it is stored, its shape, and whether what it multiplies was int8."""
    graph = onnx.load(path).graph
    stored = {x.name: x for x in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}

    def origin(name):
        node = made.get(name)
        while node is not None and node.op_type in ("DequantizeLinear", "Cast"):
            name = node.input[0]
            node = made.get(name)
        return name

    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
            weight = stored.get(origin(node.input[1]))
            if weight is not None and len(weight.dims) > 1:
                source = made.get(node.input[0])
                quantised = source is not None and source.op_type == "DequantizeLinear"
                yield node.op_type, weight.data_type, tuple(weight.dims), quantised


METHODS = {
    "int8": lambda source, keep, seen, path: quantize_onnx.to_int8(source, keep, seen, path),
    "int8-weights": lambda source, keep, seen, path: quantize_onnx.to_int8_weights(
        source, keep, path
    ),
    "bf16": lambda source, keep, seen, path: quantize_onnx.to_bf16(source, keep, path),
}
STORED = {"int8": onnx.TensorProto.INT8, "bf16": onnx.TensorProto.BFLOAT16}
STORED["int8-weights"] = STORED["int8"]
SHARE = {"int8": 0.36, "int8-weights": 0.36, "bf16": 0.58}  # of all bytes
FAR = {"int8": 0.12, "int8-weights": 0.06, "bf16": 0.03}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["segformer", "mask2former"])
def test_weights_are_small_in_the_file_and_sensitive_parts_are_not(
    kind, method, request, exported, pixels, tmp_path
):
    model, path = request.getfixturevalue(kind), tmp_path / "small.onnx"
    source = quantize_onnx.prepared(*exported(kind))
    keep = (*SENSITIVE, *model.class_head)
    kept = {n for w in source.weights for n in w.made_of} - {
        n for w in source.wanted(keep) for n in w.made_of
    }
    METHODS[method](source, keep, pixels[:3], path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    found = list(products(path))
    heads = 12 if kind == "mask2former" else 11
    classes = [f for f in found if heads in f[2]]
    assert classes
    assert all(dtype == onnx.TensorProto.FLOAT for _, dtype, _, _ in classes)
    assert not any(quantised for *_, quantised in classes)
    small = [f for f in found if f[1] == STORED[method]]
    assert len(small) > 30
    assert all(quantised == (method == "int8") for *_, quantised in small)
    assert any("classifier" in name or "class_embed" in name for name in kept)
    if kind == "segformer":  # its head, whose weights are composed of a split one
        wanted = {name for w in source.wanted(keep) for name in w.made_of}
        assert {"head.fuse.weight", "head.linears.0.weight"} < wanted
    if kind == "mask2former":
        assert any("sampling_offsets" in name for name in kept)
        shape = tuple(model.pixel_decoder.layers[0].attn.sampling_offsets.weight.shape)
        offsets = [f for f in found if sorted(f[2]) == sorted(shape)]
        assert offsets
        assert all(dtype == onnx.TensorProto.FLOAT for _, dtype, _, _ in offsets)
    assert len(small) == len(source.wanted(keep))
    share = path.stat().st_size / (4 * sum(p.numel() for p in model.parameters()))
    assert share < SHARE[method]
    have, want = run(path, pixels[3]), logits_of(model, pixels[3])
    assert len(have) == len(want)
    for a, b in zip(have, want):
        assert 0 < off(a, b) < FAR[method]


@pytest.mark.parametrize("method", METHODS)
def test_composed_weights_are_small_and_kept_by_the_names_they_come_from(
    method, exported, brief, tmp_path
):
    seen = [torch.randn(1, 3, 64, 64) for _ in range(2)]
    for keep, small in (((), 2), (("fuse.*",), 1)):
        source, path = quantize_onnx.prepared(*exported("brief")), tmp_path / "small.onnx"
        assert {w.made_of for w in source.weights} == {
            frozenset({"stem.weight"}),
            frozenset({"turn.weight", "fuse.weight", "norm.weight"}),
            frozenset({"head.weight"}),
        }
        METHODS[method](source, (*SENSITIVE, *brief.class_head, *keep), seen, path)
        found = list(products(path))
        assert len(found) == 3
        assert sum(dtype == STORED[method] for _, dtype, _, _ in found) == small
        assert all(
            dtype == onnx.TensorProto.FLOAT for _, dtype, shape, _ in found if shape in HEAD
        )
        wanted = brief.predict(seen[0]).maps.detach()
        assert 1e-5 < off(run(path, seen[0])[0], wanted) < FAR[method]
    source = quantize_onnx.prepared(*exported("brief"))
    with pytest.raises(ValueError, match="keep must leave a weight to make smaller"):
        METHODS[method](source, ("stem.*", "turn.*", "head.*"), seen, tmp_path / "none.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_figures_are_those_of_the_file(brief, method, tmp_path):
    out, data = tmp_path / "small.onnx", Thirds(brief)
    rows = segkern.quantize(brief, out, data, method, max_drop=1.0, **QUICK)
    assert [row["name"] for row in rows] == ["model", "float32 file", method]
    assert rows[0]["miou"] == 1
    assert rows[2]["mb"] == round(out.stat().st_size / 1e6, 3) < rows[1]["mb"]
    assert rows[1]["mb"] == rows[0]["mb"]
    assert all(row["ms"] > 0 for row in rows)
    about = {p.key: p.value for p in onnx.load(out).metadata_props}["segkern"]
    assert json.loads(about)["outputs"] == ["logits"]
    assert [p.name for p in tmp_path.iterdir()] == ["small.onnx"]
    sums = np.zeros((2, 3))
    for i in range(2):
        logits = torch.tensor(run(out, data[i]["pixel_values"][None])[0])
        have = labels_of(logits)
        for k in range(3):
            there, found = data[i]["semantic"] == k, have == k
            sums[:, k] += (there & found).sum(), (there | found).sum()
    mean = np.mean([a / b for a, b in sums.T if b])
    assert rows[2]["miou"] == pytest.approx(mean, abs=1e-9)


@pytest.mark.slow
def test_a_drop_above_the_limit_writes_nothing(brief, tmp_path, monkeypatch):
    data, out = Thirds(brief), tmp_path / "small.onnx"

    def spoilt(source, keep, path):
        for x in source.model.graph.initializer:
            if tuple(x.dims) in HEAD:
                value = onnx.numpy_helper.to_array(x)
                x.CopyFrom(onnx.numpy_helper.from_array(-value, x.name))
        onnx.save(source.model, path)

    monkeypatch.setattr("segkern.deploy.quantize_onnx.to_int8_weights", spoilt)
    settings = {"method": "int8-weights", "max_drop": 0.5} | QUICK
    told = r"miou falls by .* max_drop 0.5: .* not written"
    with pytest.raises(QualityLostError, match=told) as raised:
        segkern.quantize(brief, out, data, **settings)
    rows = raised.value.rows
    assert [row["name"] for row in rows] == ["model", "float32 file", "int8-weights"]
    assert rows[0]["miou"] - rows[2]["miou"] > 0.5
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8", "int8-weights"])
def test_programs_of_pt2_hold_int8(method, brief, tmp_path):
    out, data = tmp_path / "small.pt2", Thirds(brief)
    rows = segkern.quantize(brief, out, data, method, max_drop=1.0, **QUICK)
    assert [row["name"] for row in rows] == ["model", "float32 file", method]
    program = torch.export.load(out)
    held = held_by(program)
    shapes = {tuple(v.shape): v.dtype for v in held.values() if v.ndim > 1}
    assert shapes == {
        (64, 3, 4, 4): torch.int8,
        (64, 64): torch.int8,  # one of two weights
        (3, 64): torch.float32,
    }
    activations = sum("quantize_per_tensor" in str(n.target) for n in program.graph.nodes)
    assert (activations > 0) == (method == "int8")
    x = data[4]["pixel_values"][None]
    opened = load(out)  # there is no library beside it, and none is needed
    assert opened.about["kind"] == "made up"
    assert "shape" in opened.about
    want = brief.predict(x).maps.detach()
    assert 0 < off(opened(x)["logits"], want) < FAR[method]
    torch.save(x, tmp_path / "x")
    subprocess.run(
        [sys.executable, "-c", ALONE, str(out), str(tmp_path / "x"), str(tmp_path / "y")],
        check=True,
    )
    assert torch.equal(torch.load(tmp_path / "y"), opened(x)["logits"])


def held_by(program):
    """The tensors of a program that its graph uses or not."""
    held = {**program.state_dict, **program.constants}
    return {k: v for k, v in held.items() if isinstance(v, torch.Tensor)}


FAULTS = [
    ("small.onnx", {"method": "int4"}, "method must be one of int8, int8-weights, bf16"),
    ("small.xml", {}, "out must end in .onnx or .pt2 for method int8"),
    ("small", {}, "out must end in .onnx or .pt2 for method int8"),
    ("small.pt2", {"method": "bf16"}, "out must end in .onnx or be a folder for bf16"),
    ("small.onnx", {"pictures": 0}, "pictures must be"),
    ("small.onnx", {"max_drop": 2.0}, r"max_drop must be in \[0, 1\], got 2.0"),
    ("small.onnx", {"keep": ("bakbone.*",)}, "keep must be patterns"),
    ("small.onnx", {"tasks": ("panoptic",)}, "task must be 'semantic'"),
]


@pytest.mark.parametrize(("name", "settings", "message"), FAULTS, ids=lambda x: str(x)[:30])
def test_what_cannot_be_quantised_is_told(brief, name, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        segkern.quantize(brief, tmp_path / name, Thirds(brief), **(QUICK | settings))
    assert not list(tmp_path.iterdir())


def test_a_model_in_half_precision_is_refused(scenes, tmp_path):
    model = SegFormer(SegFormerConfig.tiny(11)).bfloat16().eval()
    with pytest.raises(ValueError, match="model must be in float32 on the CPU"):
        segkern.quantize(model, tmp_path / "small.onnx", scenes["semantic"], **QUICK)


def test_a_folder_in_bf16_opens_in_bf16_and_in_float32(mask2former, scenes, tmp_path):
    out, data = tmp_path / "half", scenes["panoptic"]
    rows = segkern.quantize(mask2former, out, data, "bf16", max_drop=1.0, **QUICK)
    assert [row["name"] for row in rows] == ["model", "bf16"]
    assert 0.49 < rows[1]["mb"] / rows[0]["mb"] < 0.55
    half, whole = open_model(out, dtype="auto"), open_model(out)
    assert (half.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    weight = mask2former.query_decoder.query_feat.weight
    assert torch.equal(half.query_decoder.query_feat.weight, weight.bfloat16())
    assert torch.equal(whole.query_decoder.query_feat.weight, weight.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segformer", "mask2former"])
def test_a_model_becomes_a_pt2_of_int8(kind, request, pixels, tmp_path):
    model = request.getfixturevalue(kind)
    graph = Graph(model)
    keep = (*SENSITIVE, *model.class_head)
    program = quantize_pt2.to_int8(graph, keep, pixels[:3], (64, 64), sides=False)
    torch.export.save(program, tmp_path / "small.pt2")
    program = torch.export.load(tmp_path / "small.pt2")
    held = held_by(program)
    int8 = sum(v.numel() for v in held.values() if v.dtype == torch.int8)
    float32 = sum(v.numel() for v in held.values() if v.dtype == torch.float32)
    assert int8 > 8 * float32
    names = [k for k, v in held.items() if v.dtype == torch.float32 and v.ndim > 1]
    for part in ("classifier",) if kind == "segformer" else ("class_embed", "sampling_offsets"):
        assert any(part in name for name in names), part
    have = program.module(check_guards=False)(pixels[3])
    for a, b in zip(have, logits_of(model, pixels[3]), strict=True):
        assert 0 < off(a.detach(), b) < 0.2


@pytest.mark.slow
def test_the_command_prints_a_table_and_refuses_with_exit_code_1(
    segformer, tmp_path, capsys, monkeypatch
):
    folder, out = str(tmp_path / "model"), tmp_path / "small.onnx"
    segformer.save_pretrained(folder)
    command = ["quantize", folder, str(out), "--limit", "2", "--pictures", "2"]
    report = tmp_path / "table.json"
    assert main([*command, "--max-drop", "1", "--report", str(report)]) == 0
    text = capsys.readouterr().out
    for word in ("mIoU", "ms an image", "MB", "float32 file", "int8", "written"):
        assert word in text
    rows = json.loads(report.read_text())["rows"]
    assert len(rows) == 3
    assert main(command) == 2
    assert "out must not be there yet" in capsys.readouterr().err
    out.unlink()

    def lost(*_, **__):
        raise QualityLostError("quantize: miou falls by 0.5", rows)

    monkeypatch.setattr(sys.modules["segkern.cli.quantize"], "run_quantize", lost)
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "float32 file" in shown.out
    assert "miou falls by 0.5" in shown.err
    assert not out.exists()
