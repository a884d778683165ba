"""The command `segkern data shard`, whose options are others than those of check and show."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro

from ..data import FolderConfig, find_format
from ..data.folder import Layout
from ..data.write_shards import size_in_bytes
from ..recipes.shard_data import shard_data
from .arguments import Task


def data_command(arguments: list[str], others: Callable) -> Callable:
    """The command `data` that arguments ask for: this one, or that of the others."""
    if arguments[:2] != ["data", "shard"]:
        return others

    def data(
        action: tyro.conf.Positional[Literal["shard"]],
        source: tyro.conf.Positional[str],
        target: tyro.conf.Positional[Path],
        size: str = "500MB",
        task: Task | None = None,
        layout: Layout | None = None,
        shuffle: bool = False,
        workers: int | None = None,
    ) -> None:
        """Write a data set as WebDataset shards, which train, evaluate and data read as any other.

        A stopped run goes on where it was, when it is started again in the same way.

        Args:
            action: shard.
            source: folder of a data set; its format is told from the files.
            target: folder for the shards and their index.
            size: of a shard, as 500MB or 1GiB.
            task: where the set holds several; not given, panoptic, or what is there.
            layout: of a folder of maps of classes; not given, the format is told from the files.
            shuffle: write the pictures in an order that chance drew, for a set that is sorted, by
                city or by scene, and larger than what training shuffles together (--data.buffer).
            workers: processes that read; not given, one a core, at most 16.
        """
        most = size_in_bytes(size)
        found, line = find_format(source) if layout is None else (FolderConfig(source, layout), "")
        print(line or f"{source}: data of kind folder ({layout})")
        shard_data(found, target, most, task, shuffle, workers)
        print(f"written: {target}; train on it with --data.root {target}")

    return data
