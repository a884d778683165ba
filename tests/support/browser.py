"""A page in a real browser: the Chromium, with fonts and libraries, that kaleido 0.2 carries.

kaleido hands figures to Plotly in that browser; in Plotly's place stands the script below. It
opens the page in a frame, runs what is asked in it, and has the browser draw the whole frame.
"""

import base64
import io
import json
import os
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import kaleido
import numpy as np
from PIL import Image

_SCRIPT = """
window.Plotly = { version: "2.0.0", toImage: async ({ data: [given] }) => {
  const { html, address, code, width } = given;
  const loaded = (part, name, source) => new Promise((resolve, reject) => {
    part.onload = resolve;  // of a page, when its pictures are there, too
    part.onerror = reject;
    part[name] = source;
  });
  const frame = document.createElement("iframe");
  frame.style = `border: 0; width: ${width}px; height: 900px`;
  document.body.append(frame);
  await loaded(frame, address ? "src" : "srcdoc", address || html);
  const page = frame.contentWindow, root = frame.contentDocument.documentElement;
  // a page from a server may forbid eval
  const found = await (address ? new Function("window", "document", code)(page, page.document)
    : page.eval(code));
  const height = root.scrollHeight;
  for (const canvas of root.querySelectorAll("canvas")) {  // the text of a page has no pixels
    const image = page.document.createElement("img");
    await loaded(image, "src", canvas.toDataURL());
    for (const { name, value } of canvas.attributes) image.setAttribute(name, value);
    canvas.replaceWith(image);
  }
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}">
    <foreignObject width="100%" height="100%">${new XMLSerializer().serializeToString(root)}
    </foreignObject></svg>`;
  const drawn = new Image(), canvas = document.createElement("canvas");
  await loaded(drawn, "src", "data:image/svg+xml;charset=utf-8," + encodeURIComponent(svg));
  canvas.width = width;
  canvas.height = height;
  const brush = canvas.getContext("2d");
  brush.fillStyle = "white";
  brush.fillRect(0, 0, width, height);
  brush.drawImage(drawn, 0, 0);
  const shot = canvas.toDataURL("image/png").split(",")[1];
  return "data:," + encodeURIComponent(JSON.stringify({ found, shot }));
} };
"""


class Seen(NamedTuple):
    """What a browser made of a page."""

    found: object  # what the code gave, as JSON
    shot: np.ndarray  # [H, W, 3] uint8, the whole page


def look(page: str, code: str, folder: Path, width: int = 1200, dark: bool = False) -> Seen:
    """Opens a page and looks at it.

    Args:
        page: HTML, or the address (http://) of a page that lets itself be framed.
        code: JavaScript, run in the page when its pictures are there; gives what JSON can hold.
            For an address the body of a function of `window` and `document`, which may return a
            promise.
        folder: to write to.
        width: of the window, pixels.
        dark: whether the user prefers dark pages.
    """
    script = folder / "script.js"
    script.write_text(_SCRIPT)
    kind = "address" if page.startswith("http://") else "html"
    order = {"data": [{kind: page, "code": code, "width": width}], "layout": {}}
    order = {"data": order, "format": "png", "width": width, "height": 900, "scale": 1}
    command = [
        Path(kaleido.__file__).parent / "executable" / "kaleido",
        "plotly",
        f"--plotlyjs='{script.as_uri()}'",
        *("--no-sandbox", "--disable-gpu", "--disable-breakpad", "--disable-dev-shm-usage"),
        "--allow-file-access-from-files",
        *("--disable-web-security", "--disable-site-isolation-trials"),  # to look into the frame
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    browser = _started(command)
    try:
        browser.stdin.write(json.dumps(order).encode() + b"\n")
        browser.stdin.flush()
        answer = json.loads(browser.stdout.readline())
    finally:
        _stop(browser)
    assert answer["code"] == 0, answer
    seen = json.loads(unquote(answer["result"].removeprefix("data:,")))
    shot = Image.open(io.BytesIO(base64.b64decode(seen["shot"]))).convert("RGB")
    return Seen(seen["found"], np.asarray(shot))


def _started(command: list, tries: int = 8, seconds: int = 8) -> subprocess.Popen:
    """A browser that has said that it listens: where the machine is busy, kaleido now and then
    misses that its own page was loaded, and waits for ever."""
    pipe = subprocess.PIPE
    for _ in range(tries):
        browser = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
        if select.select([browser.stdout], [], [], seconds)[0] and browser.stdout.readline():
            return browser
        _stop(browser)
    raise TimeoutError(f"the browser did not start in {tries} times {seconds} s")


def _stop(browser: subprocess.Popen) -> None:
    """Ends it and its processes."""
    with suppress(ProcessLookupError):
        os.killpg(browser.pid, signal.SIGKILL)
    browser.communicate()
