"""A safetensors checkpoint as byte ranges: only headers are read until a tensor is asked for.

The format, as its README defines it: 8 bytes, the length N of the header (unsigned, little endian);
N bytes of JSON, `{name: {"dtype", "shape", "data_offsets": [begin, end]}}` with an optional `__metadata__`;
then the data, which the tensors cover without gap or overlap. Offsets count from the end of the header.

Pickled checkpoints (.bin, .pt) are refused: they run code when read, and cannot be read by byte range.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import platform
import stat
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from planner.errors import InputError
from planner.units import MIB

_HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library itself
_READ_CHUNK_BYTES = 64 * MIB
# Linux's MAP_NORESERVE, which Python names only from 3.13 on; 0 where its value is not known.
_USUAL_LINUX = platform.system() == "Linux" and platform.machine() in {"x86_64", "aarch64", "riscv64"}
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if _USUAL_LINUX else 0)
_AGAIN = "download or save it again"
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32,
    "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


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
        with _os_errors(where):
            paths, index = _locate(where)
        files = {file: _OpenFile(file) for file in paths}
        entries: dict[str, TensorEntry] = {}
        for file in files.values():
            for name, entry in _read_header(file).items():
                if name in entries:
                    raise InputError(
                        f"{where} holds the tensor {name!r} twice, in {entries[name].file.name} and "
                        f"{entry.file.name}; name the one file that is meant, or remove the other"
                    )
                entries[name] = entry
        _check_index(where, index, entries)
        return cls(where, files, entries)

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
        if entry.nbytes == 0 or entry.offset_bytes % entry.dtype.itemsize != 0:
            return self.read(entry)
        count = entry.nbytes // entry.dtype.itemsize
        memory = self._files[entry.file].mapping()
        return torch.frombuffer(memory, dtype=entry.dtype, count=count, offset=entry.offset_bytes).reshape(entry.shape)

    def equal(self, one: TensorEntry, other: TensorEntry) -> bool:
        """Return whether two entries have one dtype and shape and equal bytes. Reads up to a difference."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        pair = torch.empty((2, min(_READ_CHUNK_BYTES, one.nbytes)), dtype=torch.uint8)
        for start in range(0, one.nbytes, _READ_CHUNK_BYTES):
            stop = min(start + _READ_CHUNK_BYTES, one.nbytes)
            left, right = pair[0, : stop - start], pair[1, : stop - start]
            self.read_into(one, left, start=start, stop=stop)
            self.read_into(other, right, start=start, stop=stop)
            if not torch.equal(left, right):
                return False
        return True


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into an InputError; also the ValueError for a path with a NUL in it."""
    try:
        yield
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise InputError(f"{path} cannot be read ({reason}); check the path and its permissions") from exc


class _OpenFile:
    """One open file: its descriptor, its state when opened, its one mapping. Closed with its last user."""

    def __init__(self, path: Path):
        self.path = path
        with _os_errors(path):
            # Before open(2), which would wait forever at a pipe.
            if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  (paired with fstat below)
                raise InputError(f"{path} is not a regular file; a safetensors file is needed")
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self._stat = os.fstat(self._descriptor)
        self.size_bytes = self._stat.st_size
        self._mapping: mmap.mmap | None = None
        self._lock = threading.Lock()

    def read_into(self, memory: memoryview, offset_bytes: int) -> None:
        """Fill `memory` from `offset_bytes` on. Raises InputError where the file ends too soon."""
        done = 0
        with _os_errors(self.path):
            while done < len(memory):
                chunk = memory[done : done + _READ_CHUNK_BYTES]
                count = os.preadv(self._descriptor, [chunk], offset_bytes + done)
                if count == 0:
                    raise InputError(
                        f"{self.path} is truncated: {offset_bytes + done:,} bytes are there and "
                        f"{offset_bytes + len(memory):,} are needed; it shrank while it was in use; {_AGAIN}"
                    )
                done += count

    def mapping(self) -> mmap.mmap:
        """Return the whole file mapped privately and writable, made once."""
        with self._lock:
            if self._mapping is None:
                # Writable, or torch would warn; private, so that no write reaches the file; nothing reserved,
                # or Linux refuses to map a file larger than RAM (as it does with ACCESS_COPY: measured).
                flags, protection = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                try:
                    self._mapping = mmap.mmap(self._descriptor, self.size_bytes, flags=flags, prot=protection)
                except (OSError, ValueError) as exc:  # ValueError: the file is shorter than it was
                    raise InputError(f"{self.path} cannot be mapped ({exc}); {_AGAIN}") from exc
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
            raise InputError(
                f"{self.path} shrank from {then.st_size:,} to {now.st_size:,} bytes while in use; {_AGAIN}"
            )
        if (now.st_ino, now.st_dev) != (then.st_ino, then.st_dev):
            raise InputError(f"{self.path} was replaced by another file while in use; load again")
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise InputError(f"{self.path} was written to while in use; load again")


def _locate(where: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """Return the safetensors files of `where`, and its index {tensor: file name} if one named them."""
    if not stat.S_ISDIR(where.stat().st_mode):
        if where.suffix in _PICKLED:
            raise _pickled(where)
        if where.suffix != ".json":
            return (where,), None
        index = _read_index(where)
        return tuple(where.parent / name for name in sorted(set(index.values()))), index
    if (where / "model.safetensors").exists():
        return (where / "model.safetensors",), None
    indexes = sorted(where.glob("*.safetensors.index.json"))
    if (preferred := where / "model.safetensors.index.json") in indexes:
        indexes = [preferred]
    if len(indexes) > 1:
        raise InputError(f"{where} holds several indexes; name one of {[path.name for path in indexes]}")
    if indexes:
        return _locate(indexes[0])
    files = tuple(sorted(where.glob("*.safetensors")))
    if not files and any(path.suffix in _PICKLED for path in where.iterdir()):
        raise _pickled(where)
    if not files:
        raise InputError(f"{where} holds no .safetensors file; name the folder that a model was saved in")
    return files, None


def _pickled(where: Path) -> InputError:
    return InputError(
        f"{where} holds a pickled checkpoint, and those are not carried yet; convert it to safetensors, "
        "for instance with save_pretrained"
    )


def _read_index(path: Path) -> dict[str, str]:
    """Return the `weight_map` of an index file: {tensor name: shard file name}."""
    size = path.stat().st_size
    if size > _HEADER_LIMIT_BYTES:
        raise InputError(f"{path} has {size:,} bytes, and an index at most {_HEADER_LIMIT_BYTES:,}")
    weight_map = _json_object(path.read_bytes(), path, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map, and so is not an index of a checkpoint; {_AGAIN}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or "\0" in name:
            raise InputError(f"{path} says that {tensor!r} is in {name!r}, which is no file name; {_AGAIN}")
    for name in sorted(set(weight_map.values())):
        if PurePosixPath(name).suffix in _PICKLED:
            raise _pickled(path)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{path} names the shard {name}, which is outside of its folder; {_AGAIN}")
        if not (path.parent / name).exists():
            raise InputError(f"{path} names the shard {name}, which is missing; download it again")
    return weight_map


def _check_index(where: Path, index: dict[str, str] | None, entries: dict[str, TensorEntry]) -> None:
    folder = where if where.is_dir() else where.parent
    for name, shard in (index or {}).items():
        if name not in entries or entries[name].file != folder / shard:
            raise InputError(f"{where}: the index says that {shard} holds {name!r}: it does not; {_AGAIN}")


def _json_object(text: bytes, path: Path, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(pairs)) != len(pairs):
            raise ValueError("a name stands in it twice")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as exc:  # also UnicodeDecodeError and JSONDecodeError
        raise InputError(f"{path}: {what} is not valid JSON ({exc}); {_AGAIN}") from exc
    if not isinstance(value, dict):
        raise InputError(f"{path}: {what} is not a JSON object; {_AGAIN}")
    return value


def _read_header(file: _OpenFile) -> dict[str, TensorEntry]:
    """Return the entries of one file in the order of their bytes.

    Raises:
        InputError: the header is not what the format says, or does not describe the bytes that follow it.
    """
    path, size = file.path, file.size_bytes
    if size < 8:
        raise InputError(f"{path} has {size} bytes, and a safetensors file has at least 8; {_AGAIN}")
    prefix = bytearray(8)
    file.read_into(memoryview(prefix), 0)
    if prefix == b"version ":
        raise InputError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    length = int.from_bytes(prefix, "little")
    if length > _HEADER_LIMIT_BYTES:
        raise InputError(
            f"{path} is not a safetensors file: its header would have {length:,} bytes, and at most "
            f"{_HEADER_LIMIT_BYTES:,} are allowed; {_AGAIN}"
        )
    if 8 + length > size:
        raise InputError(f"{path} is truncated: {size:,} bytes are there, its header needs {8 + length:,}; {_AGAIN}")
    text = bytearray(length)
    file.read_into(memoryview(text), 8)
    described = _json_object(bytes(text), path, "its header")
    described.pop("__metadata__", None)
    entries = [_parse_entry(file, name, value, 8 + length) for name, value in described.items()]
    entries.sort(key=lambda entry: (entry.offset_bytes, entry.nbytes))
    end, before = 8 + length, "its header"
    for entry in entries:
        if entry.offset_bytes != end:
            fault = "overlaps" if entry.offset_bytes < end else "leaves a gap after"
            raise InputError(f"{path}: the tensor {entry.name!r} {fault} {before}; {_AGAIN}")
        end, before = end + entry.nbytes, repr(entry.name)
    if end != size:
        fault = "is truncated" if end > size else "has bytes that belong to no tensor"
        raise InputError(f"{path} {fault}: {size:,} bytes are there, and its tensors need {end:,}; {_AGAIN}")
    return {entry.name: entry for entry in entries}


def _parse_entry(file: _OpenFile, name: str, value: object, data_start: int) -> TensorEntry:
    """Return one tensor of the header. `data_start` is where offsets count from, in bytes of the file."""
    about = f"{file.path}: the tensor {name!r}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise InputError(f"{about} is described without dtype, shape and data_offsets; {_AGAIN}")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise InputError(f"{about} has the dtype {kind!r}, which is not one of {', '.join(_DTYPES)}")
    if not _are_counts(shape) or math.prod(size for size in shape if size) >= 2**63:
        raise InputError(f"{about} has the shape {shape!r}, which no tensor can have; {_AGAIN}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{about} has the offsets {offsets!r}, which are not [begin, end]; {_AGAIN}")
    dtype, nbytes = _DTYPES[kind], offsets[1] - offsets[0]
    needed = math.prod(shape) * dtype.itemsize
    if nbytes != needed:
        raise InputError(f"{about} has {nbytes:,} bytes, and {kind} {shape} needs {needed:,}; {_AGAIN}")
    start = data_start + offsets[0]
    return TensorEntry(name=name, file=file.path, dtype=dtype, shape=tuple(shape), offset_bytes=start, nbytes=nbytes)


def _are_counts(value: object) -> bool:
    """Return whether `value` is a list of non-negative ints; JSON's true and false are not."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
