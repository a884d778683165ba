"""The house: one name in five places, imports that only go down, the build and its errors."""

import ast
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import segkern
import segkern.models
from segkern.data import digits
from segkern.data.sample import coco_masks
from segkern.evaluation.semantic import Semantic
from segkern.io import plots
from segkern.ops import _library, point_sample
from support.inputs import point_sample_inputs

ROOT = Path(__file__).parent.parent
OPS = sorted(p.stem for p in (ROOT / "segkern/ops").glob("[!_]*.py"))
# every folder of the package, from the top, and the folders that it may import
FLOORS = {
    "cli": "recipes training deploy evaluation integrations inference models data structures "
    "runtime ops",
    "recipes": "training deploy evaluation inference models data structures runtime io",
    "training": "evaluation models data weights structures runtime io",
    "deploy": "evaluation inference models nn weights structures runtime ops io",
    "evaluation": "inference models nn structures runtime io",
    "integrations": "inference models nn weights structures runtime ops io",
    "inference": "models nn structures runtime ops io",
    "models": "nn weights structures runtime ops io",
    "nn": "weights structures runtime ops",
    "data": "structures io",
    "weights": "",
    "structures": "ops io",
    "runtime": "ops",
    "ops": "kernels",
    "kernels": "",
    "io": "",
}
# what a user imports may take what it offers from any floor
FACE = ("__init__", "__main__", "_moved", "_waiting")


def run(*command, **variables):
    env = os.environ | variables
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("op", OPS)
def test_one_name_in_five_places(op):
    assert hasattr(segkern.ops, op)
    assert hasattr(torch.ops.segkern, op)
    kernel = [] if op in _library.COMPOSED else [f"csrc/cpu/{op}.cpp"]
    for file in (*kernel, f"tests/ops/test_{op}.py", f"bench/bench_{op}.py"):
        assert (ROOT / file).is_file(), f"{op} has no {file}"


def imported(path):
    """The first name below segkern of every import in a file."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = [*base, *(node.module.split(".") if node.module else [])]
            tails = [[a.name] for a in node.names] if full == ["segkern"] else [[]]
            names = [full + tail for tail in tails]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
        else:
            continue
        yield from (n[1] for n in names if n[0] == "segkern" and len(n) > 1)


def room(path):
    """The folder of segkern/ that a file is in, or its own name if it is in none."""
    return path.relative_to(ROOT / "segkern").parts[0].removesuffix(".py")


SOURCES = sorted((ROOT / "segkern").rglob("*.py"))


def test_every_folder_has_a_floor():
    assert {room(path) for path in SOURCES} == {*FLOORS, *FACE}
    rooms = list(FLOORS)
    for name, below in FLOORS.items():
        for other in below.split():
            assert rooms.index(other) > rooms.index(name), f"{other} is not below {name}"
    for path in SOURCES:
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} would not be packed"


def test_tests_mirror_the_folders():
    folders = {p.parent.relative_to(ROOT / "tests") for p in (ROOT / "tests").rglob("test_*.py")}
    packages = {p.parent.relative_to(ROOT / "segkern") for p in SOURCES}
    others = {Path("bench"), Path("gpu")}  # benchmarks and tools; what only a GPU can test
    assert folders - packages == others


@pytest.mark.parametrize(
    "path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "segkern")).removesuffix(".py")
)
def test_imports_only_go_down(path):
    if room(path) in FACE:
        return
    for name in imported(path):
        if name in FLOORS:
            known = [room(path), *FLOORS[room(path)].split()]
            assert name in known, f"{path} imports {name}"


NAMES_MODELS = ("models", "recipes", "integrations", "cli", "__init__", "_moved")


@pytest.mark.parametrize("path", [p for p in SOURCES if room(p) not in NAMES_MODELS], ids=str)
def test_no_other_room_names_a_model(path):
    """Not in code: no class or module of a model, and no kind as a string."""
    tree = ast.parse(path.read_text())
    texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        named = [getattr(node, field, None) for field in ("id", "attr", "name", "module")]
        if isinstance(node, ast.Constant) and id(node) not in texts:
            named.append(node.value)
        for name in named:
            for kind in segkern.models.MODELS:
                text = name.lower() if isinstance(name, str) else ""
                assert kind not in text, f"{path}:{node.lineno} names {name}"


@pytest.mark.parametrize("old", segkern._moved.HOME)
def test_old_names_of_modules_name_the_new_one(old):
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module(f"segkern.{old}")
    message = str(raised.value)
    assert message.startswith(f"segkern.{old} is ")
    for name in re.findall(r"segkern((?:\.\w+)+)", message.partition(" is ")[2]):
        *modules, last = name[1:].split(".")
        home = importlib.import_module(".".join(["segkern", *modules]))
        if not hasattr(home, last):
            importlib.import_module(f"segkern{name}")


@pytest.mark.parametrize(("old", "new"), [("CLASSES", "MODELS"), ("kind_of", "`kind`")])
def test_old_names_of_models_name_the_new_one(old, new):
    with pytest.raises(AttributeError, match=f"segkern.models.{old} is now .*{new}"):
        getattr(segkern.models, old)


def test_the_face_offers_what_a_user_expects():
    for name in ("segment", "postprocess", "train", "evaluate", "open_model", "TrainConfig"):
        assert callable(getattr(segkern, name))
        assert name in dir(segkern)
    assert segkern.recipes.digits().model.kind == "mask2former"
    with pytest.raises(AttributeError, match=r"graphs is now segkern\.runtime\.cuda_graphs"):
        _ = segkern.graphs
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = segkern.nothing


@pytest.mark.parametrize("folder", ["segkern", "csrc", "tests", "bench", "tools"])
def test_files_stay_short(folder):
    for path in (ROOT / folder).rglob("*.[pchc]*"):
        if path.suffix in (".py", ".cpp", ".cu", ".h"):
            assert path.read_text().count("\n") <= 450, f"{path} has more than 450 lines"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the clones are x86-64's")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_loops_are_compiled_for_wide_registers():
    library = ROOT / "segkern/_C_cpu.abi3.so"
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True).stdout
    assert code.count("%zmm") > 100
    assert code.count("%ymm") > 100


def test_library_keeps_to_the_stable_abi():
    library = ROOT / "segkern/_C_cpu.abi3.so"
    symbols = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True).stdout
    assert "aoti_torch" in symbols
    assert not re.search(r"\b(_ZNK?2at|_ZNK?3c10|Py[A-Z_])", symbols)


def test_info_says_what_is_loaded():
    info = _library.info()
    assert info["cpu kernels"] == "loaded"
    assert info["cuda kernels"] == "loaded" or info["cuda kernels"].startswith("missing: ")
    assert info["torch"] == torch.__version__.split("+")[0] or info["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("command", "given", "found"),
    [
        ("/usr/bin/segkern", {}, "2000"),
        ("-m", {}, "2000"),  # what it is while `python -m segkern` imports the package
        ("program.py", {}, None),
        ("segkern", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("segkern", {"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_the_command_line_spins_shortly(command, given, found, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command])
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    importlib.reload(segkern._waiting)
    assert os.environ.get("GOMP_SPINCOUNT") == found


def test_python_m_segkern_is_the_command_line(tmp_path):
    told = "import atexit, os; atexit.register(lambda: print(os.environ['GOMP_SPINCOUNT']))"
    (tmp_path / "sitecustomize.py").write_text(told)
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    kept["PYTHONPATH"] = f"{tmp_path}:{kept.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "segkern", "info"]
    result = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    assert result.stdout.split()[-1] == "2000", result.stderr


def test_a_device_without_kernels_is_an_error_not_a_fallback(monkeypatch):
    features, points = (t.to("meta") for t in point_sample_inputs())
    assert point_sample(features, points).shape == (2, 3, 50)  # shapes only: the fake
    monkeypatch.setitem(_library.MISSING, "meta", "not built")
    message = r"no kernel for device 'meta': not built; .*SEGKERN_NO_BUILD=1.*impl='reference'"
    with pytest.raises(NotImplementedError, match=message):
        point_sample(features, points)


def test_kernels_that_were_not_built_come_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "PACKAGE", tmp_path)
    monkeypatch.setattr(_library, "BUILD", {"no_cuda": "no CUDA source"})
    missing = _library._load()
    assert missing["cpu"] == "_C_cpu.abi3.so was not built (run `make` or `pip install .`)"
    assert missing["cuda"] == "no CUDA source"


EXTRAS = [  # module, package, call
    ("sklearn.datasets", "scikit-learn", lambda: digits.digit_images.__wrapped__("val")),
    ("matplotlib.figure", "matplotlib", lambda: plots._figure(1, 1)),
    ("torchmetrics.classification", "torchmetrics", lambda: Semantic(2, ())),
    ("pycocotools", "pycocotools", coco_masks),
]


@pytest.mark.parametrize(("module", "package", "call"), EXTRAS, ids=[e[1] for e in EXTRAS])
def test_missing_packages_come_with_the_remedy(module, package, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install {package} \(or .* '\.\[train\]'"):
        call()


def test_build_without_a_compiler_says_what_to_do():
    result = run(sys.executable, "setup.py", "build_ext", CXX="no-such-compiler")
    assert result.returncode != 0
    for word in ("No C++ compiler", "no-such-compiler", "SEGKERN_NO_BUILD=1"):
        assert word in result.stderr


def test_build_without_torch_says_what_to_do(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not here')\n")
    result = run(sys.executable, "setup.py", "build_ext", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    for word in (
        "torch or pybind11 cannot be imported",
        "--no-build-isolation",
        "SEGKERN_NO_BUILD=1",
    ):
        assert word in result.stderr


PURE = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import segkern, torch
from segkern.ops import _library
assert segkern.__file__.startswith({folder!r}), segkern.__file__
print([str(w.message) for w in seen if "pure-Python" in str(w.message)])
print(segkern.ops.point_sample(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2), 0.5)).item())
print(_library.info()["cpu kernels"])
print(_library.info()["cuda kernels"])
"""


def test_pure_python_install_runs_the_reference_and_says_so_once(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "build"]
    built = run(*command, "--build-lib", tmp_path / "lib", SEGKERN_NO_BUILD="1")
    assert built.returncode == 0, built.stderr
    folder = str(tmp_path / "lib")
    assert json.loads((tmp_path / "lib/segkern/_build_info.json").read_text())["pure"]
    script = PURE.format(folder=folder)
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": folder},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    warnings, value, *kernels = result.stdout.splitlines()
    assert warnings.count("the slow reference runs") == 1
    assert float(value) == 1.0
    assert kernels == ["missing: pure-Python install (SEGKERN_NO_BUILD=1)"] * 2
