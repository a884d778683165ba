"""What every request passes: its id, the key, limits of body and time, headers, the log.

It is ASGI middleware. What it refuses, and what raises `Refused` behind it, is answered as JSON
with a reason; a body that was not read to its end is dropped, and its connection closed.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field

from .metrics import Metrics
from .refused import Refused, full
from .settings import ServeConfig

FREE = ("/", "/docs", "/openapi.json", "/health", "/ready")  # without a key: they tell no secret
PATHS = (*FREE, "/segment", "/model", "/metrics", "/reload")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_LINGER = 5.0  # seconds in which what is left of a body is dropped, so that the answer is read
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)

logger = logging.getLogger("segkern.serve")


@dataclass
class Trace:
    """What is noted of a request.

    Attributes:
        id: of its header X-Request-ID, or a new one.
        start: on the clock of `time.monotonic`.
        stages: seconds, by `metrics.STAGES`.
        notes: what else the log names.
    """

    id: str
    start: float = field(default_factory=time.monotonic)
    stages: dict[str, float] = field(default_factory=dict)
    notes: dict[str, object] = field(default_factory=dict)


def trace_of(scope) -> Trace:
    """The trace of a request that passed the gate."""
    return scope["segkern.trace"]


class Gate:
    """The middleware.

    Args:
        app: ASGI.
        config: the limits.
        metrics: that count the requests.
        key: that clients must show; None lets everyone in.
    """

    def __init__(self, app, config: ServeConfig, metrics: Metrics, key: str | None):
        self.app, self.config, self.metrics = app, config, metrics
        self._key = None if key is None else hashlib.sha256(key.encode()).digest()
        self._bodies, self._most = 0, 4 * config.queue

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        trace = Trace(given if _ID.fullmatch(given) else uuid.uuid4().hex)
        scope["segkern.trace"] = trace
        limit = trace.start + self.config.receive_timeout
        body = _Body(receive, headers, self.config.max_bytes, limit)
        answer = _Answer(send, body, trace)
        try:
            self._check(scope, headers, body)
            with self._counted(scope, body):
                await self.app(scope, body.receive, answer.send)
        except Exception as error:
            if not isinstance(error, Refused):
                logger.exception("event=error id=%s", trace.id)
                error = Refused(500, "the server failed; its log says why")
            if answer.status is None:
                await answer.refuse(error)
        finally:
            self._note(scope, body, answer, trace)

    def _check(self, scope, headers: dict[bytes, str], body: "_Body") -> None:
        """What can be said before the body is read."""
        if self._key is not None and scope["path"] not in FREE:
            kind, _, token = headers.get(b"authorization", "").partition(" ")
            token = token if kind.lower() == "bearer" else headers.get(b"x-api-key", "")
            shown = hashlib.sha256(token.encode("latin-1")).digest()
            if not hmac.compare_digest(shown, self._key):
                reason = "a key is needed: Authorization: Bearer KEY, or X-API-Key: KEY"
                raise Refused(401, reason, {"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST" and headers.get(b"sec-fetch-site") == "cross-site":
            raise Refused(403, "requests from pages of other sites are not taken")
        body.check_length()

    @contextmanager
    def _counted(self, scope, body: "_Body"):
        """Room for a body that comes in, until its request is answered. What is refused before, or
        goes where no body is taken, is dropped as it comes and takes no room."""
        counted = not body.ended and scope["path"] not in FREE
        if counted and self._bodies >= self._most:
            raise full("requests", self._most)
        self._bodies += counted
        try:
            yield
        finally:
            self._bodies -= counted

    def _note(self, scope, body: "_Body", answer: "_Answer", trace: Trace) -> None:
        seconds, status = time.monotonic() - trace.start, answer.status or 499
        path = scope["path"] if scope["path"] in PATHS else "other"
        self.metrics.requests.labels(path, status).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        for stage, value in trace.stages.items():
            self.metrics.stages.labels(stage).observe(value)
        notes = {name: f"{1e3 * value:.1f}ms" for name, value in trace.stages.items()}
        notes = {"bytes": body.size, **trace.notes, **notes, "total": f"{1e3 * seconds:.1f}ms"}
        logger.info(
            "event=request id=%s client=%s method=%s path=%s status=%d %s",
            trace.id,
            (scope.get("client") or ("-",))[0],
            scope["method"],
            scope.get("raw_path", b"").decode("latin-1").encode("unicode_escape").decode(),
            status,
            " ".join(f"{name}={value}" for name, value in notes.items()),
        )


class _Body:
    """The body of a request within its limits.

    Attributes:
        comes: the client sends it, and does not wait to be asked for it (Expect: 100-continue).
        ended: it is there, or there is none.
        lost: the client is gone or was too slow.
        size: bytes that came.
    """

    def __init__(self, receive, headers: dict[bytes, str], most: int, until: float):
        self._receive, self._most, self._until = receive, most, until
        self._length = int(headers.get(b"content-length", "0"))
        self.ended = not self._length and b"transfer-encoding" not in headers
        self.comes, self.lost, self.size = b"expect" not in headers, False, 0

    def check_length(self) -> None:
        """Raises `Refused` for one that is too long."""
        if max(self._length, self.size) > self._most:
            reason = f"the body must have at most {self._most} bytes"
            got = f", got {self._length}" if self._length else ""
            raise Refused(413, reason + got)

    async def receive(self):
        """ASGI's, which raises `Refused` for a body that is too long or comes too slowly."""
        if self.ended:
            return await self._receive()
        self.comes = True
        try:
            left = self._until - time.monotonic()
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except TimeoutError as error:
            self.lost = True
            raise Refused(408, f"the body came too slowly: {self.size} bytes in time") from error
        if message["type"] == "http.disconnect":
            self.lost = True
            return message
        self.size += len(message.get("body", b""))
        self.check_length()
        self.ended = not message.get("more_body", False)
        return message

    async def drop(self) -> None:
        """Reads what still comes, for a while, and keeps nothing."""
        try:
            async with asyncio.timeout(_LINGER):
                while not (self.ended or self.lost):
                    message = await self._receive()
                    self.lost = message["type"] == "http.disconnect"
                    self.ended = not message.get("more_body", False)
        except TimeoutError:
            self.lost = True


class _Answer:
    """An answer on its way.

    Attributes:
        status: None until it began.
    """

    def __init__(self, send, body: _Body, trace: Trace):
        self._send, self._body, self._trace = send, body, trace
        self.status: int | None = None

    async def send(self, message) -> None:
        """ASGI's, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            await self._send({**message, "headers": self._headers(message["headers"])})
            return
        unread = self._body.comes and not (self._body.ended or self._body.lost)
        if message.get("more_body") or not unread:
            await self._send(message)
            return
        # closed with bytes that were not read, a connection may take the answer with it
        await self._send({**message, "more_body": True})
        await self._body.drop()
        await self._send({"type": "http.response.body", "body": b""})

    async def refuse(self, refused: Refused) -> None:
        """Answers with a reason."""
        content = {"detail": refused.reason, "request_id": self._trace.id}
        data = json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        headers |= refused.headers
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": data})

    def _headers(self, given) -> list[tuple[bytes, bytes]]:
        own = {name.lower().encode(): value.encode() for name, value in HEADERS.items()}
        own[b"x-request-id"] = self._trace.id.encode()
        if self._trace.stages:
            timing = (f"{name};dur={1e3 * x:.1f}" for name, x in self._trace.stages.items())
            own[b"server-timing"] = ", ".join(timing).encode()
        if not self._body.ended:
            own[b"connection"] = b"close"
        names = {name for name, _ in given}
        return [*given, *((name, value) for name, value in own.items() if name not in names)]
