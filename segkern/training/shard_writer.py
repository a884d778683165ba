"""Folders of torch.distributed.checkpoint that have their name only when they are whole.

.NAME/   every process writes its part and says its size and checksum
  |      the first one: what all have said, the metadata, all of it on the disk
NAME/    its name
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.futures import Future

from ..io.atomic_files import name_folder
from ..weights.shards import METADATA, checksum
from .checkpoint import ABOUT, write_plain


class Writer(FileSystemWriter):
    """What `torch.distributed.checkpoint.save` writes with.

    Args:
        folder: to make; `.NAME` beside it is not there.
        about: written to it as JSON, with the sizes and checksums of the files beside them.
        ready: is called by the first process between the last byte and the name.
    """

    def __init__(self, folder: Path, about: dict, ready: Callable[[], None]):
        super().__init__(folder.with_name(f".{folder.name}"))
        self.folder, self.about, self.ready = folder, about, ready

    def storage_meta(self) -> StorageMeta:
        """Without the path, which is another in the end."""
        return StorageMeta(save_id=self.save_id)

    def write_data(self, plan, planner) -> Future:
        """Writes the part of this process, and reads it once for the sums of its files."""
        try:
            written = super().write_data(plan, planner).value()
        except RuntimeError as error:  # torch.save's, which knows no reason
            cause = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror) from error
        held = {}
        for name in {result.storage_data.relative_path for result in written}:
            path = Path(self.path) / name
            held[name] = [path.stat().st_size, checksum(path)]
        done = Future()
        done.set_result([replace(x, storage_data=(x.storage_data, held)) for x in written])
        return done

    def finish(self, metadata: Metadata, results: list[list]) -> None:
        """By the first process, when all have written."""
        files = {}
        for _, held in (x.storage_data for part in results for x in part):
            files |= held
        super().finish(
            metadata,
            [[replace(x, storage_data=x.storage_data[0]) for x in part] for part in results],
        )
        path = Path(self.path)
        files[METADATA] = [(path / METADATA).stat().st_size, checksum(path / METADATA)]
        write_plain(path / ABOUT, self.about | {"files": files})
        self.ready()
        name_folder(path, self.folder)
