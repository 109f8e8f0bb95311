"""Tensors to files, as torch's distributed checkpoint (DCP) plans it; every byte is hashed while it is written."""

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

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dsft.checkpoint.index import Held, Index, Piece
from dsft.checkpoint.manifest import Written, header

T = TypeVar("T")

ROOT = "state"
"""Under which DCP sees all tensors: it spends 0.1 ms on each name at the top, with the interpreter's lock held."""

SPARE = 1.05
"""Free bytes wanted before a save, per byte of tensors."""


def write(
    state: Mapping[str, Tensor], folder: Path, step: int, run: str, group: dist.ProcessGroup | None
) -> tuple[dict[str, Written], Index]:
    """Write state (any mix of DTensors and tensors that ranks share) into folder; this rank's files, and the index.

    The index is rank 0's to keep and empty on the others. Collective over group; without one, this process writes
    alone. If any rank fails, every rank raises OSError.
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
    return writer.files.written, writer.index


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
        self.index: Index = {}

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

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0 keeps where every piece lies, for the manifest; DCP would pickle it into a file."""
        places = {result.index: result.storage_data for part in results for result in part}
        held: dict[str, Any] = metadata.state_dict_metadata
        self.index = {
            name.removeprefix(f"{ROOT}."): Held(
                str(item.properties.dtype).removeprefix("torch."),
                tuple(item.size),
                tuple(_piece(chunk, places[MetadataIndex(name, chunk.offsets)]) for chunk in item.chunks),
            )
            for name, item in held.items()
        }


def _piece(chunk: ChunkStorageMetadata, place: Place) -> Piece:
    return Piece(tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset)


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
