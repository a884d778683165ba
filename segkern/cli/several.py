"""Commands that start themselves in several processes."""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature

from ..runtime.processes import join, launch, started


def in_processes(command: Callable, arguments: Sequence[str]) -> Callable:
    """The command, which runs in as many processes as its option `processes` says, or in those
    that torchrun started.

    Args:
        command: takes `processes`.
        arguments: of the whole command line, for the others.
    """

    @wraps(command)
    def run(*given, **options):
        count = signature(command).bind(*given, **options).arguments.get("processes", 1)
        if count < 1:
            raise ValueError(f"{command.__name__}: --processes must be at least 1, got {count}")
        if count > 1 and not started():
            return launch(count, arguments)
        join()
        return command(*given, **options)

    return run
