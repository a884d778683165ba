"""Pictures in the bodies of requests: one as it is, or the files of a form."""

from fastapi import Request
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from .pictures import Body
from .refused import Refused

MOST = 16  # files of a form


def gone() -> Refused:
    """A request whose client does not wait for the answer."""
    return Refused(499, "the client went away")


async def bodies_of(request: Request, max_bytes: int) -> list[Body]:
    """The pictures' files, as a client sent them.

    Args:
        request: with a body of a picture's content type, or a form (multipart/form-data) of files,
            whose names do not matter.
        max_bytes: of the body, which the gate counts; nothing is written to the disk.

    Raises:
        Refused: the body is of another type, damaged, has fields that are no files or more files
            than `MOST`, or the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    coded = request.headers.get("content-encoding", "identity")
    if coded.lower() != "identity":
        raise Refused(415, f"a body must not be compressed, got Content-Encoding {coded:.40}")
    try:
        if kind.startswith("image/"):
            data = bytearray()
            async for part in request.stream():
                data += part
            return [Body(bytes(data))]
        if kind == "multipart/form-data":
            return await _files(request, max_bytes)
    except ClientDisconnect as error:
        raise gone() from error
    raise Refused(
        415,
        "a body must be a picture (Content-Type: image/...) or a form of files "
        f"(multipart/form-data), got {kind[:80] or 'no content type'}",
    )


async def _files(request: Request, max_bytes: int) -> list[Body]:
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=MOST, max_fields=MOST, max_part_size=4096
    )
    parser.spool_max_size = max_bytes
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, AssertionError) as error:
        why = getattr(error, "message", "it has no boundary")
        raise Refused(400, f"the form cannot be read: {why}") from error
    try:
        found = form.multi_items()
        for name, value in found:
            if isinstance(value, str):
                raise Refused(
                    422,
                    f"field {name[:40]!r} of the form must be a file; addresses and paths are not "
                    "taken, and options belong into the query",
                )
        if not found:
            raise Refused(400, "the form has no file")
        many = len(found) > 1
        return [
            Body(await file.read(), f"image {i}" if many else "image")
            for i, (_, file) in enumerate(found)
        ]
    finally:
        await form.close()
