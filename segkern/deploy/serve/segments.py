"""POST /segment: the way of a request from pictures to an answer."""

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request, Response

from ...inference.segment import check_one
from ...ops.segment_map import TASKS
from ...structures.settings import Options
from .answers import FORMATS, encode
from .batches import VIEWS, Done, Job
from .bodies import bodies_of, gone
from .gate import Trace, trace_of
from .metrics import Metrics
from .models import Models, Served
from .pictures import Body, Picture, decode, pixels_of
from .refused import Refused
from .settings import ServeConfig

_OPTIONS = ("task", "threshold", "top_k", "format")
_MOST_PAIRS = 10_000

_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": {"type": "object", "properties": {"image": _FILES}}},
        "image/*": {"schema": {"type": "string", "format": "binary"}},
    },
}
_REASONS = {
    400: "An empty or damaged form or file",
    401: "No key, or another",
    408: "The body came too slowly",
    413: "Too many bytes, pixels or pictures",
    415: "No picture that is taken",
    422: "A damaged picture, or an option that is out of range or not for this model",
    429: "Too much is under way; Retry-After says when to try again",
    504: "No answer in time",
}


def add_segment(app: FastAPI, config: ServeConfig, models: Models, metrics: Metrics) -> None:
    """Adds the path to an application, whose state has batches, places and pools."""

    @app.post(
        "/segment",
        summary="Segments of one picture or several",
        openapi_extra={"requestBody": _BODY},
        responses={status: {"description": why} for status, why in _REASONS.items()},
    )
    async def segment(
        request: Request,
        task: Annotated[
            Literal[TASKS] | None, Query(description="Not given, the model's first.")
        ] = None,
        threshold: Annotated[
            float | None,
            Query(ge=0, le=1, description="Least score: of panoptic segments, or of instances."),
        ] = None,
        top_k: Annotated[
            int | None,
            Query(
                ge=1, le=_MOST_PAIRS, description="Instances that are returned; not given, 100."
            ),
        ] = None,
        format: Annotated[
            Literal[tuple(FORMATS)],
            Query(description="png is the label map; it and overlay are of one picture."),
        ] = "json",
    ) -> Response:
        """Of one picture an object, of a form with several files a list.

        The body is a picture, or a form of up to 16 files.
        """
        trace, served = trace_of(request.scope), models.current
        if unknown := set(request.query_params) - set(_OPTIONS):
            known = ", ".join(_OPTIONS)
            raise Refused(422, f"options must be of {known}, got {min(unknown)[:40]!r}")
        options = Options(threshold, top_k=top_k)
        try:
            task = check_one("segment", served.model, task, options, VIEWS)
        except (TypeError, ValueError) as error:
            raise Refused(422, str(error)) from error
        bodies = await bodies_of(request, config.max_bytes)
        trace.stages["receive"] = time.monotonic() - trace.start
        if len(bodies) > 1 and not FORMATS[format].endswith("json"):
            raise Refused(422, f"format {format} is for one picture, got {len(bodies)}")
        work = _Work(app.state, config, served, task, options, format, trace, metrics)
        left = trace.start + config.timeout - time.monotonic()
        content = await _unless_gone(work.answer(bodies), request, left, config.timeout)
        return Response(content, media_type=FORMATS[format])


async def _unless_gone(work, request: Request, left: float, limit: float):
    """What the work gives; it is cancelled when its time is over or the client goes away."""
    work, end = asyncio.ensure_future(work), asyncio.ensure_future(_end_of(request))
    try:
        done, _ = await asyncio.wait({work, end}, timeout=left, return_when="FIRST_COMPLETED")
        if work in done:
            return work.result()
        raise gone() if end in done else Refused(504, f"no answer within {limit:g} seconds")
    finally:
        work.cancel()
        end.cancel()
        await asyncio.wait({work, end})
        if not work.cancelled():
            work.exception()  # seen, so that asyncio does not report it again


async def _end_of(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Work:
    """One request's work."""

    def __init__(
        self,
        state,
        config: ServeConfig,
        served: Served,
        task: str,
        options: Options,
        form: str,
        trace: Trace,
        metrics: Metrics,
    ):
        self.state, self.config, self.served = state, config, served
        self.task, self.options, self.form = task, options, form
        self.trace, self.metrics = trace, metrics

    async def answer(self, bodies: Sequence[Body]) -> bytes:
        """Decodes, runs and encodes, in threads."""
        places, count = self.state.places, len(bodies)
        with places.take("pictures", count):
            self.metrics.held.inc(count)
            try:
                settings, most = self.served.model.config.input, self.config.max_pixels
                measured = [(body, settings.channels, most) for body in bodies]
                sizes = await self._decoding(pixels_of, measured)
                self.trace.notes |= {"pictures": count, "pixels": sum(sizes)}
                with places.take("pixels", sum(sizes)):
                    return await self._answer(bodies)
            finally:
                self.metrics.held.dec(count)

    async def _answer(self, bodies: Sequence[Body]) -> bytes:
        start = time.monotonic()
        keep, settings = self.form == "overlay", self.served.model.config.input
        most = self.config.max_pixels
        pictures = await self._decoding(decode, [(x, settings, most, keep) for x in bodies])
        self.trace.stages["decode"] = time.monotonic() - start
        done = await self._run([x.input for x in pictures])
        self.trace.stages["queue"] = max(x.queued for x in done)
        self.trace.stages["model"] = max(x.ran for x in done)
        self.trace.notes["batch"] = max(x.together for x in done)
        for one in done:
            self.metrics.batch.observe(one.together)
        start = time.monotonic()
        loop = asyncio.get_running_loop()
        content = await loop.run_in_executor(self.state.encoding, self._encoded, done, pictures)
        self.trace.stages["encode"] = time.monotonic() - start
        return content

    async def _decoding(self, function, arguments: Sequence[tuple]) -> list:
        loop, pool = asyncio.get_running_loop(), self.state.decoding
        return await asyncio.gather(*(loop.run_in_executor(pool, function, *a) for a in arguments))

    async def _run(self, inputs: list) -> list[Done]:
        try:
            jobs = [Job(self.served, self.task, self.options, x) for x in inputs]
        except ValueError as error:  # such as a picture larger than what the model pads to
            raise Refused(422, str(error)) from error
        try:
            futures = [asyncio.wrap_future(self.state.batches.put(job)) for job in jobs]
            return await asyncio.gather(*futures)
        finally:
            self.state.batches.give_up(jobs)  # where one failed, or nobody waits for them

    def _encoded(self, done: Sequence[Done], pictures: Sequence[Picture]) -> bytes:
        results = [x.result for x in done]
        for result, picture in zip(results, pictures):
            result.image = picture.shown
        return encode(results, self.form, time.monotonic() - self.trace.start)
