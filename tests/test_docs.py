"""The docs: python blocks of the pages run, and every public name is documented."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import transformers

import segkern
from support import pages

ROOT = Path(__file__).parent.parent
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    if pages.blocks(page)
}
# what a page takes as given
IDS = np.ones((480, 640), np.uint8)
BATCH = {"pixel_values": torch.rand(1, 3, 64, 64)}
MASKS = {"masks": [torch.ones(1, 64, 64)], "labels": [torch.tensor([1])]}
GIVEN = {
    "docs/maskformer.md": BATCH | MASKS,
    "docs/segformer.md": BATCH | {"labels": torch.zeros(1, 64, 64, dtype=torch.int64)},
    "docs/oneformer.md": BATCH | MASKS | {"task_inputs": "panoptic", "text_inputs": None},
    "docs/processors.md": {
        "image": np.zeros((480, 640, 3), np.uint8),
        "other": np.zeros((427, 640, 3), np.uint8),
        "ids": IDS,
        "more": IDS[:427],
        "labels": {1: 0},
        "names": {1: 2},
    },
    "docs/data.md": {
        "torch_dataset": [(torch.zeros(3, 8, 8), torch.ones(1, 8, 8), torch.tensor([0]))]
    },
}


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_run(name, tmp_path, monkeypatch):
    """One after the other, as a reader would type them, in a folder with what they open."""
    monkeypatch.chdir(tmp_path)
    found = [block for block in pages.blocks(PAGES[name]) if block.runs()]
    assert found
    pages.furnish(tmp_path, [text for block in found for text in block.texts])
    pages.run(PAGES[name], {**GIVEN.get(name, {})})


def test_what_was_saved_goes_back_to_transformers(tmp_path, monkeypatch):
    """As docs/coming_from.md says of the folder that its last block under transformers writes."""
    page = PAGES["docs/coming_from.md"]
    (block,) = (block for block in pages.blocks(page) if "ours" in block.texts)
    monkeypatch.chdir(tmp_path)
    pages.furnish(tmp_path, block.texts)
    block.run({})
    opened, loading = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        "ours", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert opened.config.num_labels == 133


PAGE = """# A page

```python
import detectron2
nothing_here()
```

```bash
nothing here
```

```python
import os

{line}
```
"""
WRONG = {
    "a name that is none": ("nothing()", NameError),
    "an argument that is none": ("os.getcwd(7)", TypeError),
    "a package that is none": ("import detectron3", ModuleNotFoundError),
    "no Python": ("1 +", SyntaxError),
}


@pytest.mark.parametrize(("line", "error"), WRONG.values(), ids=WRONG)
def test_a_wrong_block_is_an_error_of_its_line(line, error, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(line=line))
    with pytest.raises(error) as raised:
        pages.run(page, {})
    if error is SyntaxError:
        assert (raised.value.filename, raised.value.lineno) == (str(page), 15)
    else:
        place = raised.traceback[-1]
        assert (str(place.path), place.lineno + 1) == (str(page), 15)


def test_blocks_of_tools_that_are_elsewhere_are_read_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(line="ran = True"))
    first, second = pages.blocks(page)
    assert (first.line, first.imports, first.runs()) == (4, {"detectron2"}, False)
    names = {}
    second.run(names)
    assert names["ran"]


# --- the reference --------------------------------------------------------------------------


def test_every_public_name_is_documented():
    assert reference.undocumented() == []


def test_what_is_undocumented_is_named(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""A module."""\n\n\nclass B:\n    def c(self): ...\n    def _d(self): ...\n'
    )
    assert reference.undocumented(tmp_path) == ["a.py:4 B", "a.py:5 B.c"]


@pytest.mark.slow
def test_the_reference_is_written_without_a_warning(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "tools/reference.py", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    face = (tmp_path / "segkern.html").read_text()
    for name in segkern.__all__:
        assert f'id="{name}"' in face or f"segkern/{name}.html" in face, name
    for room in reference.ROOMS:
        assert (tmp_path / f"segkern/{room}.html").is_file(), room
