"""The page of `segkern serve` in a real browser: a picture is dropped on it, and its segments are
drawn, listed, named and hidden."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from segkern.io import rle
from segkern.io.overlay import colour
from support.browser import look
from support.models import Squares, half_bright
from support.serving import file_of, in_thread

# three classes of noise
MASKS = np.random.default_rng(0).integers(0, 3, (40, 50)) * (np.arange(50) // 7 % 3 != 1)
SEGMENTS = [{"segmentation": code} for code in rle.encode(MASKS, [0, 1, 2])]
# what the tests' code has at hand
TOOLS = """
const $ = id => document.getElementById(id);
const until = async (test, what) => {
  for (let i = 0; i < 400 && !test(); ++i) await new Promise(r => setTimeout(r, 25));
  if (!test()) throw new Error(`in vain: ${what}; ${document.body.innerText}`);
};
const file = (code, name, type) => {
  const bytes = Uint8Array.from(window.atob(code), c => c.charCodeAt(0));
  return new window.File([bytes], name, { type });
};
const drop = given => {
  const moved = new window.DataTransfer();
  moved.items.add(given);
  for (const kind of ["dragenter", "drop"])
    $("stage").dispatchEvent(new window.DragEvent(kind, { dataTransfer: moved, bubbles: true }));
};
const rows = () => [...$("legend").querySelectorAll("button")];
const legend = () => rows().map(x => x.innerText.split("\\n"));
const listed = () => legend().length > 0 && $("busy").hidden;
const at = (x, y) => {  // of the drawn segments, in shares of the width and height
  const canvas = $("segments"), left = Math.floor(x * canvas.width);
  const top = Math.floor(y * canvas.height);
  return [...canvas.getContext("2d").getImageData(left, top, 1, 1).data];
};
const point = (x, y) => {
  const box = $("segments").getBoundingClientRect();
  const place = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
  $("segments").dispatchEvent(new window.PointerEvent("pointermove", { ...place, bubbles: true }));
  return $("tip").hidden ? null : $("tip").innerText;
};
"""
LOOKS = (
    """return (async () => {
  await until(() => $("tasks").children.length === 3, "tasks");
  const found = { tasks: [...$("tasks").children].map(x => x.innerText.toLowerCase()) };
  found.empty = [$("frame").hidden, $("json").disabled];
  drop(file("%(picture)s", "half.png", "image/png"));
  await until(listed, "segments");
  found.size = [$("segments").width, $("segments").height];
  found.panoptic = [legend(), at(.25, .5), at(.75, .5), $("summary").innerText];
  found.tip = [point(.25, .5), $("legend").querySelector(".lit").innerText, at(.75, .5)];
  $("segments").dispatchEvent(new window.PointerEvent("pointerleave"));
  found.left = [$("tip").hidden, at(.75, .5)];
  $("legend").querySelector("button").click();
  found.off = [at(.25, .5), at(.75, .5), point(.75, .5), point(.25, .5)];
  $("threshold").value = 100;
  $("threshold").dispatchEvent(new window.Event("input"));
  await until(() => !legend().length && $("busy").hidden, "nothing above 100 %%");
  found.none = [$("hint").hidden, $("threshold-value").innerText, at(.25, .5)];
  $("automatic").click();
  await until(listed, "segments again");
  $("tasks").children[2].click();
  window.listed();  // the results that are there are still those of the last task
  found.before = $("summary").innerText;
  await until(() => listed() && $("summary").innerText.includes("label"), "labels");
  found.semantic = [legend(), $("scored").hidden];
  drop(file("%(broken)s", "b.png", "image/png"));
  await until(() => !$("error").hidden, "an error");
  found.error = [$("error").innerText, legend().length];
  drop(file("%(picture)s", "half.png", "image/png"));
  await until(listed, "segments at last");
  // of two pictures, one right after the other, the first takes longer to decode
  const images = window.HTMLImageElement.prototype, decode = images.decode;
  let go, first;
  images.decode = function () {
    images.decode = decode;
    return first = new Promise(done => { go = done; }).then(() => decode.call(this));
  };
  drop(file("%(wide)s", "wide.png", "image/png"));
  drop(file("%(picture)s", "half.png", "image/png"));
  await until(listed, "segments of the second");
  go();
  await first;
  await new Promise(done => setTimeout(done));
  found.second = [$("segments").width, $("segments").height, $("busy").hidden];
  return found;
})();""",
    """return (async () => {
  await until(() => $("tasks").children.length === 3, "tasks");
  $("tasks").children[1].click();
  drop(file("%(picture)s", "half.png", "image/png"));
  await until(listed, "segments");
  const root = document.documentElement, ink = window.getComputedStyle(document.body);
  const mine = [...window.places(%(result)s, 50, 40)];
  const colours = { ink: ink.color, paper: ink.backgroundColor };
  return { mine, instances: legend(), wide: root.scrollWidth, ...colours };
})();""",
)


def framed(app):
    """The application without what keeps its page out of a frame, through which the tests look."""

    async def other(scope, receive, send):
        async def changed(message):
            if message["type"] == "http.response.start":
                headers = [
                    (name, value.replace(b"; frame-ancestors 'none'", b""))
                    for name, value in message["headers"]
                    if name != b"x-frame-options"
                ]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, changed)

    return other


@pytest.fixture(scope="module")
def server():
    with in_thread(Squares, framed) as found:
        yield found


def seen(server, number, folder, **more):
    text = base64.b64encode(file_of(half_bright())).decode()
    wide = base64.b64encode(file_of(half_bright(20, 90))).decode()
    given = {
        "picture": text,
        "wide": wide,
        "broken": base64.b64encode(b"no picture at all").decode(),
    }
    given["result"] = json.dumps({"size": list(MASKS.shape), "segments": SEGMENTS})
    return look(f"{server.url}/", TOOLS + LOOKS[number] % given, folder, **more)


def test_a_dropped_picture_is_segmented(server, tmp_path):
    found, shot = seen(server, 0, tmp_path)
    assert found["tasks"] == ["panoptic", "instance", "semantic"]
    assert found["empty"] == [True, True]
    assert found["size"] == [60, 40]
    rows, bright, dark, summary = found["panoptic"]
    assert rows == [["square", "50 %"], ["ground", "50 %"]] or rows == [
        ["ground", "50 %"],
        ["square", "50 %"],
    ]
    assert summary.startswith("2 segments")
    np.testing.assert_allclose(bright[:3], colour(1), atol=3)  # rounded where it is transparent
    np.testing.assert_allclose(dark[:3], colour(0), atol=3)
    tip, lit, other = found["tip"]
    assert tip.split()[0] == lit.split()[0] == "square"
    assert "50 %" in tip
    assert other[3] < dark[3] / 2  # what is not pointed at steps back
    assert found["left"] == [True, dark]
    hidden = {"square": 0, "ground": 1}[rows[0][0]]
    assert found["off"][hidden][3] == 0
    assert found["off"][1 - hidden][3] > 0
    assert (found["off"][3] is None) == (hidden == 0)
    assert found["before"].startswith("2 segments")
    assert found["second"] == [60, 40, True]
    assert found["none"] == [False, "100 %", [0, 0, 0, 0]]
    assert {row[0] for row in found["semantic"][0]} == {"square", "ground"}
    assert found["semantic"][1] is True
    assert "not a picture that is taken" in found["error"][0]
    assert found["error"][1] == 0
    Image.fromarray(shot).save(tmp_path / "page.png")  # to be looked at
    red, green, blue = shot.astype(int).transpose(2, 0, 1)
    left = red - blue > 90  # colour(1), orange, over white
    right = (blue - red > 60) & (green > red)  # colour(0), blue, over black
    assert min(left.sum(), right.sum()) > 20_000


def test_on_a_phone_in_the_dark(server, tmp_path):
    found, shot = seen(server, 1, tmp_path, width=390, dark=True)
    Image.fromarray(shot).save(tmp_path / "phone.png")
    # the page's own reading of run lengths, the first on top
    whole = rle.decode([s["segmentation"] for s in SEGMENTS[::-1]], [3, 2, 1], MASKS.shape)
    assert found["mine"] == whole.ravel().tolist()
    assert found["instances"] == [["square", "50 %"]]
    assert found["wide"] == 390  # nothing to scroll sideways
    ink, paper = ([int(x) for x in found[k][4:-1].split(",")] for k in ("ink", "paper"))
    assert min(ink) > 200
    assert max(paper) < 40
