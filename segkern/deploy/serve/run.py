"""Starts a server, with one process or several, and ends it without losing a request."""

import asyncio
import functools
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import torch
import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.supervisors.multiprocess import SIGNALS, Multiprocess, Process

from ...models import open_model
from ...runtime.device import usable_device
from .app import create_app
from .metrics import FOLDER
from .models import Models
from .settings import KEY_VARIABLE, ServeConfig, api_key

_KEPT = 75.0  # seconds that a connection is kept without a request: longer than by clients
_LOCAL = ("127.0.0.1", "::1", "localhost")

logger = logging.getLogger("segkern.serve")


def serve(config: ServeConfig) -> None:
    """Serves a model until SIGTERM or Ctrl-C; requests that came before are answered.

    SIGHUP opens the model anew, in every process; requests that came before keep the last.

    Raises:
        ValueError: the model cannot be opened or run, or the key is none.
        OSError: the address is taken or not this machine's.
        RuntimeError: a worker process did not start; its log says why.
    """
    key = api_key()
    with _logged(), _signals_given_back(), _listener(config) as listener:
        if key is None and config.host not in _LOCAL:
            said = "event=open host=%s: anyone who reaches it may send pictures; set %s"
            logger.warning(said, config.host, KEY_VARIABLE)
        host, port = listener.getsockname()[:2]
        logger.info("event=start url=http://%s:%d", f"[{host}]" if ":" in host else host, port)
        if config.workers > 1:
            _serve_in_processes(config, listener)
        else:
            _serve_here(config, listener)
        logger.info("event=end")


def start_logging() -> Callable[[], None]:
    """Lines of the server, and of uvicorn what it says of itself, go to standard error.

    Returns:
        a function that ends it.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    levels = {"segkern.serve": logging.INFO, "uvicorn": logging.WARNING}
    levels["py.warnings"] = logging.WARNING
    logs = [(logging.getLogger(name), level) for name, level in levels.items()]
    before = [(log.level, log.propagate) for log, _ in logs]
    logging.captureWarnings(True)
    for log, level in logs:
        log.addHandler(handler)
        log.setLevel(level)
        log.propagate = False

    def end() -> None:
        logging.captureWarnings(False)
        for (log, _), (level, propagate) in zip(logs, before):
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate

    return end


@contextmanager
def _logged():
    end = start_logging()
    try:
        yield
    finally:
        end()


@contextmanager
def _signals_given_back():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which also drops clients that let it wait for the rest of a request's
    head, or do not take what is sent to them, for longer than the config's `patience` in
    seconds."""

    _head = _sent = None

    def connection_made(self, transport) -> None:
        """Waits for the first head."""
        # writing is then paused while anything is not taken, and no more is written meanwhile
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        self._head = self._later(self._no_head)

    def data_received(self, data: bytes) -> None:
        """Waits for the rest of a head."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head = _cancelled(self._head)
        elif self._head is None:
            self._head = self._later(self._no_head)

    def pause_writing(self) -> None:
        """Waits for what was sent to be taken, whatever else the client sends."""
        super().pause_writing()
        self._sent = self._later(self.transport.abort)

    def resume_writing(self) -> None:
        """It was taken."""
        self._sent = _cancelled(self._sent)
        super().resume_writing()

    def connection_lost(self, exc) -> None:
        """Waits no more."""
        self._head, self._sent = _cancelled(self._head), _cancelled(self._sent)
        super().connection_lost(exc)

    def _later(self, then: Callable) -> asyncio.TimerHandle:
        return self.loop.call_later(self.config.patience, then)

    def _no_head(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.timeout_keep_alive_handler()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class _Processes(Multiprocess):
    """uvicorn's workers, which open the model anew, each once, in place of an end by SIGHUP.

    Args:
        config, sockets: uvicorn's.
        reloaded: end of a pipe from which ids come, of workers that opened the model anew because
            a client asked for it; the others are told.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], reloaded: Connection):
        super().__init__(config, sockets)
        self._reloaded = reloaded

    def init_processes(self) -> None:
        """Starts the workers."""
        with _no_hang_up():
            super().init_processes()

    def handle_signals(self) -> None:
        """Does what was asked for since the last time."""
        super().handle_signals()
        while self._reloaded.poll():
            self._tell(but=self._reloaded.recv())

    def handle_hup(self) -> None:
        """Tells every worker."""
        self._tell()

    def keep_subprocess_alive(self) -> None:
        """Starts a worker in place of one that died, whose figures of what it holds go, too.

        uvicorn's waits here for the answer of every worker, and one that opens its model has none
        yet.
        """
        for i, process in enumerate(self.processes):
            if self.should_exit.is_set() or process.process.is_alive():
                continue
            mark_process_dead(process.pid)
            process.kill()  # closes its pipes
            process.join()
            if process.exitcode == STARTUP_FAILURE:  # as the next one would
                self.should_exit.set()
                continue
            logger.warning("event=worker_died pid=%d status=%s", process.pid, process.exitcode)
            self.processes[i] = Process(self.config, self.sockets)
            with _no_hang_up():
                self.processes[i].start()

    def _tell(self, but: int | None = None) -> None:
        for process in self.processes:
            if process.pid != but and process.process.is_alive():
                os.kill(process.pid, signal.SIGHUP)


@contextmanager
def _no_hang_up():
    """Processes that start here get no SIGHUP, which would end them, until they know what to do
    with it; one that came waits until then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listener(config: ServeConfig) -> socket.socket:
    """A socket that is bound and does not listen yet."""
    listener = None
    try:
        family, *_, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise OSError(f"serve: cannot listen at {config.host}:{config.port}: {error}") from error
    return listener


def _uvicorn(config: ServeConfig, app, workers: int | None = None) -> uvicorn.Config:
    found = uvicorn.Config(
        app,
        factory=True,
        workers=workers,
        http=PatientProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEPT,
        timeout_graceful_shutdown=config.timeout + config.receive_timeout,
    )
    found.patience = config.receive_timeout
    return found


def _serve_here(config: ServeConfig, listener: socket.socket) -> None:
    models = Models(lambda: open_model(config.model).to(usable_device(config.device)))
    server = uvicorn.Server(_uvicorn(config, functools.partial(create_app, config, models)))
    # before uvicorn takes the signal; when all is done it raises it again
    signal.signal(signal.SIGTERM, lambda *_: None if server.started else sys.exit(0))
    signal.signal(signal.SIGHUP, lambda *_: setattr(models, "stale", True))
    models.load()  # here, so that what is wrong with it is an error of the command
    server.run([listener])


def _serve_in_processes(config: ServeConfig, listener: socket.socket) -> None:
    with tempfile.TemporaryDirectory(prefix="segkern-") as folder:
        os.environ[FOLDER] = folder
        try:
            receiver, sender = Pipe(duplex=False)
            with receiver, sender:
                app = functools.partial(_worker_app, config, sender)
                listener.set_inheritable(True)
                workers = _uvicorn(config, app, config.workers)
                processes = _Processes(workers, [listener], receiver)
                processes.run()
        finally:
            del os.environ[FOLDER]
    ended = (0, None, -signal.SIGTERM, -signal.SIGINT)
    failed = [p.exitcode for p in processes.processes if p.exitcode not in ended]
    if failed:
        raise RuntimeError(f"serve: a worker process ended with status {failed[0]}")


def _worker_app(config: ServeConfig, reloaded: Connection):
    """The application of a worker process."""
    start_logging()  # until the process ends
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))
    return create_app(config, told=lambda: reloaded.send(os.getpid()))
