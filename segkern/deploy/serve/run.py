"""Starts a server, with one process or several, and ends it without losing a request."""

import functools
import logging
import os
import signal
import socket
import sys
import tempfile
from contextlib import contextmanager

import torch
import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.supervisors.multiprocess import Multiprocess

from ...models import open_model
from ...runtime.device import usable_device
from .app import create_app
from .metrics import FOLDER
from .models import Models
from .settings import KEY_VARIABLE, ServeConfig, api_key

_KEPT = 75.0  # seconds that a connection is kept without a request: longer than by clients
_START = 600  # seconds that a worker may take to open its model
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
    key, before = api_key(), signal.getsignal(signal.SIGTERM)
    with logged(), _listener(config) as listener:
        if key is None and config.host not in _LOCAL:
            said = "event=open host=%s: anyone who reaches it may send pictures; set %s"
            logger.warning(said, config.host, KEY_VARIABLE)
        host, port = listener.getsockname()[:2]
        logger.info("event=start url=http://%s:%d", f"[{host}]" if ":" in host else host, port)
        try:
            if config.workers > 1:
                _serve_in_processes(config, listener)
            else:
                _serve_here(config, listener)
        finally:
            signal.signal(signal.SIGTERM, before)
        logger.info("event=end")


@contextmanager
def logged():
    """Lines of the server, and of uvicorn what it says of itself, go to standard error."""
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
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for (log, _), (level, propagate) in zip(logs, before):
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which also drops clients that let it wait for the rest of a request's
    head, or do not take their answer, for longer than the config's `patience` in seconds."""

    _timer = None

    def connection_made(self, transport) -> None:
        """Waits for the first head."""
        super().connection_made(transport)
        self._arm(self._no_head)

    def data_received(self, data: bytes) -> None:
        """Waits for the rest of a head."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._disarm()
        elif self._timer is None:
            self._arm(self._no_head)

    def on_response_complete(self) -> None:
        """Waits for the answer to be taken."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._arm(self._not_taken)

    def connection_lost(self, exc) -> None:
        """Waits no more."""
        self._disarm()
        super().connection_lost(exc)

    def _arm(self, then) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self.config.patience, then)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _no_head(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.timeout_keep_alive_handler()

    def _not_taken(self) -> None:
        self._timer = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()


class _Processes(Multiprocess):
    """uvicorn's workers, which get a SIGHUP each in place of an end."""

    def handle_hup(self) -> None:
        """Tells every worker."""
        for process in self.processes:
            if process.process.is_alive():
                os.kill(process.pid, signal.SIGHUP)

    def keep_subprocess_alive(self) -> None:
        """Starts a worker in place of one that died, whose figures of what it holds go, too."""
        for process in self.processes:
            if not process.process.is_alive():
                mark_process_dead(process.pid)
        super().keep_subprocess_alive()


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
        timeout_worker_healthcheck=_START,
    )
    found.patience = config.receive_timeout
    return found


def _serve_here(config: ServeConfig, listener: socket.socket) -> None:
    models = Models(lambda: open_model(config.model).to(usable_device(config.device)))
    server = uvicorn.Server(_uvicorn(config, functools.partial(create_app, config, models)))
    # before uvicorn takes the signal; when all is done it raises it again
    signal.signal(signal.SIGTERM, lambda *_: None if server.started else sys.exit(0))
    models.load()  # here, so that what is wrong with it is an error of the command
    server.run([listener])


def _serve_in_processes(config: ServeConfig, listener: socket.socket) -> None:
    with tempfile.TemporaryDirectory(prefix="segkern-") as folder:
        os.environ[FOLDER] = folder
        try:
            app = functools.partial(_worker_app, config, os.getpid())
            listener.set_inheritable(True)
            processes = _Processes(_uvicorn(config, app, config.workers), [listener])
            processes.run()
        finally:
            del os.environ[FOLDER]
    ended = (0, None, -signal.SIGTERM, -signal.SIGINT)
    failed = [p.exitcode for p in processes.processes if p.exitcode not in ended]
    if failed:
        raise RuntimeError(f"serve: a worker process ended with status {failed[0]}")


def _worker_app(config: ServeConfig, parent: int):
    """The application of a worker process."""
    logged().__enter__()  # until the process ends
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.workers))
    return create_app(config, told=lambda: os.kill(parent, signal.SIGHUP))
