"""Tensors to files and back, by torch's distributed checkpoint (DCP); every byte is hashed while it is written."""

import errno
import hashlib
import io
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dsft.checkpoint.manifest import Damage, DamagedError, Written, header
from dsft.strategy import Shape

T = TypeVar("T")

ROOT = "state"
"""Under which DCP sees all tensors: it spends 0.1 ms on each name at the top, with the interpreter's lock held."""

INDEX = ".metadata"
"""DCP's own file: which tensor lies where."""

SPARE = 1.05
"""Free bytes wanted before a save, per byte of tensors."""


def write(
    state: Mapping[str, Tensor], folder: Path, step: int, run: str, group: dist.ProcessGroup | None
) -> dict[str, Written]:
    """Write state (any mix of DTensors and tensors that ranks share) into folder; this rank's files.

    Collective over group; without one, this process writes alone. If any rank fails, every rank raises OSError.
    """
    writer = _Writer(folder, header(step, run))
    _hush()
    try:
        save(
            {ROOT: dict(state)},
            storage_writer=writer,
            planner=DefaultSavePlanner(),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:  # a BaseException, which would pass every fence
        raise OSError(_first_failure(error)) from None
    return writer.files.written


def read(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Fill state, in place, from folder. Collective over group. Verify before: DCP itself notices no changed byte."""
    _hush()
    reader = _Reader(folder)
    try:
        load({ROOT: dict(state)}, storage_reader=reader, planner=_planner(), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise RuntimeError(f"{folder}: {_first_failure(error)}") from None


def shapes(found: Metadata) -> dict[str, Shape]:
    """Name -> whole shape and type of all that a checkpoint holds."""
    held: dict[str, Any] = found.state_dict_metadata
    return {
        name.removeprefix(f"{ROOT}."): (torch.Size(item.size), item.properties.dtype) for name, item in held.items()
    }


def index(folder: Path) -> Metadata:
    """Which tensors a checkpoint holds and where. Unpickles: only after the file's digest has been compared."""
    try:
        return FileSystemReader(folder).read_metadata()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a pickle can raise
        raise DamagedError(Damage(INDEX, f"cannot be read ({error})")) from error


def needed(state: Mapping[str, Tensor], found: Metadata) -> set[str]:
    """Names of the files that read(state) would read on this rank."""
    planner = _planner()
    planner.set_up_planner({ROOT: dict(state)}, found, is_coordinator=False)
    plan = planner.create_local_plan()
    assert found.storage_data is not None
    return {found.storage_data[item.storage_index].relative_path for item in plan.items}


def _planner() -> DefaultLoadPlanner:
    return DefaultLoadPlanner(flatten_sharded_tensors=False)


@dataclass(frozen=True)
class Place:
    """Where a piece of a tensor lies: its bytes, row by row, in the machine's order (little-endian)."""

    relative_path: str
    offset: int
    length: int


class _Writer(FileSystemWriter):
    """DCP's plan and index around plain bytes: one file per rank that hashes itself, nothing pickled per tensor.

    Refuses before the first byte if the disk is too full.
    """

    def __init__(self, folder: Path, first: bytes) -> None:
        super().__init__(folder, sync_files=True)
        self.fs = self.files = _HashedFiles(first)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0 sees what all ranks are about to write."""
        wanted = int(SPARE * sum(_nbytes(item) for plan in plans for item in plan.items))
        free = shutil.disk_usage(self.path).free
        if free < wanted:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {wanted} bytes wanted, {free} free")
        checked: list[SavePlan] = super().prepare_global_plan(plans)
        return checked

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's pieces, end to end."""
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with self.files.create_stream(Path(self.path) / name, "wb") as stream:
            for item in plan.items:
                piece = planner.resolve_data(item)
                assert isinstance(piece, Tensor)
                block = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                results.append(WriteResult(item.index, block.nbytes, Place(name, stream.tell(), block.nbytes)))
                stream.write(block)
            os.fsync(stream.fileno())
        return _done(results)


class _Reader(FileSystemReader):
    """Reads what _Writer wrote."""

    found: Metadata

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        """Keep the index: it knows each piece's shape."""
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self.found = metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the plan names, file by file, from front to back."""
        places: dict[Any, Place] = self.storage_data
        for item in sorted(plan.items, key=lambda item: _where(places[item.storage_index])):
            place = places[item.storage_index]
            block = np.fromfile(Path(self.path) / place.relative_path, np.uint8, place.length, offset=place.offset)
            about: Any = self.found.state_dict_metadata[item.storage_index.fqn]
            sizes = next(chunk.sizes for chunk in about.chunks if chunk.offsets == item.storage_index.offset)
            piece = torch.from_numpy(block).view(about.properties.dtype).reshape(sizes)
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                piece = piece.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece)
            planner.commit_tensor(item, target)
        return _done(None)


def _where(place: Place) -> tuple[str, int]:
    return place.relative_path, place.offset


def _done(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future


def _nbytes(item: Any) -> int:
    data = item.tensor_data
    return int(data.chunk.sizes.numel() * data.properties.dtype.itemsize)


class _HashedFiles(FileSystem):
    """Local files; what is written is counted and hashed. written: name -> size and digest of each closed file."""

    def __init__(self, first: bytes) -> None:
        self.first, self.written = first, dict[str, Written]()

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        """Open path; data files begin with a line that names their step."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with open(path, mode) as raw:
            hashed = _HashedStream(raw)
            if Path(path).suffix == ".distcp":
                hashed.write(self.first)
            yield hashed
            self.written[Path(path).name] = Written(hashed.size, hashed.digest.hexdigest())

    def mkdir(self, path: Any) -> None:
        """Leave the folder to who made it: one that a newer writer has removed meanwhile must not come back."""

    def rename(self, path: Any, new_path: Any) -> None:
        """Rename a file that was written here."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _HashedStream(io.RawIOBase):
    """Writes on to raw, which its opener closes."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.size, self.digest = raw, 0, hashlib.sha256()

    def write(self, block: Any) -> int:
        """Write all of block."""
        self.raw.write(block)
        self.digest.update(block)
        length = memoryview(block).nbytes
        self.size += length
        return length

    def writable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if not self.raw.closed:
            self.raw.flush()

    def fileno(self) -> int:
        """For fsync, which must find nothing in our buffer."""
        self.raw.flush()
        return int(self.raw.fileno())


def _first_failure(error: CheckpointException) -> str:
    """What the first rank says that failed; the others fail because of it."""
    rank, (cause, _) = min(error.failures.items())
    while deeper := cause.__cause__ or cause.__context__:  # torch hides ENOSPC behind its own words
        cause = deeper
    return f"rank {rank}: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else cause!r}"


def _hush() -> None:
    """DCP warns about what is meant here: alone without a group, and ranks that own different tensors."""
    warnings.filterwarnings("ignore", r"torch\.distributed is (disabled|unavailable)")
    warnings.filterwarnings("ignore", r"Detected mismatched keys across ranks")
