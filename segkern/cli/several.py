"""Commands that start themselves in several processes."""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature

from ..runtime.launch import launch
from ..runtime.processes import started


def in_processes(command: Callable, arguments: Sequence[str]) -> Callable:
    """The command, which runs in as many processes as its option `processes` says, or in those
    that a launcher started.

    Args:
        command: takes `processes`.
        arguments: of the whole command line, for the others.
    """

    @wraps(command)
    def run(*given, **options):
        count = signature(command).bind(*given, **options).arguments.get("processes", 1)
        name = command.__name__
        if count < 1:
            raise ValueError(f"{name}: --processes must be at least 1, got {count}")
        if count > 1:
            return launched(name, arguments, count)
        return command(*given, **options)

    return run


def launched(name: str, arguments: Sequence[str], processes: int) -> int:
    """Runs a command line in so many processes, each without the option that says so.

    Args:
        name: of the command.
        arguments: of the whole command line.
        processes: at least 2.

    Returns:
        the exit code.
    """
    if started() > 1:
        raise ValueError(
            f"{name}: --processes must be left out where a launcher has started {started()} "
            f"(WORLD_SIZE), got {processes}"
        )
    return launch(_without(arguments), processes)


def _without(arguments: Sequence[str]) -> list[str]:
    """Without the option that was followed."""
    own, left = [], iter(arguments)
    for argument in left:
        if argument == "--processes":
            next(left)
        elif not argument.startswith("--processes="):
            own.append(argument)
    return own
