"""Servers for tests, in a thread or as the command, and clients that send them what they should
and should not."""

import asyncio
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image

from segkern.deploy.serve import ServeConfig, run
from segkern.deploy.serve.app import create_app
from segkern.deploy.serve.models import Models
from segkern.io import rle
from segkern.models import Mask2Former, Mask2FormerConfig

from .models import half_bright

NAMES = {0: "ground", 1: "cat", 2: "dog", 3: "bird", 4: "fish"}


def quick_model() -> Mask2Former:
    """A small model that finds several segments in a `picture`, and is sure of them."""
    torch.manual_seed(6)
    small = {"shortest_edge": 32, "longest_edge": 64, "decoder_layers": 1}
    config = replace(Mask2FormerConfig.tiny(5), id2label=NAMES, stuff=(0,), **small)
    model = Mask2Former(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "class_embed.weight" in name:
                p.mul_(20)
            elif "mask_embed" in name or "queries" in name:
                p.mul_(3)
    return model


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Tiles of colours, [H, W, 3] uint8."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 256, (-(-height // 12), -(-width // 12), 3), np.uint8)
    return tiles.repeat(12, 0).repeat(12, 1)[:height, :width]


def file_of(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


HALF = file_of(half_bright())
JPEG = file_of(picture(90, 120), "JPEG")
PNG = {"Content-Type": "image/png"}


def assert_same(found: dict, wanted: dict) -> None:
    """Whether an answer is a result's `to_json`, but for the rounding of another batch."""
    assert (found["task"], found["size"]) == (wanted["task"], wanted["size"])
    size = tuple(wanted["size"])
    for a, b in zip(found["segments"], wanted["segments"], strict=True):
        assert {k: a[k] for k in ("id", "label_id", "label", "isthing")} == {
            k: b[k] for k in ("id", "label_id", "label", "isthing")
        }
        assert (a["score"] is None) == (b["score"] is None)
        assert a["score"] is None or abs(a["score"] - b["score"]) < 1e-4
        maps = [rle.decode([x["segmentation"]], [1], size) for x in (a, b)]
        assert (maps[0] != maps[1]).mean() < 5e-3
        assert maps[0].sum() == a["area"]


# --- servers --------------------------------------------------------------------------------


class Served(NamedTuple):
    """A server in a thread.

    Attributes:
        url: http://127.0.0.1:PORT.
        app: the application.
        connections: those that are open.
    """

    url: str
    app: object
    connections: set

    def connect(self) -> socket.socket:
        """A connection of a test's own."""
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=60)


@contextmanager
def in_thread(opened: Callable, wrap: Callable = lambda app: app, **settings):
    """Serves what a function opens, on a free port, until the block ends.

    Args:
        opened: gives the model.
        wrap: gives what stands around the application.
        settings: of `ServeConfig`.
    """
    config = ServeConfig("models/made-up", port=0, **settings)
    models = Models(opened)
    models.load()
    app = create_app(config, models)
    listener = run._listener(config)
    server = uvicorn.Server(run._uvicorn(config, lambda: wrap(app)))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Served(url, app, server.server_state.connections)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@dataclass
class Command:
    """`segkern serve` in a process of its own.

    Attributes:
        process: of the command.
        url: http://127.0.0.1:PORT.
        log: its standard error.
    """

    process: subprocess.Popen
    url: str
    log: Path

    def memory(self) -> float:
        """Megabytes that it holds."""
        text = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def command(model: Path, folder: Path, *options: str, **variables: str):
    """Runs `segkern serve MODEL` on a free port until the block ends.

    Args:
        model: folder of a model.
        folder: for its log.
        options: of the command.
        variables: of the environment, without which there is no key.
    """
    log = folder / "serve.log"
    env = {k: v for k, v in os.environ.items() if k not in ("SEGKERN_API_KEY", "SEGKERN_POISON")}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | variables
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "segkern", "serve", str(model), "--port", "0", *options],
            env=env,
            stderr=file,
        )
    try:

        def url() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(r"event=start url=(\S+)", log.read_text())
            with suppress(httpx.TransportError):
                if found and httpx.get(f"{found[1]}/ready", timeout=5).status_code == 200:
                    return found[1]
            return None

        yield Command(process, wait_until(url, 300), log)
    finally:
        process.kill()
        process.wait()


def wait_until(test: Callable, seconds: float = 60):
    """What a function gives when it gives something true."""
    until = time.monotonic() + seconds
    while not (found := test()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return found


# --- clients --------------------------------------------------------------------------------


def post(server: Served | Command, query: str = "", data: bytes = HALF, **more) -> httpx.Response:
    """Asks for the segments of a picture; `more` is httpx's."""
    more = {"headers": PNG, "timeout": 60} | more
    return httpx.post(f"{server.url}/segment?{query}", content=data, **more)


async def send(
    url: str, head: str, parts: Sequence[bytes] = (), pause: float = 0.0, path="/segment"
):
    """Sends a request as it is, bytes that lie about themselves too.

    Args:
        url: of the server.
        head: lines of the head after the first, without the last empty one.
        parts: of the body, of which no more are sent when an answer comes.
        pause: seconds before each part.

    Returns:
        status and body of the answer; (0, b"") where the connection ended without one.
    """
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    reading = asyncio.ensure_future(_answer(reader))
    try:
        writer.write(f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{head}\r\n\r\n".encode())
        with suppress(ConnectionError):
            for part in parts:
                await asyncio.sleep(pause)
                writer.write(part)
                await writer.drain()
                if reading.done():
                    break
        return await asyncio.wait_for(reading, 60)
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0, b""
    finally:
        reading.cancel()
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    if " 100 " in head.partition("\r\n")[0]:
        return await _answer(reader)
    length = int(re.search(r"content-length: (\d+)", head, re.IGNORECASE)[1])
    return int(head.split()[1]), await reader.readexactly(length)


async def leave(url: str, data: bytes, after: float = 0.0, more: str = "") -> None:
    """Sends a request, or half of it where `after` is 0, and goes away without the answer."""
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /segment HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\n"
    writer.write(f"{head}{more}Content-Length: {len(data)}\r\n\r\n".encode())
    writer.write(data if after else data[: len(data) // 2])
    await writer.drain()
    await asyncio.sleep(after)
    writer.transport.abort()


def png_head(width: int, height: int) -> bytes:
    """The begin of a PNG that says it is of that size."""
    small = file_of(np.zeros((1, 1, 3), np.uint8))
    body = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + small[24:29]
    return small[:12] + body + zlib.crc32(body).to_bytes(4, "big") + small[33:]


MEGABYTE = bytes(2**20)
HUNDRED = 100 * 2**20


async def broken(url: str, kind: str, more: str = "") -> tuple[int, bytes]:
    """A request of a kind of `BROKEN`, with more lines in its head; status and body of the
    answer."""

    def sized(data: bytes, name: str = "image/png") -> str:
        return f"{more}Content-Type: {name}\r\nContent-Length: {len(data)}"

    bodies = {
        "truncated": (JPEG[: len(JPEG) // 2], "image/jpeg"),
        "huge picture": (png_head(40_000, 40_000), "image/png"),
        "text as picture": (b"once upon a time", "image/png"),
        "text": (b"once upon a time", "text/plain"),
        "empty": (b"", "image/png"),
    }
    if kind in bodies:
        data, name = bodies[kind]
        return await send(url, sized(data, name), [data])
    if kind == "100 MB":
        head = f"{more}Content-Type: image/png\r\nContent-Length: {HUNDRED}"
        return await send(url, head, [MEGABYTE] * 100)
    if kind == "100 MB in chunks":
        head = f"{more}Content-Type: image/png\r\nTransfer-Encoding: chunked"
        part = b"100000\r\n" + MEGABYTE + b"\r\n"
        return await send(url, head, [part] * 100)
    if kind == "slow":
        return await send(url, sized(JPEG), [JPEG[i : i + 1] for i in range(400)], 0.05)
    assert kind == "gone"
    await leave(url, JPEG, 0.02, more)
    await leave(url, JPEG, 0.0, more)
    return 0, b""


BROKEN = {
    "truncated": 422,
    "100 MB": 413,
    "100 MB in chunks": 413,
    "huge picture": 413,
    "text as picture": 415,
    "text": 415,
    "empty": 400,
    "slow": 408,
    "gone": 0,
}


async def gather(work: Sequence[Callable], at_once: int) -> list:
    """What async functions give, so many at once."""
    room = asyncio.Semaphore(at_once)

    async def one(function):
        async with room:
            return await function()

    return await asyncio.gather(*map(one, work))
