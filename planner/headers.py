"""What a checkpoint's files say they hold: every stored tensor's dtype, shape and bytes, from their headers alone.

The format, as safetensors' README defines it: 8 bytes, the length N of the header (unsigned, little endian);
N bytes of JSON, `{name: {"dtype", "shape", "data_offsets": [begin, end]}}` with an optional `__metadata__`;
then the data, which the tensors cover without gap or overlap. Offsets count from the end of the header.

This is the one parser: `dispatch` reads its tensors through it too. No torch is imported here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from planner.errors import InputError
from planner.models import HUB_TIMEOUT_S

HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library itself
AGAIN = "download or save it again"
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# safetensors' name of a dtype → (torch's name, bytes of one element).
DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1),
    "U16": ("uint16", 2), "I16": ("int16", 2), "U32": ("uint32", 4), "I32": ("int32", 4),
    "U64": ("uint64", 8), "I64": ("int64", 8),
    "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4), "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
}  # fmt: skip
# The dtypes that weights are computed in; floats of eight bits are a quantiser's.
FLOATS = ("BF16", "F16", "F32", "F64")

# Fills a range of a file: (offset, count) → count bytes, or InputError where the file ends too soon.
Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint: bytes [offset_bytes, offset_bytes + nbytes) of `file`, row-major."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """The tensors that a checkpoint's headers describe, by name."""

    tensors: dict[str, StoredTensor]

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def bytes_by_dtype(self) -> dict[str, int]:
        """Return {safetensors' dtype name: bytes stored in it}, the most first."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.nbytes
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def float_dtype(self) -> str | None:
        """Return torch's name of the floating dtype that most bytes are stored in; None where there is none.

        Eight-bit floats are a quantiser's and do not count.
        """
        return next((DTYPES[name][0] for name in self.bytes_by_dtype() if name in FLOATS), None)

    def digest(self) -> str:
        """Return SHA-256, in hex, of every name, dtype and shape."""
        told = sorted((t.name, t.dtype, t.shape) for t in self.tensors.values())
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def read_headers(path: str | os.PathLike[str]) -> Headers:
    """Return what the headers of the checkpoint at `path` (a folder, an index or one file) describe.

    Which files count is told at `locate`. Reads headers alone.

    Raises:
        InputError: nothing there, a pickled checkpoint, a damaged or truncated file, a missing shard, an
            index that does not agree with its shards, or one tensor in two files.
    """
    where = Path(path).absolute()
    with os_errors(where):
        paths, index = locate(where)
    return Headers(tensors=combine(where, index, (_header_of(file) for file in paths)))


def find_headers(*, folder: str | None, hub: bool, name: str, revision: str | None, notes: list[str]) -> Headers | None:
    """Return the headers of a model's checkpoint, in its folder or on the Hub; None where it has none to be read, of
    which `notes` is told.

    Raises:
        InputError: a checkpoint is there and damaged.
    """
    found: Headers | str | None = None
    if folder is not None:
        found = not_fetched(folder) or read_headers(folder)
    elif hub:
        found = hub_headers(name, revision)
    if isinstance(found, str):
        notes.append(f"sizes are what the config says: {found}")
        return None
    return found


def not_fetched(folder: str | os.PathLike[str]) -> str | None:
    """Return in words why a folder has no checkpoint that could be read, or None where it has one.

    A folder without its weights (only the small files of a repository were fetched) can still be planned for; a
    checkpoint that is there and damaged cannot, and is no matter of this function.
    """
    where = Path(folder)
    with os_errors(where):
        files = sorted(where.glob("*.safetensors"))
        if not files:
            return "no safetensors files are there"
        for file in files:
            if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(b"version "):
                return f"{file.name} is a Git LFS pointer, not the weights"
    return None


def hub_headers(name: str, revision: str | None) -> Headers | str:
    """Return what the headers of a model on the Hub describe, or in words why they could not be had: the Hub cannot
    be reached, or has no safetensors files of the model. Some kilobytes to megabytes are fetched.

    Raises:
        InputError: what was fetched is no header.
    """
    import huggingface_hub

    try:
        # One quick question first: on a dead network, what follows would try for a minute.
        url = huggingface_hub.hf_hub_url(name, "config.json", revision=revision)
        huggingface_hub.get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
        found = huggingface_hub.get_safetensors_metadata(name, revision=revision)
    except Exception as exc:  # a dead network raises errors of httpx or httpx2, by huggingface_hub's version
        reason = str(exc).partition("\n")[0] or type(exc).__name__
        return f"the headers of {name} could not be fetched from the Hub ({reason})"
    parts = []
    for file, metadata in sorted(found.files_metadata.items()):
        path = Path(file)
        described = {
            tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for tensor, info in metadata.tensors.items()
        }
        parts.append(_entries(path, described, 0)[0])
    return Headers(tensors=combine(Path(name), None, parts))


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about `path` into an InputError; also the ValueError for a path with a NUL in it."""
    try:
        yield
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise InputError(f"{path} cannot be read ({reason}); check the path and its permissions") from exc


def open_regular(path: Path) -> int:
    """Return a descriptor of the file at `path`, for reading.

    Raises:
        InputError: it cannot be opened, or is not a regular file.
    """
    with os_errors(path):
        # Before open(2), which would wait forever at a pipe.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  (paired with fstat by the callers)
            raise InputError(f"{path} is not a regular file; a safetensors file is needed")
        return os.open(path, os.O_RDONLY)


def _header_of(path: Path) -> dict[str, StoredTensor]:
    descriptor = open_regular(path)
    try:
        with os_errors(path):

            def read(offset: int, count: int) -> bytes:
                return os.pread(descriptor, count, offset)

            return parse_header(path, os.fstat(descriptor).st_size, read)
    finally:
        os.close(descriptor)


def locate(where: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """Return the safetensors files of `where`, and its index {tensor: file name} if one named them.

    In a folder `model.safetensors` comes first, as for `from_pretrained`, then the index, then all safetensors
    files together.
    """
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
        return locate(indexes[0])
    files = tuple(sorted(where.glob("*.safetensors")))
    if not files and any(path.suffix in _PICKLED for path in where.iterdir()):
        raise _pickled(where)
    if not files:
        raise InputError(f"{where} holds no .safetensors file; name the folder that a model was saved in")
    return files, None


def combine(
    where: Path, index: dict[str, str] | None, parts: Iterable[dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """Return the tensors of several files together. Every one counts, also one that the index leaves out.

    Raises:
        InputError: one tensor is in two files, or the index does not agree with them.
    """
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        for name, tensor in part.items():
            if name in tensors:
                raise InputError(
                    f"{where} holds the tensor {name!r} twice, in {tensors[name].file.name} and "
                    f"{tensor.file.name}; name the one file that is meant, or remove the other"
                )
            tensors[name] = tensor
    folder = where if where.is_dir() else where.parent
    for name, shard in (index or {}).items():
        if name not in tensors or tensors[name].file != folder / shard:
            raise InputError(f"{where}: the index says that {shard} holds {name!r}: it does not; {AGAIN}")
    return tensors


def parse_header(path: Path, size_bytes: int, read: Read) -> dict[str, StoredTensor]:
    """Return the tensors of one file of `size_bytes` in the order of their bytes; `path` is for messages.

    Raises:
        InputError: the header is not what the format says, or does not describe the bytes that follow it.
    """
    if size_bytes < 8:
        raise InputError(f"{path} has {size_bytes} bytes, and a safetensors file has at least 8; {AGAIN}")
    prefix = read(0, 8)
    if prefix == b"version ":
        raise InputError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    length = int.from_bytes(prefix, "little")
    if length > HEADER_LIMIT_BYTES:
        raise InputError(
            f"{path} is not a safetensors file: its header would have {length:,} bytes, and at most "
            f"{HEADER_LIMIT_BYTES:,} are allowed; {AGAIN}"
        )
    if 8 + length > size_bytes:
        raise InputError(
            f"{path} is truncated: {size_bytes:,} bytes are there, its header needs {8 + length:,}; {AGAIN}"
        )
    described = _json_object(read(8, length), path, "its header")
    described.pop("__metadata__", None)
    tensors, end = _entries(path, described, 8 + length)
    if end != size_bytes:
        fault = "is truncated" if end > size_bytes else "has bytes that belong to no tensor"
        raise InputError(f"{path} {fault}: {size_bytes:,} bytes are there, and its tensors need {end:,}; {AGAIN}")
    return tensors


def _entries(path: Path, described: dict[str, Any], data_start: int) -> tuple[dict[str, StoredTensor], int]:
    """Return the tensors that a header describes, in the order of their bytes, and where the last one ends.

    `data_start` is where offsets count from, in bytes of the file.
    """
    tensors = [_entry(path, name, value, data_start) for name, value in described.items()]
    tensors.sort(key=lambda tensor: (tensor.offset_bytes, tensor.nbytes))
    end, before = data_start, "its header"
    for tensor in tensors:
        if tensor.offset_bytes != end:
            fault = "overlaps" if tensor.offset_bytes < end else "leaves a gap after"
            raise InputError(f"{path}: the tensor {tensor.name!r} {fault} {before}; {AGAIN}")
        end, before = end + tensor.nbytes, repr(tensor.name)
    return {tensor.name: tensor for tensor in tensors}, end


def _entry(path: Path, name: str, value: object, data_start: int) -> StoredTensor:
    about = f"{path}: the tensor {name!r}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise InputError(f"{about} is described without dtype, shape and data_offsets; {AGAIN}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{about} has the dtype {dtype!r}, which is not one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or math.prod(size for size in shape if size) >= 2**63:
        raise InputError(f"{about} has the shape {shape!r}, which no tensor can have; {AGAIN}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{about} has the offsets {offsets!r}, which are not [begin, end]; {AGAIN}")
    nbytes, needed = offsets[1] - offsets[0], math.prod(shape) * DTYPES[dtype][1]
    if nbytes != needed:
        raise InputError(f"{about} has {nbytes:,} bytes, and {dtype} {shape} needs {needed:,}; {AGAIN}")
    start = data_start + offsets[0]
    return StoredTensor(name=name, file=path, dtype=dtype, shape=tuple(shape), offset_bytes=start, nbytes=nbytes)


def _are_counts(value: object) -> bool:
    """Return whether `value` is a list of non-negative ints; JSON's true and false are not."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _pickled(where: Path) -> InputError:
    return InputError(
        f"{where} holds a pickled checkpoint, and those are not carried yet; convert it to safetensors, "
        "for instance with save_pretrained"
    )


def _read_index(path: Path) -> dict[str, str]:
    """Return the `weight_map` of an index file: {tensor name: shard file name}."""
    size = path.stat().st_size
    if size > HEADER_LIMIT_BYTES:
        raise InputError(f"{path} has {size:,} bytes, and an index at most {HEADER_LIMIT_BYTES:,}")
    weight_map = _json_object(path.read_bytes(), path, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map, and so is not an index of a checkpoint; {AGAIN}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or "\0" in name:
            raise InputError(f"{path} says that {tensor!r} is in {name!r}, which is no file name; {AGAIN}")
    for name in sorted(set(weight_map.values())):
        if PurePosixPath(name).suffix in _PICKLED:
            raise _pickled(path)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{path} names the shard {name}, which is outside of its folder; {AGAIN}")
        if not (path.parent / name).exists():
            raise InputError(f"{path} names the shard {name}, which is missing; download it again")
    return weight_map


def _json_object(text: bytes, path: Path, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(pairs)) != len(pairs):
            raise ValueError("a name stands in it twice")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as exc:  # also UnicodeDecodeError and JSONDecodeError
        raise InputError(f"{path}: {what} is not valid JSON ({exc}); {AGAIN}") from exc
    if not isinstance(value, dict):
        raise InputError(f"{path}: {what} is not a JSON object; {AGAIN}")
    return value
