"""What operators ask: health, readiness, figures, the model, another model."""

import asyncio
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastapi import FastAPI, Response

from ...io.overlay import colour
from .answers import FORMATS
from .bodies import MOST
from .metrics import CONTENT_TYPE, Metrics
from .models import Models
from .pictures import FORMATS as PICTURES
from .refused import Refused
from .settings import KEY_VARIABLE, ServeConfig


def segkern_version() -> str:
    """Of the package that is installed."""
    try:
        return version("segkern")
    except PackageNotFoundError:
        return "unknown"


def add_watch(
    app: FastAPI,
    config: ServeConfig,
    models: Models,
    metrics: Metrics,
    reload: Callable,
    keyed: bool,
    told: Callable[[], None] | None,
) -> None:
    """Adds the paths to an application; `reload` opens the model anew and returns an error."""

    @app.get("/health", summary="Whether the process answers")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether a model takes pictures", responses={503: {}})
    async def ready() -> dict:
        if models.current is None or not app.state.batches.alive:
            raise Refused(503, "no model takes pictures")
        return {"status": "ready", "generation": models.current.generation}

    @app.get("/metrics", summary="Figures for Prometheus")
    async def figures() -> Response:
        loop = asyncio.get_running_loop()
        content = await loop.run_in_executor(app.state.encoding, metrics.exposition)
        return Response(content, media_type=CONTENT_TYPE)

    @app.get("/model", summary="The model, its labels, and the limits")
    async def model() -> dict:
        served = models.current
        settings = served.model.config
        names, stuff = settings.labels.names or {}, settings.labels.stuff
        return {
            "name": Path(config.model).name,
            "kind": settings.kind,
            "tasks": list(settings.tasks),
            "generation": served.generation,
            "since": round(served.since),
            "device": str(next(served.model.parameters()).device),
            "version": segkern_version(),
            "labels": [
                {
                    "id": k,
                    "name": names.get(k, str(k)),
                    "isthing": k not in stuff,
                    "colour": colour(k),
                }
                for k in range(settings.num_labels)
            ],
            "limits": {
                "bytes": config.max_bytes,
                "pixels": config.max_pixels,
                "pictures": MOST,
                "seconds": config.timeout,
                "pictures_formats": PICTURES,
                "formats": list(FORMATS),
            },
        }

    @app.post(
        "/reload",
        summary="Opens the model anew; requests that are under way keep the last",
        responses={403: {"description": "The server has no key"}, 500: {}},
    )
    async def another() -> dict:
        if not keyed:
            raise Refused(403, f"a model is reloaded where the server has a key ({KEY_VARIABLE})")
        if (error := await reload()) is not None:
            why = " ".join(str(error).split())
            raise Refused(500, f"the last model stays, as another could not be opened: {why}")
        if told is not None:
            told()
        return {"status": "reloaded", "generation": models.current.generation}
