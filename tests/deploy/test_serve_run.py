"""How the service starts, opens its model anew, tells its workers, and drops clients that keep it
waiting; in this process."""

import asyncio
import logging
import os
import signal
import threading
import time
from contextlib import suppress
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest
import uvicorn

from segkern.deploy.serve import ServeConfig, run
from segkern.deploy.serve.app import create_app
from segkern.deploy.serve.models import Models
from support.models import Squares
from support.serving import in_thread, wait_until

CONFIG = ServeConfig("made up", port=0)

# --- workers --------------------------------------------------------------------------------


@pytest.fixture
def logs():
    """Are afterwards what they were."""
    names = ("segkern.serve", "uvicorn", "py.warnings")
    before = [(x, x.handlers[:], x.level, x.propagate) for x in map(logging.getLogger, names)]
    yield
    logging.captureWarnings(False)
    for log, handlers, level, propagate in before:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def test_a_worker_logs_until_it_ends(logs, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run._worker_app(CONFIG, None)
    logging.getLogger("segkern.serve").info("event=of_a_worker")
    assert "INFO event=of_a_worker\n" in capsys.readouterr().err


class Worker:
    """In place of uvicorn's process."""

    def __init__(self, config=None, sockets=None, pid=7, exitcode=None):
        self.pid, self.exitcode, self.started = pid, exitcode, False
        self.process = SimpleNamespace(is_alive=lambda: self.exitcode is None)

    def start(self):
        self.started = True
        self.held = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def kill(self):
        pass

    def join(self):
        pass

    def ping(self, timeout):
        raise AssertionError("one that opens its model does not answer")


@pytest.fixture
def processes(monkeypatch):
    """Of workers 1 to 3, with `told`, who got a SIGHUP."""
    found = object.__new__(run._Processes)
    found.config = uvicorn.Config(None, workers=3)
    found.sockets, found.signal_queue, found.told = [], [], []
    found.should_exit = threading.Event()
    found.processes = [Worker(pid=i) for i in (1, 2, 3)]
    found._reloaded, found.sender = Pipe(duplex=False)
    monkeypatch.setattr(run, "Process", Worker)
    monkeypatch.setattr(run, "mark_process_dead", lambda pid: None)
    monkeypatch.setattr(run.os, "kill", lambda pid, number: found.told.append((pid, number)))
    with found._reloaded, found.sender:
        yield found


def test_a_worker_that_was_asked_to_reload_is_not_told_to(processes):
    processes.sender.send(2)
    processes.sender.send(3)
    processes.processes[0].exitcode = 1  # it has no model to open anew
    processes.handle_signals()
    assert processes.told == [(3, signal.SIGHUP), (2, signal.SIGHUP)]
    processes.signal_queue.append(signal.SIGHUP)  # an operator's is for all
    processes.handle_signals()
    assert processes.told[2:] == [(2, signal.SIGHUP), (3, signal.SIGHUP)]


def test_a_worker_that_died_has_a_successor_which_a_hang_up_does_not_end(processes):
    processes.processes[1].exitcode = -9
    processes.keep_subprocess_alive()
    assert [x.pid for x in processes.processes] == [1, 7, 3]
    assert signal.SIGHUP in processes.processes[1].held
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


# --- another model --------------------------------------------------------------------------


class Opened:
    """Opens models; while the first is opened, the process gets a SIGHUP."""

    def __init__(self):
        self.count = 0

    def __call__(self, *_):
        self.count += 1
        if self.count == 1:
            os.kill(os.getpid(), signal.SIGHUP)
        return Squares()


@pytest.fixture
def hang_ups():
    """SIGHUPs that nobody takes care of, which would end the process."""
    missed = []
    before = signal.signal(signal.SIGHUP, lambda *_: missed.append(1))
    yield missed
    signal.signal(signal.SIGHUP, before)


async def generation(app, models, wanted):
    """Runs the application until its model is of that generation."""
    async with app.router.lifespan_context(app):
        async with asyncio.timeout(60):
            while models.current.generation < wanted:
                await asyncio.sleep(0.01)


def test_a_hang_up_while_the_application_opens_its_model_opens_it_again(hang_ups):
    models = Models(Opened())
    asyncio.run(generation(create_app(CONFIG, models), models, 2))
    assert not hang_ups


def test_a_hang_up_while_the_command_opens_its_model_opens_it_again(hang_ups, monkeypatch):
    opened = Opened()
    monkeypatch.setattr(run, "open_model", opened)
    seen = []

    def served(server, sockets):
        app = server.config.app()
        models = server.config.app.args[1]
        seen.append(models.current.generation)
        asyncio.run(generation(app, models, 2))

    monkeypatch.setattr(uvicorn.Server, "run", served)
    run.serve(CONFIG)
    assert (seen, hang_ups, opened.count) == ([1], [], 2)


def test_the_application_ends_where_no_other_thread_starts():
    """As where the interpreter ends."""
    app = create_app(CONFIG, Models(Squares))

    async def ended():
        async with app.router.lifespan_context(app):
            await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(ended())
    assert not app.state.batches.alive


# --- clients that keep it waiting -----------------------------------------------------------

SIZE = 2**26  # bytes of an answer: more than what the system keeps for a connection


def large(app):
    """The application with an answer that is large."""

    async def other(scope, receive, send):
        if scope.get("path") != "/large":
            await app(scope, receive, send)
            return
        headers = [(b"content-length", str(SIZE).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(SIZE)})

    return other


@pytest.mark.parametrize("more", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_an_answer_that_is_not_taken_is_dropped(more):
    """Also where the client asks for more, as if it had been."""
    with in_thread(Squares, large, receive_timeout=1.0) as server, server.connect() as line:
        line.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        size = len(line.recv(1000))
        line.sendall(more)
        wait_until(lambda: not server.connections, 30)
        with suppress(ConnectionError):
            while part := line.recv(2**20):
                size += len(part)
        assert 0 < size < SIZE


def test_an_answer_that_is_taken_is_whole():
    with in_thread(Squares, large, receive_timeout=1.0) as server, server.connect() as line:
        line.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        size = 0
        while part := line.recv(2**20):
            size += len(part)
        assert size > SIZE


def test_a_slow_head_is_dropped():
    with in_thread(Squares, receive_timeout=1.0) as server, server.connect() as line:
        start = time.monotonic()
        line.sendall(b"POST /segment HTTP/1.1\r\nHost: a\r\nX-")
        assert line.recv(100) == b""
        assert time.monotonic() - start > 0.9
