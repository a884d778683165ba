"""Settings of a server, checked before it starts."""

import os
from dataclasses import dataclass

KEY_VARIABLE = "SEGKERN_API_KEY"


@dataclass(frozen=True)
class ServeConfig:
    """What is served, where, and within which limits.

    Attributes:
        model: what `open_model` takes: a folder, a file, or a name on the hub.
        host: address to listen at.
        port: 0 takes a free one, which the log names.
        workers: processes, each with a model of its own.
        device: "cpu", "cuda", or "auto" for cuda where there are kernels for it.
        batch: pictures that go through the model together, at most.
        wait_ms: milliseconds that a picture waits for others to go with, while the model is idle.
        queue: pictures that a worker holds at once, from decoding to the answer.
        threads: of a worker, that decode pictures, and as many that encode answers; None is one a
            core, at most 4.
        max_bytes: of a request's body.
        max_pixels: width times height of a picture; a worker holds at most four times as many.
        timeout: seconds from a request to its answer.
        receive_timeout: seconds in which a request must be there, and its answer be taken.
        cuda_graphs: on a GPU run the model from a CUDA graph for sizes that come again.

    Raises:
        TypeError, ValueError: a setting of another kind or out of range.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    device: str = "auto"
    batch: int = 4
    wait_ms: float = 2.0
    queue: int = 64
    threads: int | None = None
    max_bytes: int = 2**25
    max_pixels: int = 2**25
    timeout: float = 30.0
    receive_timeout: float = 15.0
    cuda_graphs: bool = True

    def __post_init__(self):
        least = {"workers": 1, "batch": 1, "queue": 1, "max_bytes": 1, "max_pixels": 1, "port": 0}
        if self.threads is not None:
            least["threads"] = 1
        for name, low in least.items():
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"serve: {name} must be an integer, got {value!r}")
            if value < low:
                raise ValueError(f"serve: {name} must be at least {low}, got {value}")
        if self.port > 65535:
            raise ValueError(f"serve: port must be at most 65535, got {self.port}")
        if not 0 <= self.wait_ms <= 10_000:
            raise ValueError(f"serve: wait_ms must be in [0, 10000], got {self.wait_ms}")
        for name in ("timeout", "receive_timeout"):
            if not 0 < getattr(self, name) <= 3600:
                raise ValueError(
                    f"serve: {name} must be above 0 and at most 3600 seconds, "
                    f"got {getattr(self, name)}"
                )

    @property
    def pool(self) -> int:
        """Threads of a pool."""
        return self.threads or min(4, os.cpu_count() or 1)


def api_key() -> str | None:
    """The key that clients must show, of the environment; None where there is none.

    Raises:
        ValueError: it is not 8 to 256 printable ASCII characters without spaces, which a header
            can hold.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if not (8 <= len(key) <= 256 and key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            f"serve: {KEY_VARIABLE} must be 8 to 256 printable ASCII characters without spaces, "
            f"got {len(key)} characters"
        )
    return key
