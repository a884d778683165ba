"""Pictures that are not files: addresses on the network, data URIs, bytes, open files."""

import base64
import http.client
import string
import time
import urllib.request as request
from collections.abc import Sequence
from io import BytesIO
from urllib.parse import quote

TIMEOUT = 30.0  # seconds
MAX_BYTES = 2**26  # of a picture's file: 64 MiB
WAITS = (0.5, 2.0, 8.0)  # seconds before a server is asked again
_AT_ONCE = 2**16
_LATER = (408, 425, 429)  # what a server says that may answer later


def is_url(source) -> bool:
    """Whether it is text that begins with http:// or https://."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def open_source(source, name: str = "image", timeout: float = TIMEOUT, max_bytes: int = MAX_BYTES):
    """What `io.images.read_image` takes, from any source of a picture.

    Args:
        source: an address (http://, https://), a data URI (data:image/png;base64,..., in lines
            or one), the bytes of a picture's file, or a file open for reading in binary mode,
            which is read to its end; anything else comes back as it is.
        name: begins the message of an error.
        timeout: seconds to wait for a server, and that what it sends may then take.
        max_bytes: that a server may send.

    Returns:
        the bytes of the picture's file, not decoded, as `NamedBytes`; or `source`.

    Raises:
        TypeError: a file open as text.
        OSError: the address cannot be fetched.
        ValueError: more than `max_bytes`, no base64, or a file that is closed or open for writing.
    """
    if is_url(source):
        return NamedBytes(fetch(source, name, timeout, max_bytes), f"{name}: {source}")
    if isinstance(source, str) and source[:5].lower() == "data:":
        return NamedBytes(_decoded(source, name), name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return NamedBytes(bytes(source), name)
    if not hasattr(source, "read"):
        return source
    try:
        data = source.read()
    except ValueError as error:
        raise ValueError(f"{name}: a file must be open for reading: {error}") from error
    if not isinstance(data, (bytes, bytearray)):
        raise TypeError(
            f"{name}: a file must be open in binary mode, reading it gave {type(data).__name__}"
        )
    return NamedBytes(data, name)


def fetch(
    url: str,
    name: str = "image",
    timeout: float = TIMEOUT,
    max_bytes: int = MAX_BYTES,
    part: tuple[int, int] | None = None,
) -> bytes:
    """What an address holds; redirections to other addresses of http and https are followed.

    Args:
        url: http:// or https://; the proxies of the environment are used.
        name, timeout, max_bytes: as in `open_source`.
        part: first byte that is wanted and the one after the last; None for all. Where the file
            ends before, fewer come.

    Raises:
        TypeError: timeout or max_bytes is no number.
        OSError: it cannot be fetched.
        ValueError: the server sends more than `max_bytes` or no parts of files, or timeout is not
            positive.
    """
    for limit, value in (("timeout", timeout), ("max_bytes", max_bytes)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: {limit} must be a number, got {value!r}")
    if not timeout > 0:
        raise ValueError(f"{name}: timeout must be above 0 seconds, got {timeout}")
    try:
        quoted = quote(url, safe=string.punctuation)
        asked = request.Request(quoted, headers={"User-Agent": "segkern"})
        if part is not None:
            asked.add_header("Range", f"bytes={part[0]}-{part[1] - 1}")
    except ValueError as error:
        raise ValueError(f"{name}: {url} is no address: {error}") from error
    try:
        with _opener().open(asked, timeout=timeout) as answer:
            if part is not None and answer.status != http.client.PARTIAL_CONTENT:
                raise ValueError(
                    f"{name}: {url}: its server must send parts of files (Range), as stores of "
                    f"objects and most servers of files do, got status {answer.status}"
                )
            length = answer.headers.get("Content-Length", "")
            length = int(length) if length.isdecimal() else None
            data, until = bytearray(), time.monotonic() + timeout
            while (length or 0) <= max_bytes and (part := answer.read1(_AT_ONCE)):
                data += part
                if len(data) > max_bytes:
                    break
                if time.monotonic() > until:
                    raise TimeoutError(f"{len(data)} bytes came in {timeout:g} seconds")
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{name}: {url} cannot be fetched: {error}") from error
    if max(length or 0, len(data)) > max_bytes:
        raise ValueError(
            f"{name}: {url} must send at most max_bytes = {max_bytes} bytes, got "
            f"{length or 'more'}"
        )
    if length is not None and len(data) < length:
        raise OSError(f"{name}: {url} cannot be fetched: it ended after {len(data)} of {length}")
    return bytes(data)


def fetch_patiently(
    url: str,
    name: str,
    part: tuple[int, int] | None = None,
    max_bytes: int = MAX_BYTES,
    waits: Sequence[float] = WAITS,
) -> bytes:
    """As `fetch`, asking again where a server is busy or a connection breaks.

    Args:
        url, name, part, max_bytes: as of `fetch`.
        waits: seconds before each further attempt.

    Raises:
        OSError: no attempt fetched it, or the server says that it never will (a status of 400 to
            499 but 408, 425 and 429).
        ValueError: as `fetch`.
    """
    for wait in (*waits, None):
        try:
            return fetch(url, name, max_bytes=max_bytes, part=part)
        except OSError as error:
            status = getattr(error.__cause__, "code", 500)
            if wait is None or (status < 500 and status not in _LATER):
                raise
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


class NamedBytes(BytesIO):
    """Bytes that messages call by their name, as a file by its path."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self._name = name

    def __str__(self) -> str:
        return self._name


def _opener() -> request.OpenerDirector:
    """Knows http and https alone, also where a server sends us on."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.UnknownHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPRedirectHandler,
        request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _decoded(uri: str, name: str) -> bytes:
    head, comma, data = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(
            f"{name}: a data URI must be data:image/KIND;base64,DATA, got {uri[:40]!r}"
        )
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"{name}: a data URI must hold base64: {error}") from error
