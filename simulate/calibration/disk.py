"""The disk: what reads reach past the page cache and from it, what is reached ahead of computing straight from a mapped
file, and what that costs beside.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import torch
from torch.nn import functional

from planner.errors import InputError
from simulate.calibration.figures import Figure, Meter, rate_of, time_of
from simulate.calibration.processor import cache_bytes

# One read; a multiple of any disk's blocks.
CHUNK_BYTES = 8 * 2**20
_BLOCK_BYTES = 4096
# A layer's matrix as it waits in a mapped file.
_MATRIX = (4096, 4096)
# An expert's weights in one file, as many as are announced ahead, and a stride without a divisor of their number.
SLICE_BYTES, AHEAD, _STRIDE = 4 * 2**20, 4, 37
# How pages are brought ahead: so many threads, for so many bytes at a time.
READERS, PIECE_BYTES, ANNOUNCED_BYTES = 2, 32 * 2**20, 512 * 2**10
# The kernel's number, from Linux 5.14 on.
_MADV_POPULATE_READ = 22
# Not measurably slower than memory: so many times as fast as what memory reaches.
FREE_TIMES = 100


class File:
    """A file of noise in `folder`, removed at the end.

    Raises:
        InputError: it cannot be written there.
    """

    def __init__(self, folder: Path, nbytes: int):
        self.nbytes = nbytes // CHUNK_BYTES * CHUNK_BYTES
        # Numbers as weights are: special ones would be slower to compute with.
        noise = torch.randn(CHUNK_BYTES // 2).to(torch.bfloat16).view(torch.int16)
        with contextlib.ExitStack() as stack:
            try:
                held = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".plan-calibrate."))
                for number in range(self.nbytes // CHUNK_BYTES):
                    held.write(noise.roll(number).numpy().tobytes())
                held.flush()
                os.fsync(held.fileno())
            except OSError as exc:
                raise InputError(
                    f"cannot write {self.nbytes // 2**20} MiB to {folder} to measure its disk "
                    f"({exc.strerror or exc}); give another --folder"
                ) from exc
            self.path, self.descriptor = Path(held.name), held.fileno()
            self._stack = stack.pop_all()

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def drop(self) -> None:
        """Let the page cache forget it; what is mapped stays."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    @contextlib.contextmanager
    def mapped(self) -> Iterator[mmap.mmap]:
        """Map it privately, as dispatch maps a checkpoint."""
        pages = mmap.mmap(self.descriptor, self.nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        try:
            yield pages
        finally:
            with contextlib.suppress(BufferError):
                pages.close()


def direct_read(meter: Meter, file: File) -> Figure | None:
    """Return what reads past the page cache reach; None where the file system has none."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        descriptor = os.open(file.path, os.O_RDONLY | flag)
    except OSError:
        return None
    try:
        return _read(meter, file, descriptor, "read past the cache", drops=True)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def buffered_read(meter: Meter, file: File, *, cached: bool) -> Figure:
    """Return what reads through the page cache reach, of files that it holds or does not.

    They are as those of experts into their slots: of pieces here and there, some announced ahead of reading, into more
    memory than caches hold.
    """
    count = max(2, 2 * cache_bytes() // SLICE_BYTES)
    # No piece follows the one before.
    pieces = list(range(0, file.nbytes, SLICE_BYTES))
    order = [pieces[number * _STRIDE % len(pieces)] for number in range(len(pieces))]

    with contextlib.closing(mmap.mmap(-1, count * SLICE_BYTES)) as memory, memoryview(memory) as view:
        places = [view[at : at + SLICE_BYTES] for at in range(0, len(view), SLICE_BYTES)]

        def whole() -> None:
            for first in range(0, len(order), AHEAD):
                for offset in order[first : first + AHEAD] if hasattr(os, "posix_fadvise") else ():
                    for at in range(offset, offset + SLICE_BYTES, ANNOUNCED_BYTES):
                        os.posix_fadvise(file.descriptor, at, ANNOUNCED_BYTES, os.POSIX_FADV_WILLNEED)
                for number, offset in enumerate(order[first : first + AHEAD], start=first):
                    if os.preadv(file.descriptor, [places[number % count]], offset) != SLICE_BYTES:
                        raise OSError("the file ended early")

        name = f"read, {'cached' if cached else 'not cached'}"
        try:
            return meter.rate("disk", name, "B/s", whole, float(file.nbytes), before=None if cached else file.drop)
        finally:
            for place in places:
                place.release()


def latency(meter: Meter, file: File) -> Figure:
    """Return what a small read past the page cache takes, in ns."""
    count = file.nbytes // _BLOCK_BYTES
    offsets = (torch.randperm(min(count, 4096)) * (count // min(count, 4096))).tolist()

    def read() -> None:
        os.pread(file.descriptor, _BLOCK_BYTES, offsets.pop() * _BLOCK_BYTES if offsets else 0)

    def before() -> None:
        file.drop()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    meter.report("measuring disk: latency")
    try:
        return time_of("disk", "latency", (taken * 1e9 for taken in meter.samples(read, before=before)))
    finally:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_NORMAL)


def _read(meter: Meter, file: File, descriptor: int, name: str, *, drops: bool) -> Figure:
    # Anonymous pages are aligned as direct reads want it.
    with contextlib.closing(mmap.mmap(-1, CHUNK_BYTES)) as buffer:

        def whole() -> None:
            for offset in range(0, file.nbytes, CHUNK_BYTES):
                if os.preadv(descriptor, [buffer], offset) != CHUNK_BYTES:
                    raise OSError("the file ended early")

        return meter.rate("disk", name, "B/s", whole, float(file.nbytes), before=file.drop if drops else None)


def read_ahead(meter: Meter, file: File) -> Figure | None:
    """Return what threads reach that bring a mapped file's pages ahead of their use, none of which is in memory; None
    where the system cannot be asked to.

    The kernel is asked as dispatch asks it: by READERS threads, for pieces of PIECE_BYTES, each announced first.
    """
    if platform.system() != "Linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with file.mapped() as pages, ThreadPoolExecutor(READERS) as threads:
        start = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()

        def bring(offset: int) -> int:
            nbytes = min(PIECE_BYTES, file.nbytes - offset)
            for at in range(offset, offset + nbytes, ANNOUNCED_BYTES):
                library.madvise(start + at, min(ANNOUNCED_BYTES, offset + nbytes - at), mmap.MADV_WILLNEED)
            return int(library.madvise(start + offset, nbytes, _MADV_POPULATE_READ))

        def whole() -> None:
            if any(threads.map(bring, range(0, file.nbytes, PIECE_BYTES))):
                raise OSError("the kernel cannot bring pages ahead")

        def forget() -> None:
            pages.madvise(mmap.MADV_DONTNEED)
            file.drop()

        try:
            return meter.rate("disk", "mapped, not cached", "B/s", whole, float(file.nbytes), before=forget)
        except OSError:
            return None


def mapped_compute(meter: Meter, file: File) -> Figure:
    """Return what weights that are computed with straight from a mapped file in the page cache reach, beside the
    computing itself.

    That takes the time of products with the mapped weights less that of the same with weights in memory.
    """
    meter.report("measuring disk: mapped, cached")
    rows, columns = _MATRIX
    each = rows * columns * 2
    count = file.nbytes // each
    vector = torch.ones(1, 1, columns, dtype=torch.bfloat16)
    resident = [torch.zeros(_MATRIX, dtype=torch.bfloat16) for _ in range(count)]
    with file.mapped() as pages:
        mapped = [
            torch.frombuffer(pages, dtype=torch.bfloat16, count=rows * columns, offset=number * each).view(_MATRIX)
            for number in range(count)
        ]

        def passed(weights: list[torch.Tensor]) -> Callable[[], None]:
            def call() -> None:
                for weight in weights:
                    functional.linear(vector, weight)

            return call

        inside = fmean(meter.samples(passed(resident)))
        taken = meter.samples(passed(mapped))
    # What cannot be told from nothing is taken as a hundredth of the computing.
    beside = [max(sample - inside, inside / FREE_TIMES) for sample in taken]
    return rate_of("disk", "mapped, cached", "B/s", count * each, beside)
