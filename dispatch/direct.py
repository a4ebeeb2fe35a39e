"""One file read past the page cache: a disk is read at its own speed, and nothing else is evicted for it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator

import torch

from planner.units import round_up

# Such reads begin and end at multiples of this, in the file and in memory: no disk has larger blocks.
BLOCK_BYTES = 4096


class DirectFile:
    """The open file of a descriptor, opened once more for direct reads; where that cannot be, none is done."""

    def __init__(self, descriptor: int):
        self._descriptor: int | None = None
        try:
            # By the descriptor, not by the name: another file may stand there by now.
            self._descriptor = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT)
        except (OSError, AttributeError):  # no Linux, or a file system that has no direct reads
            return
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, buffer: torch.Tensor, offset_bytes: int, nbytes: int) -> torch.Tensor | None:
        """Return the part of `buffer`, uint8 in host memory, that so many bytes from `offset_bytes` on were read to.

        None where they were not: the buffer is not aligned or too short, or the disk does not read so. Then other ways
        of reading tell what is wrong.
        """
        skipped = offset_bytes % BLOCK_BYTES
        length = round_up(skipped + nbytes, BLOCK_BYTES)
        if self._descriptor is None or length > buffer.nbytes or buffer.data_ptr() % BLOCK_BYTES:
            return None
        try:
            count = os.preadv(self._descriptor, [buffer[:length].numpy().data], offset_bytes - skipped)
        except OSError:
            return None
        return buffer[skipped : skipped + nbytes] if count >= skipped + nbytes else None


def windows(offset_bytes: int, nbytes: int, most_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of parts of a range in turn, counted from its own start: a buffer of `most_bytes`, whole
    blocks, takes each with the blocks that it lies in. Smaller buffers take parts of their size.
    """
    start = 0
    while start < nbytes:
        skipped = (offset_bytes + start) % BLOCK_BYTES if most_bytes >= BLOCK_BYTES else 0
        stop = min(nbytes, start + most_bytes - skipped)
        yield start, stop
        start = stop
