"""Results of many pictures in one file: lines of JSON, or a table in Parquet."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..io.atomic_files import atomic

FORMATS = ("jsonl", "parquet")


def shard_name(number: int, format: str) -> str:
    """Name of a shard, by its number alone: who wrote it does not matter."""
    return f"shard-{number:06d}.{format}"


def errors_name(number: int) -> str:
    """Name of the file that says what was wrong in a shard."""
    return f"errors-{number:06d}.jsonl"


@contextmanager
def writer(path: Path, format: str) -> Iterator[Callable[[list[dict]], None]]:
    """Gives a function that adds rows to a new shard, which is whole or not there.

    Args:
        path: of the shard.
        format: "jsonl", an object a line, or "parquet", the same objects as rows: number int64,
            image and archive text, task text, size [H, W], and segments, a list of what
            `Segmentation.to_json` lists.

    Raises:
        ImportError: Parquet, and pyarrow is not installed.
        OSError: it cannot be written.
    """
    with atomic(path) as temporary:
        if format == "parquet":
            arrow, parquet = import_arrow()
            schema = _schema(arrow)
            with parquet.ParquetWriter(temporary, schema, compression="zstd") as table:
                yield lambda rows: table.write_table(arrow.Table.from_pylist(rows, schema))
        else:
            with temporary.open("w", encoding="utf-8") as file:
                yield lambda rows: file.writelines(
                    f"{json.dumps(row, allow_nan=False)}\n" for row in rows
                )


def import_arrow() -> tuple:
    """pyarrow, and its module of Parquet.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "predict: format parquet needs pyarrow, which is not installed: pip install pyarrow "
            "(format jsonl needs nothing)"
        ) from error
    return pyarrow, pyarrow.parquet


def _schema(arrow):
    integers = arrow.list_(arrow.int64())
    segment = {
        "id": arrow.int64(),
        "label_id": arrow.int64(),
        "label": arrow.string(),
        "score": arrow.float64(),
        "isthing": arrow.bool_(),
        "area": arrow.int64(),
        "bbox": integers,
        "segmentation": arrow.struct({"size": integers, "counts": arrow.string()}),
    }
    return arrow.schema(
        {
            "number": arrow.int64(),
            "image": arrow.string(),
            "archive": arrow.string(),
            "task": arrow.string(),
            "size": integers,
            "segments": arrow.list_(arrow.struct(segment)),
        }
    )
