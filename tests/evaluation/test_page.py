"""The report of an evaluation: by its text, and in a real browser."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from segkern.evaluation import page
from segkern.evaluation.evaluate import WORST, evaluate
from segkern.evaluation.page import write_page
from support.models import Squares, half_bright

ODD = 'sq<u>are & "co"</script>, ünïcode'


class Halves:
    """Pictures whose left part is bright, and truths that lie from quite right to quite wrong."""

    classes = ("ground", ODD)
    stuff = (0,)

    def __len__(self):
        return 12

    def __getitem__(self, i):
        image = half_bright(40, 60)
        semantic = np.zeros((40, 60), np.uint8)
        semantic[:, 4 * i : 30] = 1
        masks = np.stack((semantic == 0, semantic == 1)).astype(np.uint8)
        found = {"image": image, "masks": masks, "labels": np.array([0, 1]), "id": i}
        return found | {"semantic": semantic, "path": f"/data/<{i}>.png"}


def test_a_loader_and_names_with_dollars(tmp_path):
    class Dollars(Halves):
        classes = ("$x_$", "cost $5-$9")

    data = Dollars()
    value = evaluate(Squares(), data, ("semantic",), progress=False)
    write_page(tmp_path / "a#1.html", value, Squares(), DataLoader(data, collate_fn=list), "a")
    assert 'href="a%231.' in (tmp_path / "a#1.html").read_text()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_of_many_channels_three_are_drawn(channels):
    sample = {"image": np.zeros((8, 9, channels), np.uint8)}
    assert page._picture(sample, Squares(), (4, 5)).shape == (4, 5, 3)


TASKS = {
    "panoptic": ("panoptic", "instance", "semantic"),
    "instance": ("instance",),
    "semantic": ("semantic",),
}


SHOWN = {
    "panoptic": ("confusion", "pixel_confusion"),
    "instance": ("instance_confusion",),
    "semantic": ("pixel_confusion",),
}


@pytest.fixture(scope="module", params=TASKS.values(), ids=TASKS)
def report(request, tmp_path_factory):
    """(value, page, folder)."""
    folder = tmp_path_factory.mktemp("report")
    model, data, tasks = Squares(), Halves(), request.param
    value = evaluate(model, data, tasks, out=folder / "metrics.json", progress=False)
    steps = range(0, 40, 10)
    lines = [
        {"step": i, "loss": 9.0 - i / 9, "lr": 1e-4, "metrics": {"pq": i / 99}} for i in steps
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {"data": {"root": "/data/<own>"}, "training": {"model": {"queries": 8}}}
    more = {"log": folder / "log.jsonl", "settings": settings}
    files = write_page(folder / "metrics.html", value, model, data, f"run on {ODD}", **more)
    assert all(file.is_file() for file in files)
    assert {*files} == {*folder.iterdir()} - {folder / "metrics.json", folder / "log.jsonl"}
    return value, files[0].read_text(encoding="utf-8"), folder


class Page(HTMLParser):
    """Tags that close what they open; pictures, sections, and tables as rows of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.sections = [], [], [], []
        self.rows, self.text = [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag == "section":
            self.sections.append(attributes["id"])
        if tag == "tr" and "details" not in self.open:
            self.rows.append([])
        if tag == "td" and "details" not in self.open:
            self.rows[-1].append(attributes["data-value"])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] not in ("style", "script") else ""


def test_page_is_well_formed_and_stands_alone(report):
    value, text, _ = report
    page = Page(text)
    assert f"run on {ODD}" in page.text
    assert "/data/<own>" in page.text
    assert "model.queries" in page.text
    elsewhere = [link for link in page.links if not link.startswith("data:image/")]
    assert all(link.endswith(".csv") and "/" not in link for link in elsewhere)
    assert not re.search(r"https?://|@import|url\(", text)
    want = ["figures", "classes", "confusion", "thresholds", "curves", "worst", "settings"]
    if "panoptic" not in value["tasks"]:
        want = [x for x in want if x != "thresholds" or "instance" in value["tasks"]]
    assert page.sections == want


def test_every_picture_decodes(report):
    value, text, _ = report
    images = Page(text).images
    for image in images:
        code = image["src"].partition("base64,")[2]
        picture = Image.open(io.BytesIO(base64.b64decode(code, validate=True)))
        picture.load()
        assert min(picture.size) > 100
        assert image["alt"]
    drawn = len({*SHOWN[value["tasks"][0]], "thresholds"} & value.keys()) + 1
    assert len(images) == drawn + 3 * len(value["worst"])


COLUMNS = {
    "pq sq rq": "panoptic",
    "ap ap50 boundary_ap mask_f1 best_threshold": "instance",
    "iou f1 pixel_accuracy": "semantic",
    "class_accuracy dice instances": "panoptic",
}
ALL = {"iou": "miou", "pixel_accuracy": "mean_accuracy"}


def test_the_table_has_the_figures_of_the_json(report):
    value, text, folder = report
    assert json.loads((folder / "metrics.json").read_text()) == value
    keys = [k for keys, task in COLUMNS.items() if task in value["tasks"] for k in keys.split()]
    head, *rows, foot = Page(text).rows
    assert head == []
    rows = {name: [json.loads(x or "null") for x in cells] for name, *cells in rows}
    assert rows == {row["name"]: [row[k] for k in keys] for row in value["classes"]}
    assert [json.loads(x or "null") for x in foot[1:]] == [value[ALL.get(k, k)] for k in keys]


def test_worst_images_are_named_in_their_order(report):
    value, text, _ = report
    assert len(value["worst"]) == WORST
    scores = [row["score"] for row in value["worst"]]
    assert scores == sorted(scores)
    assert scores[0] < 0.9
    shown = re.findall(r"<b>([0-9.]+)</b> (\S+)</figcaption>", text)
    assert shown == [
        (f"{row['score']:.3f}", f"&lt;{row['image']}&gt;.png") for row in value["worst"]
    ]


@pytest.mark.parametrize("key", ["confusion", "instance_confusion", "pixel_confusion"])
def test_confusion_is_in_a_file(report, key):
    value, _, folder = report
    path = folder / f"metrics.{key}.csv"
    assert path.is_file() == (key in SHOWN[value["tasks"][0]])
    if path.is_file():
        (_, *names), *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
        assert [[int(x) for x in row[1:]] for row in rows] == value[key]
        assert [row[0] for row in rows] == names
        assert names[:2] == ["ground", ODD]


def test_page_is_whole_or_not_there(report, tmp_path, monkeypatch):
    value, *_ = report

    def broken(*args):
        raise RuntimeError("cable pulled")

    monkeypatch.setattr("segkern.evaluation.page.overlay", broken)
    with pytest.raises(RuntimeError, match="cable pulled"):
        write_page(tmp_path / "metrics.html", value, Squares(), Halves(), "run")
    assert not (tmp_path / "metrics.html").exists()


LOOK = """
(() => {
  const table = document.querySelector("table.sortable"), rect = x => {
    const { left, top, width, height } = x.getBoundingClientRect();
    return [left, top, width, height].map(Math.round);
  };
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[1].dataset.value);
  const cells = [...table.rows].map(row => [...row.cells].map(cell => cell.innerText));
  const before = column();
  table.tHead.rows[0].cells[1].querySelector("button").click();
  const down = column();
  table.tHead.rows[0].cells[1].querySelector("button").click();
  return {
    before, down, up: column(), table: rect(table),
    images: [...document.images].map(x => [x.naturalWidth, x.naturalHeight, ...rect(x)]),
    cells,
    tiles: document.querySelectorAll("#figures dd").length,
    wide: document.documentElement.scrollWidth > innerWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
  };
})()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (420, True)], ids=["screen", "dark"])
def test_a_browser_shows_table_and_pictures(report, tmp_path, width, dark):
    from support.browser import look

    _, text, _ = report
    seen, shot = look(text, LOOK, tmp_path, width, dark)
    assert seen["dark"] == dark
    assert not seen["wide"]
    assert seen["tiles"] == text.count("<dt>")
    assert [row[0] for row in seen["cells"]] == ["class", *Halves.classes, "all"]
    assert seen["cells"][2][1] == f"{float(seen['before'][1]):.3f}"
    values = [x for x in seen["before"] if x]
    assert [x for x in seen["down"] if x] == sorted(values, key=float, reverse=True)
    assert [x for x in seen["up"] if x] == sorted(values, key=float)

    paper = shot[:8].reshape(-1, 3)
    assert (paper.max() < 50) if dark else (paper.min() > 240)
    for *natural, left, top, w, h in seen["images"]:
        assert min(natural) > 100
        assert w > 80
        part = shot[top : top + h, left : left + w].astype(float)
        assert part.std() > 5, "no picture is seen there"
    left, top, w, h = seen["table"]
    part = shot[top : top + h, left : min(left + w, width)].astype(float)
    assert part.std() > 5, "no table is seen there"
    assert len(np.unique(part.reshape(-1, 3), axis=0)) > 20  # letters with soft edges
