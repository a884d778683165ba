"""Figures of a server in Prometheus' format, of all worker processes together."""

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # where workers share their figures, a variable
STAGES = ("receive", "decode", "queue", "model", "encode")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one worker."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "segkern_requests", "Requests answered", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "segkern_request_seconds",
            "From the head of a request to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stages = Histogram(
            "segkern_stage_seconds",
            "Of a request for segments: " + ", ".join(STAGES),
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch = Histogram(
            "segkern_batch_pictures",
            "Pictures that went through the model together, counted for each picture",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.held = Gauge(
            "segkern_pictures_held",
            "Pictures from decoding to answer",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.reloads = Counter(
            "segkern_reloads",
            "Times that the model was opened anew",
            ["outcome"],
            registry=registry,
        )
        self.generation = Gauge(
            "segkern_model_generation",
            "Models that a worker opened, the least of all workers",
            registry=registry,
            multiprocess_mode="livemin",
        )

    def exposition(self) -> bytes:
        """What GET /metrics answers."""
        if FOLDER not in os.environ:
            return generate_latest(self.registry)
        every = CollectorRegistry()
        multiprocess.MultiProcessCollector(every)
        return generate_latest(every)
