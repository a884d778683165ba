"""Shards on a server on this machine: by parts, again where it is busy, and what is lost."""

import contextlib
import importlib
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from segkern.cli import main, train
from segkern.data import Order, build_dataset, find_format, shards
from segkern.io import sources
from segkern.io.sources import fetch, fetch_patiently
from segkern.training.config import TrainConfig
from support.models import Squares
from support.shards import shards_of, write_numbered

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
N = 14


class Parts(SimpleHTTPRequestHandler):
    """Files of a folder, whole or in parts; `faults` holds what befalls the next requests."""

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.asked.append((name, self.headers.get("Range")))
        fault = self.server.faults.pop(0) if self.server.faults and "tar" in name else None
        if isinstance(fault, int):
            return self.send_error(fault)
        span = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if span is None or not path.is_file() or self.server.whole:
            return super().do_GET()
        first, last = map(int, span.removeprefix("bytes=").split("-"))
        data = path.read_bytes()
        if first >= len(data):
            return self.send_error(416)
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # the other side has left
            super().handle()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbered")
    return shards_of(write_numbered(root / "set", N), root / "shards")


@pytest.fixture
def server(written, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    waited = []
    monkeypatch.setattr(sources.time, "sleep", waited.append)

    def handler(*args):
        return Parts(*args, directory=written.root)

    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    running.daemon_threads, running.asked, running.faults = True, [], []
    running.whole, running.waited = False, waited
    running.address = f"http://127.0.0.1:{running.server_port}"
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_samples_are_those_of_the_folder(server, written):
    config, line = find_format(f"{server.address}/")
    assert "kind shards (panoptic)" in line
    assert config.root == server.address
    ours, theirs = build_dataset(config, "train"), build_dataset(written, "train")
    assert [ours.shuffled(1, 2, i) for i in range(N)] == [
        theirs.shuffled(1, 2, i) for i in range(N)
    ]
    order = Order(N, 7, 0, 0, 2, shuffled=ours.shuffled)
    for batch in DataLoader(ours, batch_sampler=order, num_workers=2, collate_fn=list):
        for sample in batch:
            other = theirs[sample["id"]]
            assert np.array_equal(sample["image"], other["image"])
            assert np.array_equal(np.asarray(sample["masks"]), np.asarray(other["masks"]))
    # of a tar no more than the samples was fetched, each once
    parts = [(name, span) for name, span in server.asked if name.endswith(".tar")]
    assert all(span for _, span in parts)
    assert len(set(parts)) == len(parts) == N


def test_a_busy_server_is_asked_again(server):
    data = build_dataset(find_format(server.address)[0], "train")
    server.faults += [503, "cut", 429]
    sample = data[3]
    assert sample["id"] == 3
    assert "unread" not in sample
    assert server.waited == list(sources.WAITS)


def test_a_server_that_stays_broken_loses_a_shard(server, monkeypatch):
    """The next shard stands for it, and it is left alone for some minutes."""
    data = build_dataset(find_format(server.address)[0], "train")
    server.faults += [500] * 4
    end = int(data.first[1])
    sample = data[1, 0]
    assert sample["id"] == end + 1
    assert "500" in sample["unread"]
    asked = len(server.asked)
    assert data[2, 0]["id"] == end + 2
    assert len(server.asked) == asked + 1
    assert data[0, 0]["id"] == 0  # it lies before
    now = shards.time.monotonic()
    monkeypatch.setattr(shards.time, "monotonic", lambda: now + 600)
    assert data[1, 0]["id"] == 1
    assert data[2, 0]["id"] == 2


def test_a_sample_before_those_that_are_lost_is_asked_for_once(server):
    data = build_dataset(find_format(server.address)[0], "train")
    for k in (3, 1):  # the second lies before what is known to be lost
        server.faults += [500] * 4
        assert "500" in data[k, 0]["unread"]
    asked = [name for name, _ in server.asked].count("train-00000.tar")
    assert asked == 2 * 4
    for k in (1, 2, 3):
        assert "500" in data[k, 0]["unread"]
    assert [name for name, _ in server.asked].count("train-00000.tar") == asked


def test_training_takes_an_address(server, monkeypatch):
    asked = []

    class Done:
        steps, seconds = 0, 0.0

    monkeypatch.setattr(train, "run_train", lambda config, resume: asked.append(config) or Done())
    assert main(["train", "--data.root", server.address, "--preset", "tiny"]) == 0
    (config,) = asked
    assert (config.data.kind, config.data.root) == ("shards", server.address)
    assert config.model.id2label == {0: "box", 1: "ground"}
    assert TrainConfig.from_dict(config.to_dict()).data == config.data


def test_prune_measures_on_an_address(server, monkeypatch):
    asked, prune = [], importlib.import_module("segkern.cli.prune")

    def run(opened, out, layers, queries, zeros, everywhere, keep, source, *rest):
        asked.append(source)
        raise ValueError("no more is wanted")

    monkeypatch.setattr(prune, "open_model", lambda name: Squares())
    monkeypatch.setattr(prune, "run_prune", run)
    assert main(["prune", "model", "out", "--data", server.address, "--device", "cpu"]) == 2
    assert [source.config.root for source in asked] == [server.address]


def test_what_is_not_there_is_not_asked_for_again(server):
    with pytest.raises(OSError, match="404"):
        fetch_patiently(f"{server.address}/none.tar", "shards")
    assert server.waited == []
    with pytest.raises(OSError, match=r"index.json cannot be fetched: .*404"):
        find_format(f"{server.address}/none")
    assert main(["data", "check", f"{server.address}/none"]) == 2


def test_a_server_without_parts_is_named(server):
    data = build_dataset(find_format(server.address)[0], "train")
    server.whole = True
    with pytest.raises(ValueError, match=r"must send parts of files \(Range\), .* status 200"):
        data.examined(0)


def test_part_of_a_file(server, written):
    whole = Path(written.root, "train-00000.tar").read_bytes()
    url = f"{server.address}/train-00000.tar"
    assert fetch(url, part=(100, 612)) == whole[100:612]
    assert fetch(url, part=(len(whole) - 5, len(whole) + 5)) == whole[-5:]
    with pytest.raises(OSError, match="416"):
        fetch(url, part=(len(whole), len(whole) + 5))
