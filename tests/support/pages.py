"""The python blocks of a page, and small stand-ins for what they open: models, pictures, data."""

import ast
import re
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image

from segkern.models import MODELS, Segmenter, SegmenterConfig, build_model
from segkern.models.segmenter import original
from support.own_pictures import write_shapes

_FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PICTURES = (".jpg", ".png")
# packages that pages show, and that may be missing here: their blocks are then read, not run
ELSEWHERE = ("cv2", "detectron2", "mask2former", "mmseg", "segm", "ultralytics")
_SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}


class Block(NamedTuple):
    """A block of a page.

    Attributes:
        page: the file.
        line: of the page, on which its first line stands.
        tree: its code, whose lines are the page's.
    """

    page: Path
    line: int
    tree: ast.Module

    @property
    def imports(self) -> set[str]:
        """The packages that it imports."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
        return found

    @property
    def texts(self) -> list[str]:
        """The strings in it."""
        nodes = ast.walk(self.tree)
        return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]

    def runs(self) -> bool:
        """Whether all that it imports may be expected here."""
        return not any(name in ELSEWHERE and find_spec(name) is None for name in self.imports)

    def run(self, names: dict) -> None:
        """Runs it.

        Args:
            names: what it finds, and what it leaves for the next.
        """
        exec(compile(self.tree, str(self.page), "exec"), names)


def blocks(page: Path) -> list[Block]:
    """The python blocks of a page, in their order.

    Raises:
        SyntaxError: one is no Python.
    """
    text, found = page.read_text(), []
    for match in _FENCE.finditer(text):
        above = text.count("\n", 0, match.start(1))
        found.append(Block(page, above + 1, ast.parse("\n" * above + match[1], str(page))))
    return found


def run(page: Path, names: dict) -> None:
    """Runs the blocks of a page that may be run here, one after the other, in this folder."""
    for block in blocks(page):
        if block.runs():
            block.run(names)


def furnish(folder: Path, texts: list[str]) -> None:
    """Makes what strings in blocks name, below a folder: pictures, checkpoints by the kind that is
    in the name of one on the hub ("owner/name"), and a data set for "own"."""
    for text in texts:
        path = folder / text
        if "\n" in text or "://" in text or path.exists():
            continue
        if path.suffix in _PICTURES:
            _picture(path)
        elif path.name == "checkpoint.pth":
            _segmenter(path)
        elif path.suffix == ".pkl":
            build_model(small("mask2former")).save_original(path)
        elif text == "own":
            write_shapes(path, "instance")
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", text) and (kind := _kind(text)):
            build_model(small(kind)).save_pretrained(path)


def small(kind: str):
    """The config of a small model that the tools of its format open, too."""
    config = MODELS[kind].config.tiny(133)
    if getattr(config, "backbone", None) != "resnet_digits":
        return config
    return replace(config, backbone="swin_tiny", backbone_options=_SWIN, size_divisor=32)


def _kind(name: str) -> str | None:
    return next((kind for kind in MODELS if kind in name.lower()), None)


def _segmenter(path: Path) -> None:
    """A checkpoint of Segmenter's code, with variant.yml beside it."""
    sides = {"image_size": (32, 32), "window_size": 32, "window_stride": 32, "shortest_edge": 64}
    config = SegmenterConfig(num_labels=3, embed_dim=64, depth=1, num_heads=1, **sides)
    path.parent.mkdir(parents=True)
    torch.save({"model": Segmenter(config).state_dict()}, path)
    (path.parent / "variant.yml").write_text(yaml.safe_dump(original.to_variant(asdict(config))))


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiles = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(tiles.repeat(16, 0).repeat(16, 1)).save(path)
