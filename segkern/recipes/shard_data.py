"""A data set of any format as shards: reads its splits, writes them, says what is left out."""

import os
import warnings
from dataclasses import fields, replace
from pathlib import Path

from ..data import (
    Ade20kConfig,
    ClassMapsConfig,
    DataConfig,
    FolderConfig,
    ShardsConfig,
    ade20k_views,
    build_dataset,
    write_shards,
)

_TOLD = 20  # findings of a split that are printed
_FEW = 64  # pictures that one process reads as soon


def shard_data(
    config: DataConfig,
    target: Path,
    size: int,
    task: str | None = None,
    shuffle: bool = False,
    workers: int | None = None,
) -> None:
    """Writes both splits of a data set as shards, prints what is left out and what is written.

    Args:
        config: of the data set. Maps of classes are written for models of masks and of pixels.
        target: folder to write to.
        size: bytes of a shard.
        task: where the set holds several; None takes that of the config.
        shuffle, workers: as `write_shards` takes them; None takes a process a core, at most
            16.

    Raises:
        ValueError: it is none of files, has no such task or no train split, or see `write_shards`.
    """
    if isinstance(config, ShardsConfig):
        raise ValueError(f"shard: {config.root} must hold files, and holds shards")
    if isinstance(config, FolderConfig):
        config = ClassMapsConfig(config.root, config.layout, read=config.read)
    if task is not None and "task" in {field.name for field in fields(config)}:
        config = replace(config, task=task)
        if isinstance(config, Ade20kConfig):
            config = replace(config, views=ade20k_views(task))
    if task not in (None, config.task):
        raise ValueError(f"shard: task must be {config.task!r}, what is there, got {task!r}")
    splits = {}
    for split in ("train", "val"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                splits[split] = build_dataset(config, split)
            except ValueError as error:
                if split == "train":
                    raise
                print(f"{split}: {error}; shards of train alone are written")
                continue
        found = splits[split].faults
        found = found or [str(w.message) for w in told if w.category is UserWarning]
        for text in found[:_TOLD]:
            print(f"{split}: {text}")
        if len(found) > _TOLD:
            print(f"{split}: {len(found) - _TOLD} more findings, which `segkern data check` names")
    pictures = sum(map(len, splits.values()))
    if workers is None:
        workers = min(os.cpu_count() or 1, 16) if pictures > _FEW else 0
    settings = config.task, config.views, size, shuffle, workers
    index = write_shards(splits, target, *settings, tell=print)
    for split, shards in index.splits.items():
        count = sum(shard.samples for shard in shards)
        print(f"{split}: {count} of {len(splits[split])} pictures in {len(shards)} shards")
