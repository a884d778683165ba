"""Pictures from a server on this machine: what is fetched, what is refused and how."""

import base64
import contextlib
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

import segkern
from segkern.io.images import read_pixels
from segkern.io.sources import fetch, open_source
from support.models import Squares, half_bright


def png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


PICTURE = png(half_bright())
STOP = threading.Event()


class Answers(BaseHTTPRequestHandler):
    """An answer for each path."""

    def do_GET(self):
        name = self.path.strip("/").partition("/")[0]
        getattr(self, name.replace("-", "_"), self.missing)()

    def send(self, data, length=None, status=200, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if length is not False:
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def picture(self):
        self.send(PICTURE)

    def unsized(self):
        self.send(PICTURE, length=False)

    def text(self):
        self.send(b"<html>not here</html>")

    def missing(self):
        self.send(b"", status=404)

    def cut(self):
        self.send(PICTURE[:-10], length=len(PICTURE))

    def endless(self):
        self.send(b"", length=False)
        while not STOP.is_set():
            self.wfile.write(b"x" * 4096)

    def drops(self):
        self.send(b"", length=10_000)
        while not STOP.is_set():
            self.wfile.write(b"x")
            time.sleep(0.02)

    def silent(self):
        STOP.wait(10)

    def moved(self):
        self.send(b"", status=302, Location="/picture")

    def to_a_file(self):
        self.send(b"", status=302, Location="file:///etc/hostname")

    def to_ftp(self):
        self.send(b"", status=302, Location="ftp://127.0.0.1/picture")

    def round(self):
        self.send(b"", status=302, Location="/round")

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # the other side has left
            super().handle()


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        STOP.clear()
        running = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        STOP.set()
        running.shutdown()
        running.server_close()


@pytest.mark.parametrize(
    "path", ["picture", "unsized", "moved", "picture/ä ö.png", "picture/%20?a=b&c"]
)
def test_addresses_that_hold_a_picture(server, path):
    image = read_pixels(open_source(f"{server}/{path}"))
    assert np.array_equal(image, half_bright())


def test_the_pipeline_reads_addresses(server):
    run = segkern.pipeline(Squares())
    found = run([f"{server}/picture", half_bright(), f"{server.replace('http', 'HTTP')}/moved"])
    assert [[row["label"] for row in one] for one in found] == [["ground", "square"]] * 3
    with pytest.raises(OSError, match=f"image 1: {server}/nothing cannot be fetched: .*404"):
        run([half_bright(), f"{server}/nothing"])
    with pytest.raises(ValueError, match=r"image: .* must send at most max_bytes = 10 bytes"):
        run(f"{server}/picture", max_bytes=10)


REFUSED = {
    "missing": (OSError, "cannot be fetched: HTTP Error 404"),
    "text": (ValueError, "image: http.*/text: not an image that PIL can read"),
    "cut": (OSError, r"cannot be fetched: it ended after \d+ of \d+"),
    "to-a-file": (OSError, "cannot be fetched: .*302"),
    "to-ftp": (OSError, "cannot be fetched: .*unknown url type: ftp"),
    "round": (OSError, "cannot be fetched: .*302"),
    "silent": (OSError, "cannot be fetched: .*timed out"),
    "drops": (OSError, r"cannot be fetched: \d+ bytes came in 0.2 seconds"),
    "endless": (ValueError, "must send at most max_bytes = 100000 bytes, got more"),
}


@pytest.mark.parametrize(
    ("path", "kind", "message"), [(k, *v) for k, v in REFUSED.items()], ids=REFUSED
)
def test_addresses_that_are_refused(server, path, kind, message):
    start = time.monotonic()
    with pytest.raises(kind, match=message):
        read_pixels(
            open_source(
                f"{server}/{path}",
                timeout=0.2 if path in ("silent", "drops") else 5,
                max_bytes=100_000,
            )
        )
    assert time.monotonic() - start < 5


def test_a_size_that_is_too_large_is_refused_before_it_comes(server):
    with pytest.raises(ValueError, match=f"max_bytes = 100 bytes, got {len(PICTURE)}"):
        fetch(f"{server}/picture", max_bytes=100)
    assert fetch(f"{server}/picture", max_bytes=len(PICTURE)) == PICTURE


LIMITS = {
    "no time": ({"timeout": 0}, ValueError, "image: timeout must be above 0 seconds, got 0"),
    "a timeout of None": ({"timeout": None}, TypeError, "timeout must be a number, got None"),
    "bytes in words": ({"max_bytes": "1M"}, TypeError, "max_bytes must be a number, got '1M'"),
}


@pytest.mark.parametrize(("limits", "kind", "message"), LIMITS.values(), ids=LIMITS)
def test_limits_are_positive_numbers(limits, kind, message, server):
    with pytest.raises(kind, match=message):
        fetch(f"{server}/picture", **limits)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/a.png", "http://127.0.0.1:port/a.png", "http:///a.png"]
)
def test_addresses_without_a_server(server, url):
    with pytest.raises(OSError, match=r"image: http.* cannot be fetched: "):
        open_source(url)


def test_an_address_that_is_none():
    with pytest.raises(ValueError, match=r"image 3: http://\[ is no address: "):
        open_source("http://[", "image 3")


URI = "data:image/png;base64,"
WAYS = {
    "in a line": lambda: URI + base64.b64encode(PICTURE).decode(),
    "in lines": lambda: URI + base64.encodebytes(PICTURE).decode(),
    "DATA": lambda: URI.replace("data", "DATA") + base64.b64encode(PICTURE).decode(),
}


@pytest.mark.parametrize("way", WAYS)
def test_data_uris(way):
    assert np.array_equal(read_pixels(open_source(WAYS[way]())), half_bright())


def test_data_uris_of_other_letters():
    with pytest.raises(ValueError, match=r"image 3: a data URI must hold base64: .*ASCII"):
        open_source(f"{URI}é", "image 3")


def test_files_that_cannot_be_read(tmp_path):
    message = "image 3: a file must be open for reading: "
    with (tmp_path / "a.png").open("wb") as file, pytest.raises(ValueError, match=message):
        open_source(file, "image 3")
    (closed := io.BytesIO(PICTURE)).close()
    with pytest.raises(ValueError, match=message):
        open_source(closed, "image 3")


def test_what_reads_as_a_bytearray():
    class File:
        def read(self):
            return bytearray(PICTURE)

    assert np.array_equal(read_pixels(open_source(File())), half_bright())
