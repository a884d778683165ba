"""Folders of torch.distributed.checkpoint, read without executing anything that they hold.

.metadata      a pickle: where in which file each part of each tensor lies
NAME.distcp    tensors, one file a process that wrote
"""

import pickle
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

METADATA = ".metadata"
_CLASSES = (
    metadata.Metadata,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,  # known, so that it is refused by what it stands for
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata._MEM_FORMAT_ENCODING,
    _StorageInfo,
)
# what a pickle may name, and what it gets: values that do nothing when they are made
_HARMLESS = {
    **{f"{made.__module__}.{made.__qualname__}": made for made in _CLASSES},
    **{str(x): x for x in vars(torch).values() if isinstance(x, torch.dtype)},
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": {str(torch.strided): torch.strided}.__getitem__,
}


class _Unpickler(pickle.Unpickler):
    """Makes what describes tensors, and nothing else that a pickle names."""

    def find_class(self, module: str, name: str):
        if (found := f"{module}.{name}") not in _HARMLESS:
            raise ValueError(f"holds a {found}, which is code and not run here")
        return _HARMLESS[found]


def read_metadata(folder: str | Path) -> metadata.Metadata:
    """What the folder says of its tensors.

    Raises:
        ValueError: it is not there, cut short, names code, or speaks of anything but tensors in
            files of the folder; says what in one line.
    """
    try:
        with (Path(folder) / METADATA).open("rb") as file:
            found = _Unpickler(file).load()
        for name, held in found.state_dict_metadata.items():
            if not isinstance(held, metadata.TensorStorageMetadata):
                raise ValueError(f"{name!r} is no tensor: it would be unpickled")
        for index, place in found.storage_data.items():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"{index.fqn!r} lies outside of the folder")
            if place.transform_descriptors:
                raise ValueError(f"{index.fqn!r} is compressed")
    except FileNotFoundError as error:
        raise ValueError(f"{METADATA} is missing") from error
    except Exception as error:  # a foreign or cut file makes the unpickler raise anything
        reason = str(error).partition("\n")[0][:160]
        raise ValueError(f"{METADATA}: {reason or type(error).__name__}") from error
    return found


class Reader(FileSystemReader):
    """What `torch.distributed.checkpoint.load` reads with: its own would run the pickle."""

    def read_metadata(self, rank: int | None = None) -> metadata.Metadata:
        """As `read_metadata`; of a rank alone there is none."""
        if rank is not None:
            raise ValueError("the metadata of all processes could not be read")
        found = read_metadata(self.path)
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


def empty_tensors(folder: str | Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Tensors to read into, of the names, shapes and dtypes that the folder has.

    Raises:
        ValueError: as `read_metadata`.
    """
    return {
        name: torch.empty(held.size, dtype=held.properties.dtype, device=device)
        for name, held in read_metadata(folder).state_dict_metadata.items()
    }


def read(tensors: dict[str, torch.Tensor], folder: str | Path, alone: bool = False) -> None:
    """Reads into tensors, of which each process has its part where they are distributed.

    Args:
        tensors: by name.
        folder: that has them all.
        alone: in this process, whatever others do; else all processes of the group call it.

    Raises:
        ValueError: it cannot be read; in all processes where one could not.
    """
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    quiet_without_group()
    try:
        dcp.load(tensors, storage_reader=Reader(folder), no_dist=alone or not group)
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        reason = str(cause).partition("\n")[0][:160] or type(cause).__name__
        raise ValueError(f"{folder}: not a whole checkpoint ({reason})") from error


def quiet_without_group() -> None:
    """torch warns of every checkpoint of one process that it is not one of several."""
    text = "torch.distributed is disabled, unavailable or uninitialized"
    warnings.filterwarnings("ignore", text, UserWarning)


def checksum(path: str | Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with Path(path).open("rb") as file:
        while part := file.read(1 << 22):
            value = zlib.crc32(part, value)
    return value


def fault(folder: str | Path, files: dict[str, list[int]], names: Iterable[str]) -> str | None:
    """What is wrong with the first spoilt file; None where all are as they were written.

    Args:
        folder: that holds them.
        files: size in bytes and CRC-32 by name.
        names: of those to read.
    """
    for name in names:
        path, (size, sum_) = Path(folder) / name, files[name]
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
        if checksum(path) != sum_:
            return f"{name} is spoilt: its checksum is another"
    return None
