"""Requests that are not answered with a result: a status and a reason."""


class Refused(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        reason: a sentence for the client.
        headers: of the answer.
    """

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None):
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers or {}


def full(what: str, most: int) -> Refused:
    """A request for which there is no room now."""
    return Refused(429, f"busy: {most} {what} are under way; try again", {"Retry-After": "1"})
