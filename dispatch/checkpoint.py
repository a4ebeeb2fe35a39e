"""A safetensors checkpoint as byte ranges: only headers (see `planner.headers`) are read until a tensor is asked for.

Pickled checkpoints (.bin, .pt) are refused: they run code when read, and cannot be read by byte range.
"""

from __future__ import annotations

import mmap
import os
import platform
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dispatch import direct, page_cache
from planner.errors import InputError
from planner.headers import AGAIN, DTYPES, StoredTensor, combine, locate, open_regular, os_errors, parse_header
from planner.loading import COMPARE_BYTES
from planner.units import KIB, MIB

_READ_CHUNK_BYTES = 64 * MIB
# Of one announcement the kernel takes no more than one request to the disk holds.
_ANNOUNCED_BYTES = 512 * KIB
# Linux's MAP_NORESERVE, which Python names only from 3.13 on; 0 where its value is not known.
_USUAL_LINUX = platform.system() == "Linux" and platform.machine() in {"x86_64", "aarch64", "riscv64"}
MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if _USUAL_LINUX else 0)
_DTYPES = {name: getattr(torch, torch_name) for name, (torch_name, _) in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a checkpoint: bytes [offset_bytes, offset_bytes + nbytes) of `file`, row-major."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int
    nbytes: int


class Checkpoint:
    """The tensors of one checkpoint by name, and the open files that hold them.

    Files stay open, so that a file replaced on disk goes on being read as it was; `check_unchanged` tells.
    Reads are positional and may run in several threads at once.
    """

    def __init__(self, path: Path, files: dict[Path, _OpenFile], entries: dict[str, TensorEntry]):
        self.path = path
        self.total_bytes = sum(entry.nbytes for entry in entries.values())
        self._files = files
        self._entries = entries

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Return the checkpoint at `path`: a folder, an index (.json) or one file. Reads headers alone.

        In a folder `model.safetensors` comes first, as for `from_pretrained`, then the index, then all
        safetensors files together. Every tensor of the files counts, also one that the index leaves out.

        Raises:
            InputError: nothing there, a pickled checkpoint, a damaged or truncated file, a missing shard, an
                index that does not agree with its shards, or one tensor in two files.
        """
        where = Path(path).absolute()  # or a change of folder would look like a change of files
        with os_errors(where):
            paths, index = locate(where)
        files = {file: _OpenFile(file) for file in paths}
        stored = combine(where, index, (file.header() for file in files.values()))
        entries = {name: _entry(tensor) for name, tensor in stored.items()}
        return cls(where, files, entries)

    @classmethod
    def of(cls, path: Path, entries: Mapping[str, TensorEntry]) -> Checkpoint:
        """Return tensors of which it is known already where they are; `path` is what messages call them.

        Raises:
            InputError: a file cannot be opened, or is too short for what it is to hold.
        """
        files = {file: _OpenFile(file) for file in dict.fromkeys(entry.file for entry in entries.values())}
        for entry in entries.values():
            end = entry.offset_bytes + entry.nbytes
            if end > files[entry.file].size_bytes:
                raise InputError(
                    f"{entry.file} is truncated: {files[entry.file].size_bytes:,} bytes are there, and {entry.name} "
                    f"ends at {end:,}; write it anew"
                )
        return cls(path, files, dict(entries))

    def again(self) -> Checkpoint:
        """Return the same tensors of the same open files, with mappings of their own: what was written to pages of
        this one's is not in them.
        """
        return Checkpoint(self.path, {path: file.again() for path, file in self._files.items()}, self._entries)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle where the tensors are and when the files were written last, and nothing of what they hold."""
        return _reopened, (self.path, {path: file.written for path, file in self._files.items()}, self._entries)

    def names(self) -> tuple[str, ...]:
        """Return every tensor's name, in order of file and of place in it."""
        return tuple(self._entries)

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def check_unchanged(self) -> None:
        """Compare each file's size, inode and time of change with those at `open`; costs one stat a file.

        Raises:
            InputError: a file was deleted, shrunk, replaced or written to.
        """
        for file in self._files.values():
            file.check_unchanged()

    def read_into(
        self, entry: TensorEntry, destination: torch.Tensor, *, start: int = 0, stop: int | None = None
    ) -> None:
        """Read bytes [start, stop) of `entry` into the memory of `destination`, with no copy in between.

        `destination` is contiguous, on the CPU (pinned or not), of any dtype, and has stop - start bytes.

        Raises:
            InputError: the file ends too soon, or cannot be read.
            ValueError: the range is not within the entry, or `destination` does not fit it.
        """
        stop = entry.nbytes if stop is None else stop
        if not 0 <= start <= stop <= entry.nbytes:
            raise ValueError(f"bytes {start}:{stop} are not within the {entry.nbytes} bytes of {entry.name}")
        if destination.device.type != "cpu" or not destination.is_contiguous():
            raise ValueError(f"{entry.name} is read into contiguous CPU memory only")
        if destination.nbytes != stop - start:
            raise ValueError(f"{entry.name}: {stop - start} bytes do not fill {destination.nbytes} bytes")
        if start < stop:
            memory = destination.detach().reshape(-1).view(torch.uint8).numpy().data
            self._files[entry.file].read_into(memory, entry.offset_bytes + start)

    def windows(self, entry: TensorEntry, start: int, stop: int, most_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of parts of bytes [start, stop) of `entry`, in turn, each for one `read_window`."""
        for begin, end in direct.windows(entry.offset_bytes + start, stop - start, most_bytes):
            yield start + begin, start + end

    def read_window(self, entry: TensorEntry, buffer: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return bytes [start, stop) of `entry`, read to somewhere in `buffer`, uint8 in host memory.

        What is not in the page cache is read past it, where the disk, the buffer's address and its length allow it.

        Raises:
            InputError: the file ends too soon, or cannot be read.
        """
        return self._files[entry.file].read_window(buffer, entry.offset_bytes + start, stop - start)

    def announce(self, entry: TensorEntry, *, start: int = 0, stop: int | None = None) -> None:
        """Say that bytes [start, stop) of `entry` will be read soon; the kernel begins to bring them, where it can."""
        if hasattr(os, "posix_fadvise"):
            end = entry.nbytes if stop is None else stop
            self._files[entry.file].announce(entry.offset_bytes + start, end - start)

    def read(self, entry: TensorEntry) -> torch.Tensor:
        """Return `entry` read into new memory of its own dtype and shape.

        Raises:
            InputError: the file ends too soon, or cannot be read.
        """
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(entry, tensor)
        return tensor

    def map(self, entry: TensorEntry) -> torch.Tensor:
        """Return `entry` as a tensor over the page cache: no bytes are read or copied until they are used.

        The mapping lives as long as its tensors do. It is for reading; a write makes private copies of the
        pages that it touches and never reaches the file. An entry whose offset is not a multiple of its
        itemsize (the format does not promise it) is read into memory instead. If the file is truncated while
        mapped, touching the lost bytes kills the process (SIGBUS): call `check_unchanged` before use.

        Raises:
            InputError: the file shrank since `open`, or cannot be mapped.
        """
        if not self.mappable(entry):
            return self.read(entry)
        count = entry.nbytes // entry.dtype.itemsize
        memory = self._files[entry.file].mapping()
        return torch.frombuffer(memory, dtype=entry.dtype, count=count, offset=entry.offset_bytes).reshape(entry.shape)

    def mappable(self, entry: TensorEntry) -> bool:
        """Tell whether `map` gives the file's own pages."""
        return entry.nbytes > 0 and entry.offset_bytes % entry.dtype.itemsize == 0

    def equal(self, one: TensorEntry, other: TensorEntry) -> bool:
        """Return whether two entries have one dtype and shape and equal bytes. Reads up to a difference.

        Takes no more than COMPARE_BYTES of memory.
        """
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        step = min(COMPARE_BYTES // 2, one.nbytes)
        pair = torch.empty((2, step), dtype=torch.uint8)
        for start in range(0, one.nbytes, step or 1):
            stop = min(start + step, one.nbytes)
            left, right = pair[0, : stop - start], pair[1, : stop - start]
            self.read_into(one, left, start=start, stop=stop)
            self.read_into(other, right, start=start, stop=stop)
            if not torch.equal(left, right):
                return False
        return True


def _reopened(path: Path, written: Mapping[Path, tuple[int, int]], entries: dict[str, TensorEntry]) -> Checkpoint:
    """Return a checkpoint that was pickled.

    Raises:
        InputError: a file is gone, or of another size or time than it was then.
    """
    files = {}
    for where, then in written.items():
        try:
            file = files[where] = _OpenFile(where)
        except InputError as exc:
            raise InputError(f"weights of what was pickled wait in {where}, which cannot be opened: {exc}") from exc
        if file.written != then:
            raise InputError(
                f"{where} is not the file that weights of what was pickled wait in: it had {then[0]:,} bytes and has "
                f"{file.size_bytes:,}, or was written to since; put that one back, or make the model anew"
            )
    return Checkpoint(path, files, entries)


def _entry(stored: StoredTensor) -> TensorEntry:
    return TensorEntry(
        name=stored.name,
        file=stored.file,
        dtype=_DTYPES[stored.dtype],
        shape=stored.shape,
        offset_bytes=stored.offset_bytes,
        nbytes=stored.nbytes,
    )


class _OpenFile:
    """One open file: its descriptor, its state when opened, its one mapping. Closed with its last user."""

    def __init__(self, path: Path, descriptor: int | None = None):
        """Open a file, or take over a descriptor of it."""
        self.path = path
        self._descriptor = open_regular(path) if descriptor is None else descriptor
        weakref.finalize(self, os.close, self._descriptor)
        self._stat = os.fstat(self._descriptor)
        self.size_bytes = self._stat.st_size
        self._mapping: mmap.mmap | None = None
        self._direct = direct.DirectFile(self._descriptor)
        self._lock = threading.Lock()

    def again(self) -> _OpenFile:
        """Return the same file, whatever its path leads to by now, with a state and a mapping of its own."""
        made = _OpenFile(self.path, os.dup(self._descriptor))
        made._stat, made.size_bytes = self._stat, self.size_bytes
        return made

    @property
    def written(self) -> tuple[int, int]:
        """The size in bytes and the time of change in nanoseconds, by which a pickle knows it again."""
        return self._stat.st_size, self._stat.st_mtime_ns

    def header(self) -> dict[str, StoredTensor]:
        """Return what the header describes, in the order of bytes. Raises InputError where it is damaged."""

        def read(offset_bytes: int, count: int) -> bytes:
            memory = bytearray(count)
            self.read_into(memoryview(memory), offset_bytes)
            return bytes(memory)

        return parse_header(self.path, self.size_bytes, read)

    def read_into(self, memory: memoryview, offset_bytes: int) -> None:
        """Fill `memory` from `offset_bytes` on. Raises InputError where the file ends too soon."""
        done = 0
        with os_errors(self.path):
            while done < len(memory):
                chunk = memory[done : done + _READ_CHUNK_BYTES]
                count = os.preadv(self._descriptor, [chunk], offset_bytes + done)
                if count == 0:
                    raise InputError(
                        f"{self.path} is truncated: {offset_bytes + done:,} bytes are there and "
                        f"{offset_bytes + len(memory):,} are needed; it shrank while it was in use; {AGAIN}"
                    )
                done += count

    def read_window(self, buffer: torch.Tensor, offset_bytes: int, nbytes: int) -> torch.Tensor:
        if not self._in_page_cache(offset_bytes, nbytes):
            found = self._direct.read(buffer, offset_bytes, nbytes)
            if found is not None:
                return found
        self.read_into(buffer[:nbytes].numpy().data, offset_bytes)
        return buffer[:nbytes]

    def _in_page_cache(self, offset_bytes: int, nbytes: int) -> bool:
        if not page_cache.SUPPORTED:
            return False
        start = torch.frombuffer(self.mapping(), dtype=torch.uint8, count=1).data_ptr()
        return page_cache.present(start + offset_bytes, nbytes)

    def announce(self, offset_bytes: int, nbytes: int) -> None:
        for start in range(offset_bytes, offset_bytes + nbytes, _ANNOUNCED_BYTES):
            count = min(_ANNOUNCED_BYTES, offset_bytes + nbytes - start)
            os.posix_fadvise(self._descriptor, start, count, os.POSIX_FADV_WILLNEED)

    def mapping(self) -> mmap.mmap:
        """Return the whole file mapped privately and writable, made once."""
        with self._lock:
            if self._mapping is None:
                # Writable, or torch would warn; private, so that no write reaches the file; nothing reserved,
                # or Linux refuses to map a file larger than RAM (as it does with ACCESS_COPY: measured).
                flags, protection = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                try:
                    self._mapping = mmap.mmap(self._descriptor, self.size_bytes, flags=flags, prot=protection)
                except (OSError, ValueError) as exc:  # ValueError: the file is shorter than it was
                    raise InputError(f"{self.path} cannot be mapped ({exc}); {AGAIN}") from exc
            return self._mapping

    def check_unchanged(self) -> None:
        try:
            now = os.stat(self.path)  # noqa: PTH116  (paired with fstat)
        except FileNotFoundError as exc:
            raise InputError(f"{self.path} was deleted while in use; put it back and load again") from exc
        except OSError as exc:
            raise InputError(f"{self.path} can no longer be read ({exc.strerror}); load again") from exc
        then = self._stat
        if now.st_size < then.st_size:
            raise InputError(f"{self.path} shrank from {then.st_size:,} to {now.st_size:,} bytes while in use; {AGAIN}")
        if (now.st_ino, now.st_dev) != (then.st_ino, then.st_dev):
            raise InputError(f"{self.path} was replaced by another file while in use; load again")
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise InputError(f"{self.path} was written to while in use; load again")
