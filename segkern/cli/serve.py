"""The command `segkern serve`."""

from typing import Annotated

import tyro

from ..deploy.serve import ServeConfig


def serve(
    model: Annotated[str, tyro.conf.Positional],
    host: str = ServeConfig.host,
    port: int = ServeConfig.port,
    workers: int = ServeConfig.workers,
    device: str = ServeConfig.device,
    batch: int = ServeConfig.batch,
    wait_ms: float = ServeConfig.wait_ms,
    queue: int = ServeConfig.queue,
    threads: int | None = ServeConfig.threads,
    max_bytes: int = ServeConfig.max_bytes,
    max_pixels: int = ServeConfig.max_pixels,
    timeout: float = ServeConfig.timeout,
    receive_timeout: float = ServeConfig.receive_timeout,
    cuda_graphs: bool = ServeConfig.cuda_graphs,
) -> None:
    """Serve a model over HTTP: a page for a browser at /, POST /segment for programs.

    With SEGKERN_API_KEY in the environment clients must show that key. SIGHUP, or POST /reload
    with the key, opens the model anew while requests run; SIGTERM and Ctrl-C answer what came
    before and end.

    Args:
        model: folder of a run or a model, a file, or a name on the Hugging Face hub.
        host: address to listen at; 0.0.0.0 is every address of the machine.
        port: 0 takes a free one, which the log names.
        workers: processes, each with a model of its own.
        device: "cpu", "cuda", or "auto" for cuda where there are kernels for it.
        batch: pictures of one size and the same options that go through the model together.
        wait_ms: milliseconds that a picture waits for others while the model is idle.
        queue: pictures that a worker holds at once; further ones are sent away with status 429.
        threads: of a worker, that decode, and as many that encode; not given, one a core, up to 4.
        max_bytes: of a request.
        max_pixels: width times height that a picture may have.
        timeout: seconds from a request to its answer.
        receive_timeout: seconds in which a request must be there, and its answer be taken.
        cuda_graphs: on a GPU run the model from a CUDA graph for sizes that come again and again.
    """
    config = ServeConfig(
        model,
        host,
        port,
        workers,
        device,
        batch,
        wait_ms,
        queue,
        threads,
        max_bytes,
        max_pixels,
        timeout,
        receive_timeout,
        cuda_graphs,
    )
    try:
        from ..deploy.serve.run import serve as run_serve
    except ImportError as error:
        package = {"multipart": "python-multipart", "prometheus_client": "prometheus-client"}
        name = (error.name or "").partition(".")[0]
        raise ImportError(
            f"serve needs {package.get(name, name)}: pip install {package.get(name, name)} (or "
            "segkern's extra `serve`: pip install '.[serve]' in its folder)"
        ) from error
    run_serve(config)
