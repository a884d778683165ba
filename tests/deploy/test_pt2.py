"""Files of .pt2: the kernels are in them, and processes without segkern's Python run them."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import segkern
from segkern.deploy import aot
from segkern.deploy.graph import Graph, run
from segkern.deploy.load import LIBRARY, Loaded, load
from segkern.ops import _library
from support.small_models import (
    convolutions,
    levels,
    pixels,
    pyramid,
    queries,
    sequence,
    tasks,
    tokens,
)

ROOT = Path(__file__).parent.parent.parent
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
MODELS = {
    "Mask2Former": queries,
    "MaskFormer": pyramid,
    "OneFormer": tasks,
    "Segmenter": pixels,
    "SegFormer": levels,
    "Seq2Seg": lambda: sequence(head="instance"),
    "U-Net": convolutions,
    "EoMT": tokens,
}
ALONE = """
import sys, torch
sys.modules["segkern"] = None  # an import would raise
kind, path, library = sys.argv[1:]
torch.ops.load_library(library)
if kind == "program":
    model = torch.export.load(path).module(check_guards=False)
else:
    model = torch._inductor.aoti_load_package(path)
with torch.no_grad():
    torch.save([model(x) for x in torch.load(path + ".inputs")], path + ".results")
"""


def graph_of(build):
    torch.manual_seed(0)
    return Graph(build().eval())


def in_another_process(kind, path, inputs):
    """What a process without segkern's Python gets of a file, for each input."""
    torch.save(inputs, f"{path}.inputs")
    command = [sys.executable, "-c", ALONE, kind, path, path.with_name(LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(f"{path}.results")


def assert_same(have, want, bound):
    """To `bound` of the largest magnitude, at least 1."""
    for a, (name, b) in zip(have, want.items(), strict=True):
        atol = bound * max(1.0, b.abs().max().item())
        assert a.shape == b.shape
        assert (a - b).abs().max().item() <= atol, name


class Called(TorchDispatchMode):
    """Keeps the names of segkern's ops that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "segkern":
            self.names.add(op._opname)
        return op(*args, **(kwargs or {}))


def called(graph, pixel_values):
    with Called() as seen:
        run(graph, pixel_values)
    return seen.names


def held(program):
    """Names of segkern's ops in a graph, and in what is nested in it."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = (str(node.target) for m in graphs for node in m.graph.nodes)
    return {name.split(".")[1] for name in names if name.startswith("segkern.")}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A small file with the kernels in it, and its model."""
    graph, path = graph_of(pixels), tmp_path_factory.mktemp("program") / "model.pt2"
    segkern.export(graph.model, path, size=(32, 32), dynamic=False, program=True)
    return path, graph


def test_the_kernels_are_in_a_file_and_run_without_segkern(program):
    path, graph = program
    x = torch.randn(1, 3, 32, 32)
    # few rows are multiplied by MKL on Intel
    assert called(graph, x) - {"linear"} == {"attention", "feed_forward"}
    assert held(torch.export.load(path)) == {"attention", "linear"}
    (have,) = in_another_process("program", path, [x])
    assert_same(have, run(graph, x), 1e-5)
    loaded = load(path)
    assert_same(loaded(x).values(), run(graph, x), 1e-5)
    wide = torch.randn(1, 32, 32, 3).permute(0, 3, 1, 2)  # as arrays of pictures lie
    assert_same(loaded(wide).values(), run(graph, wide), 1e-5)
    for wrong, got in (
        (x.repeat(2, 1, 1, 1), "[2, 3, 32, 32] float32"),
        (x.repeat(1, 1, 2, 1), "[1, 3, 64, 32] float32"),
        (x[:, :2], "[1, 2, 32, 32] float32"),
        (x[0], "[3, 32, 32] float32"),
        (x.double(), "[1, 3, 32, 32] float64"),
    ):
        rule = "[1, 3, 32, 32] float32, h and w multiples of 16, got "
        with pytest.raises(ValueError, match=re.escape(rule + got)):
            loaded(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dynamic",
    [pytest.param(False, id="fixed", marks=pytest.mark.long), pytest.param(True, id="dynamic")],
)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("OneFormer", "Segmenter") else pytest.mark.long)
        for kind in MODELS
    ],
)
def test_a_program_runs_without_segkern(kind, dynamic, tmp_path):
    graph, path = graph_of(MODELS[kind]), tmp_path / "model.pt2"
    size, sizes = (96, 64), [(1, 96, 64)]
    if kind == "EoMT":
        size, sizes = (32, 32), [(1, 32, 32)]
    if dynamic:
        sides = [(64, 96), size] if kind != "EoMT" else [size, size]
        sizes += [(2, *sides[0]), (3, *sides[1])]
    if dynamic and kind == "Segmenter":
        sizes += [(1, 32, 32)]  # for which its positions are stored
    made = segkern.export(graph.model, path, size=size, dynamic=dynamic, program=True, bound=1e-5)
    assert (made.batch, made.size) == (
        None if dynamic else 1,
        None if dynamic and kind != "EoMT" else size,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [LIBRARY, "model.pt2"]
    inputs = [torch.randn(b, 3, *side) for b, *side in sizes]
    wanted = [run(graph, x) for x in inputs]
    for have, want in zip(in_another_process("program", path, inputs), wanted, strict=True):
        assert_same(have, want, 1e-5)
    opened = load(path)
    assert opened.about["kind"] == graph.model.config.kind
    assert_same(opened(inputs[-1]).values(), wanted[-1], 1e-5)

    ops = held(torch.export.load(path))
    assert ops >= called(graph, inputs[-1]) - _library.COMPOSED.keys()
    assert not ops & _library.COMPOSED.keys()
    assert ops or kind == "U-Net"  # whose layers on a CPU are PyTorch's


@pytest.fixture(scope="session")
def example(tmp_path_factory):
    """The example in C++, built as docs/deploy_cpp.md says."""
    lines = (ROOT / "docs/deploy_cpp.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "TORCH=$(" in line)
    command = "\n".join(line.strip() for line in lines[first : first + 3])
    out = tmp_path_factory.mktemp("cpp") / "segment"
    for old, new in {
        "python -c": f"{sys.executable} -c",
        "examples/": f"{ROOT}/examples/",
        "-o segment": f"-o {out}",
    }.items():
        assert old in command
        command = command.replace(old, new)
    done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


PACKAGES = {  # model, dynamic, pictures of which numbers and sides, kernels that are in the file
    "Mask2Former, Swin": (
        lambda: queries(backbone="swin_tiny", backbone_options=SWIN, size_divisor=32),
        "batch",
        [(1, 64, 64), (2, 64, 64), (3, 64, 64)],
        ("window_attn", "ms_deform_attn", "mask_bits", "masked_attn", "group_norm", "linear"),
    ),
    "SegFormer": (
        levels,
        True,
        [(1, 64, 64), (2, 96, 64), (3, 64, 128)],
        ("attention", "linear", "dwconv3x3_gelu", "resize_sum"),
    ),
    "Segmenter": (pixels, True, [(1, 64, 64), (2, 96, 64), (3, 64, 128)], ("attention",)),
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", PACKAGES)
def test_a_package_runs_from_python_and_from_c(kind, example, tmp_path):
    build, dynamic, sizes, kernels = PACKAGES[kind]
    graph, path = graph_of(build), tmp_path / "model.pt2"
    segkern.export(graph.model, path, size=(64, 64), dynamic=dynamic, bound=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [LIBRARY, "model.pt2"]

    with zipfile.ZipFile(path) as file:
        code = b"".join(file.read(n) for n in file.namelist() if n.endswith((".cpp", ".json")))
    for kernel in kernels:
        assert f"segkern::{kernel}".encode() in code

    inputs = [torch.randn(b, 3, *side) for b, *side in sizes]
    for have, x in zip(in_another_process("package", path, inputs), inputs, strict=True):
        assert_same(have, run(graph, x), 1e-4)
    assert_same(load(path)(inputs[0]).values(), run(graph, inputs[0]), 1e-4)

    picture = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    (tmp_path / "picture.ppm").write_bytes(b"P6\n50 60\n255\n" + picture.tobytes())
    # as the page says, in the folder of the files
    command = [example, f"./{LIBRARY}", "model.pt2", "picture.ppm", "results.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    takes = graph.model.config.input
    x = torch.from_numpy(picture).permute(2, 0, 1) / 255
    mean, std, padding = (
        torch.tensor(v)[:, None, None] for v in (takes.mean, takes.std, takes.padding)
    )
    padded = padding.repeat(1, *takes.padded((60, 50)))
    padded[:, :60, :50] = (x - mean) / std
    want = run(graph, padded[None])
    assert_same(torch.load(tmp_path / "results.pt"), want, 1e-4)
    assert printed(done.stdout) == pytest.approx(shares(want, padded.shape[1:]), abs=1e-4)


def printed(text):
    rows = (line.removeprefix("class ").split(": ") for line in text.splitlines())
    return {int(label): float(share) for label, share in rows}


def shares(results, size):
    """Of each class in a picture of 60 x 50 pixels, at the size of the model's own maps."""
    first, *masks = (t[0] for t in results.values())
    if masks:
        scores = torch.einsum("qk,qmn->kmn", first.softmax(1)[:, :-1], masks[0].sigmoid())
    else:
        scores = first
    labels = scores.argmax(0)
    m, n = (-(-side * have // whole) for side, have, whole in zip((60, 50), labels.shape, size))
    counts = labels[:m, :n].flatten().bincount()
    return {k: c.item() / (m * n) for k, c in enumerate(counts) if c}


@pytest.mark.slow
@pytest.mark.long
def test_the_example_says_what_is_wrong(example, tmp_path):
    none = tmp_path / "nothing.so"
    kernels = _library.PACKAGE / "_C_cpu.abi3.so"
    for arguments, message in (
        ((), "usage: segment"),
        ((none, "model.pt2", "picture.ppm"), "no kernels: .*nothing.so: cannot open"),
        ((kernels, tmp_path / "model.pt2", "picture.ppm"), "model.pt2"),
    ):
        done = subprocess.run([example, *arguments], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("segment: ")
        assert re.search(message, done.stderr)


WITHOUT = """
import sys, warnings, torch
from segkern.deploy.load import load
from segkern.ops import _library
assert "was not built" in _library.MISSING["cpu"]
try:
    print(list(load(sys.argv[1])(torch.zeros(1, 3, 32, 32))))
except FileNotFoundError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_file_without_its_library_says_so(program, tmp_path):
    """In a segkern that has no kernels; with the library beside it the file runs there, too."""
    path, _ = program
    package = tmp_path / "lib/segkern"
    package.mkdir(parents=True)
    for entry in (ROOT / "segkern").iterdir():
        if entry.suffix != ".so" and entry.name not in ("_build_info.json", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    moved = Path(shutil.copy(path, tmp_path))
    env = os.environ | {"PYTHONPATH": str(package.parent)}

    def lines():
        command = [sys.executable, "-c", WITHOUT, moved]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"{LIBRARY} must lie beside it" in lines()
    shutil.copy(path.with_name(LIBRARY), tmp_path)
    assert lines() == "['logits']\n"


def test_a_file_that_differs_is_not_written(program, tmp_path, monkeypatch):
    _, graph = program

    def wrong(path):
        assert path.is_file()
        return Loaded({}, lambda x: [t + 0.1 for t in run(graph, x).values()])

    (tmp_path / "model.pt2").write_bytes(b"of before")
    monkeypatch.setattr(aot, "load", wrong)
    with pytest.raises(ValueError, match=r"must equal the model to 0.001, but logits differs by"):
        segkern.export(
            graph.model, tmp_path / "model.pt2", size=(32, 32), dynamic=False, program=True
        )
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"of before"


def test_bad_files_and_arguments(program, tmp_path, monkeypatch):
    written, graph = program
    message = r"h and w multiples of 16, got \[1, 3, 32, 30\]"
    with pytest.raises(ValueError, match=message):
        load(written)(torch.zeros(1, 3, 32, 30))
    with pytest.raises(FileNotFoundError, match=r"load: no file .*none.pt2"):
        load(tmp_path / "none.pt2")
    text = tmp_path / "text.pt2"
    text.write_text("no archive")
    with pytest.raises(ValueError, match=r"load: path must be a .pt2 file, .*text.pt2 is none"):
        load(text)
    with zipfile.ZipFile(text, "w") as file:
        file.writestr("other/thing", "")
    with pytest.raises(ValueError, match="holds neither compiled code nor a program"):
        load(text)
    with pytest.raises(ValueError, match=r"program is for \.pt2 files, got .*model.onnx"):
        segkern.export(graph.model, tmp_path / "model.onnx", program=True)
    monkeypatch.setitem(_library.MISSING, "cpu", "it was not built")
    with pytest.raises(ImportError, match="holds segkern's kernels, but it was not built"):
        segkern.export(graph.model, tmp_path / "model.pt2", size=(32, 32), dynamic=False)
