"""`segkern serve` under load, over HTTP: right answers, reasons for what is broken, no growth; a
reload and an end that lose nothing.

The client bounds itself: so many requests at once, each with a limit of time.
"""

import asyncio
import itertools
import json
import re
import signal
import time
from functools import partial

import httpx
import psutil
import pytest

import segkern
from segkern.deploy.serve.metrics import STAGES
from support.serving import (
    BROKEN,
    assert_same,
    broken,
    command,
    file_of,
    gather,
    picture,
    post,
    quick_model,
    wait_until,
)

SIZES = ((40, 60), (60, 40), (90, 120), (33, 47))
QUERIES = {
    "": {},
    "threshold=0.3": {"threshold": 0.3},
    "task=instance&top_k=3": {"task": "instance", "top_k": 3},
    "task=semantic": {"task": "semantic"},
}
LIMITS = ("--receive-timeout", "5", "--timeout", "60", "--max-bytes", str(2**22), "--queue", "32")
KEY = {"X-API-Key": "a-key-of-tests"}
GROWTH = 30  # megabytes: what the C library and Python keep moves by some


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the model."""
    folder = tmp_path_factory.mktemp("model")
    quick_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """One for the tests that take seconds."""
    log = tmp_path_factory.mktemp("log")
    with command(folder, log, *LIMITS, SEGKERN_API_KEY=KEY["X-API-Key"]) as found:
        yield found


@pytest.fixture(scope="module")
def wanted(folder):
    """Files and, for each query, what `segkern.segment` finds in them."""
    model, found = segkern.open_model(folder), []
    for i, (size, kind) in enumerate(itertools.product(SIZES, ("PNG", "JPEG"))):
        data = file_of(picture(*size, seed=i), kind)
        path = folder / f"{i}.{kind.lower()}"
        path.write_bytes(data)
        results = {q: segkern.segment(model, path, **o).to_json() for q, o in QUERIES.items()}
        found.append((f"image/{kind.lower()}", data, results))
    return found


async def ask(client, wanted, i):
    """A good request, by its number; its answer is right."""
    kind, data, results = wanted[i % len(wanted)]
    query = list(QUERIES)[i % 7 % len(QUERIES)]
    if i % 3:
        answer = await client.post(
            f"/segment?{query}", content=data, headers={"Content-Type": kind}
        )
    else:
        answer = await client.post(f"/segment?{query}", files={"picture": ("../../x", data)})
    assert answer.status_code == 200, answer.text
    assert_same(answer.json(), results[query])
    return answer.status_code


async def spoil(url, kind):
    """A broken request; it has the status and a reason."""
    status, body = await broken(url, kind, f"X-API-Key: {KEY['X-API-Key']}\r\n")
    assert status == BROKEN[kind], (kind, status, body)
    if status:
        assert len(json.loads(body)["detail"]) > 10
    return status


async def load(server, wanted, count, at_once, every):
    """So many requests, one of `every` broken, those in turn."""
    limits = httpx.Limits(max_connections=at_once)
    settings = {"base_url": server.url, "limits": limits, "timeout": 60, "headers": KEY}
    async with httpx.AsyncClient(**settings) as client:
        work, kinds = [], itertools.cycle(BROKEN)
        for i in range(count):
            if i % every == every - 1:
                work.append(partial(spoil, server.url, next(kinds)))
            else:
                work.append(partial(ask, client, wanted, i))
        return await gather(work, at_once)


@pytest.mark.slow
def test_load_is_answered_right(server, wanted):
    found = asyncio.run(load(server, wanted, 60, 16, every=6))
    assert found.count(200) == 50

    def counted():
        """Of what was answered; a client that went away may have been, too."""
        text = httpx.get(f"{server.url}/metrics", headers=KEY).text
        held = "segkern_pictures_held 0.0" in text
        return held and re.search(r'total{path="/segment",status="200"} 5[01]\.0', text)

    wait_until(counted)
    log = server.log.read_text()
    assert "Traceback" not in log
    line = next(x for x in log.splitlines() if "status=200" in x and "path=/segment" in x)
    for name in ("id", "bytes", "pictures", "pixels", "batch", *STAGES, "total"):
        assert f" {name}=" in line


async def during(server, wanted, act, count=60):
    """What becomes of good requests, 9 at once, while something happens to the server: 200, or 0
    where the connection was refused or closed without an answer."""
    settings = {"base_url": server.url, "timeout": 60, "headers": KEY}
    async with httpx.AsyncClient(**settings) as client:
        done = []

        async def one(i):
            try:
                done.append(await ask(client, wanted, i))
            except httpx.TransportError:
                done.append(0)

        async def later():
            while len(done) < 8:
                await asyncio.sleep(0.005)
            await act(client)

        await gather([later, *(partial(one, i) for i in range(count))], 10)
        return done


def test_reload_under_load_drops_none(server, folder, wanted):
    def generation():
        return httpx.get(f"{server.url}/model", headers=KEY).json()["generation"]

    async def twice(client):
        answer = await client.post("/reload")
        assert (answer.status_code, answer.json()["generation"]) == (200, 2)
        server.process.send_signal(signal.SIGHUP)

    assert asyncio.run(during(server, wanted, twice)) == [200] * 60
    wait_until(lambda: generation() == 3)
    # a model that cannot be opened leaves the last where it is
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:5000])
    answer = httpx.post(f"{server.url}/reload", headers=KEY)
    weights.write_bytes(whole)
    assert answer.status_code == 500
    assert "the last model stays" in answer.json()["detail"]
    assert generation() == 3
    figures = httpx.get(f"{server.url}/metrics", headers=KEY).text
    assert 'segkern_reloads_total{outcome="done"} 2.0' in figures
    assert 'segkern_reloads_total{outcome="failed"} 1.0' in figures


def test_sigterm_under_load_answers_what_was_accepted(server, wanted):
    """Last of those that share the server."""

    async def end(client):
        server.process.send_signal(signal.SIGTERM)

    before = server.log.read_text().count("\n")
    done = asyncio.run(during(server, wanted, end, 600))  # most of them find the port closed
    assert server.process.wait(60) == 0
    lines = server.log.read_text().splitlines()[before:]
    statuses = [re.search(r"status=(\d+)", x)[1] for x in lines if "path=/segment" in x]
    assert statuses == ["200"] * done.count(200)  # it has seen no other
    assert 8 <= done.count(200) < 600
    assert lines[-1].endswith("event=end")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


@pytest.mark.slow
def test_long_load_does_not_grow(folder, wanted, tmp_path, record_property):
    with command(folder, tmp_path, *LIMITS, SEGKERN_API_KEY=KEY["X-API-Key"]) as server:
        asyncio.run(load(server, wanted, 200, 16, every=20))
        before, start = server.memory(), time.monotonic()
        found = asyncio.run(load(server, wanted, 1800, 16, every=20))
        after, seconds = server.memory(), time.monotonic() - start
        assert found.count(200) == 1710
        assert "Traceback" not in server.log.read_text()
    text = f"{before:.0f} MB after 200 requests, {after:.0f} MB after 2,000; {seconds:.0f} s"
    print(f"\n{text}")
    record_property("memory", text)
    assert after < before + GROWTH, text


@pytest.mark.slow
def test_several_processes_share_a_port(folder, wanted, tmp_path):
    options = (*LIMITS, "--workers", "2")
    with command(folder, tmp_path, *options, SEGKERN_API_KEY=KEY["X-API-Key"]) as server:

        def opened(generation):
            return server.log.read_text().count(f"event=model generation={generation} ")

        def figure(text):
            figures = httpx.get(f"{server.url}/metrics", headers=KEY, timeout=60).text
            return f"{text}\n" in figures

        wait_until(lambda: opened(1) == 2, 300)
        for i in range(8):  # connections of their own, which either may take
            kind, data, results = wanted[i]
            answer = post(server, data=data, headers={"Content-Type": kind, **KEY})
            assert_same(answer.json(), results[""])
        # of both together
        wait_until(lambda: figure('segkern_requests_total{path="/segment",status="200"} 8.0'))
        wait_until(lambda: figure("segkern_model_generation 1.0"))
        answer = httpx.post(f"{server.url}/reload", headers=KEY, timeout=60)
        assert (answer.status_code, answer.json()["generation"]) == (200, 2)
        # the least of both: the one that was not asked has another model, too
        wait_until(lambda: figure("segkern_model_generation 2.0"))
        # one that dies has a successor
        workers = psutil.Process(server.process.pid).children()
        [x for x in workers if "spawn_main" in " ".join(x.cmdline())][-1].kill()
        wait_until(lambda: opened(1) == 3, 300)
        wait_until(lambda: figure("segkern_model_generation 1.0"))
        assert (opened(2), opened(3)) == (2, 0)  # each once
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert server.log.read_text().splitlines()[-1].endswith("event=end")
