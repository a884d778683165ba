"""The service as an ASGI application, from its start to its end."""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ...models import open_model
from ...runtime.device import usable_device
from .batches import Batches, Places
from .gate import Gate
from .metrics import Metrics
from .models import Models
from .pages import add_pages
from .refused import Refused
from .segments import add_segment
from .settings import ServeConfig, api_key
from .watch import add_watch, segkern_version

_PIXELS_HELD = 4  # times `max_pixels`

logger = logging.getLogger("segkern.serve")


def create_app(
    config: ServeConfig, models: Models | None = None, told: Callable[[], None] | None = None
) -> FastAPI:
    """The service as an ASGI application, for uvicorn or another server of one's own.

    The key that clients must show is that of the environment's SEGKERN_API_KEY.

    Args:
        config: what is served, and the limits.
        models: that hold the model; None opens `config.model` when the application starts.
        told: called when a reload that was asked for over HTTP went well, such as to tell other
            workers.

    Returns:
        the application, which loads the model and starts its threads with its lifespan.

    Raises:
        ValueError: the key is none that a header can hold.
    """
    models = models or Models(lambda: open_model(config.model).to(usable_device(config.device)))
    metrics, key = Metrics(), api_key()
    app = FastAPI(
        title="segkern",
        description="Pictures in, segments out.",
        version=segkern_version(),
        docs_url=None,  # FastAPI's page loads scripts from elsewhere
        redoc_url=None,
        lifespan=lambda app: _running(app, config, models, metrics),
    )
    app.add_middleware(Gate, config=config, metrics=metrics, key=key)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _other)
    add_segment(app, config, models, metrics)
    add_watch(app, config, models, metrics, reloader(models, metrics), key is not None, told)
    add_pages(app)
    return app


def reloader(models: Models, metrics: Metrics) -> Callable:
    """An async function that opens the model anew; it logs what went wrong, and returns it."""

    async def reload() -> Exception | None:
        try:
            served = await asyncio.get_running_loop().run_in_executor(None, models.load)
        except Exception as error:
            logger.exception("event=reload_failed")
            metrics.reloads.labels("failed").inc()
            return error
        metrics.reloads.labels("done").inc()
        metrics.generation.set(served.generation)
        return None

    return reload


@asynccontextmanager
async def _running(app: FastAPI, config: ServeConfig, models: Models, metrics: Metrics):
    loop, state, tasks = asyncio.get_running_loop(), app.state, set()

    def hang_up() -> None:
        task = loop.create_task(reloader(models, metrics)())
        tasks.add(task)  # the loop keeps no task alive by itself
        task.add_done_callback(tasks.discard)

    # what follows ends here, in this thread: an interpreter that ends starts no others
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            # before the model is opened: one that comes meanwhile opens it once more
            loop.add_signal_handler(signal.SIGHUP, hang_up)
            stack.callback(loop.remove_signal_handler, signal.SIGHUP)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # a worker starts without
        if models.current is None:
            await loop.run_in_executor(None, models.load)
        elif models.stale:
            hang_up()
        metrics.generation.set(models.current.generation)
        state.places = Places(config.queue, _PIXELS_HELD * config.max_pixels)
        for name in ("encoding", "decoding"):
            pool = ThreadPoolExecutor(config.pool, f"segkern-{name}")
            setattr(state, name, stack.enter_context(pool))
        state.batches = Batches(config.batch, config.wait_ms / 1e3, config.cuda_graphs)
        stack.callback(state.batches.close)
        yield


def _invalid(request, error: RequestValidationError):
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"][1:])) or "the request"
    rule = first["msg"][:1].lower() + first["msg"][1:]
    raise Refused(422, f"{name}: {rule}, got {str(first.get('input'))[:80]!r}")


def _other(request, error: HTTPException):
    raise Refused(error.status_code, str(error.detail), dict(error.headers or {}))
