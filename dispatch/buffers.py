"""Reads bytes of a checkpoint to where they belong: at once where that is host memory, else through a buffer."""

from __future__ import annotations

import math
import queue
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dispatch.checkpoint import Checkpoint, TensorEntry
from planner.loading import BUFFER_ALIGNMENT_BYTES, buffer_bytes
from planner.units import round_up


class Buffers:
    """Host memory for so many readers at once, `nbytes` for each, taken when this is made."""

    def __init__(self, count: int, nbytes: int):
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        for _ in range(count if nbytes else 0):
            self._free.put(torch.empty(nbytes, dtype=torch.uint8))
        self._nbytes = nbytes

    @contextmanager
    def lend(self) -> Iterator[torch.Tensor | None]:
        """Give a buffer to one reader, who waits where all are lent; None where nothing needs one."""
        if not self._nbytes:
            yield None
            return
        buffer = self._free.get()
        try:
            yield buffer
        finally:
            self._free.put(buffer)


def needed_bytes(entry: TensorEntry, elements: int, dtype: torch.dtype, device: torch.device, *, in_place: bool) -> int:
    """Return the buffer that reading `elements` of an entry wants, in bytes; 0 where they go straight to their place.

    in_place: whether the place is one run of bytes.
    """
    same = entry.dtype == dtype
    if device.type == "cpu":
        return 0 if same and in_place else buffer_bytes(elements, entry.dtype.itemsize, None)
    return buffer_bytes(elements, entry.dtype.itemsize, None if same else dtype.itemsize)


def read(
    checkpoint: Checkpoint, entry: TensorEntry, start: int, stop: int, place: torch.Tensor, buffer: torch.Tensor | None
) -> None:
    """Read bytes [start, stop) of `entry` into `place` on any device, converting where the dtypes differ."""
    place = place.detach()
    if start == stop:
        return
    if place.is_contiguous() and place.dtype == entry.dtype and place.device.type == "cpu":
        checkpoint.read_into(entry, place, start=start, stop=stop)
        return
    for part, data in parts(checkpoint, entry, start, place, buffer, convert=place.device.type != "cpu"):
        part.copy_(data)


def parts(
    checkpoint: Checkpoint,
    entry: TensorEntry,
    start: int,
    place: torch.Tensor,
    buffer: torch.Tensor | None,
    *,
    convert: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (part of `place`, what is stored for it) in turn, from byte `start` of `entry` on; the stored part lies in
    the buffer, and is valid until the next one.

    convert: to the dtype of `place`, inside the buffer.
    buffer: is made here where none is given.
    """
    item = place.dtype.itemsize if convert and place.dtype != entry.dtype else None
    if buffer is None:
        buffer = torch.empty(buffer_bytes(place.numel(), entry.dtype.itemsize, item), dtype=torch.uint8)
    for at, part in _runs(place, _most_elements(buffer.nbytes, entry.dtype.itemsize, item)):
        begin = start + at * entry.dtype.itemsize
        nbytes = part.numel() * entry.dtype.itemsize
        stored = buffer[:nbytes].view(entry.dtype).view(part.shape)
        checkpoint.read_into(entry, stored, start=begin, stop=begin + nbytes)
        if item is not None:
            offset = round_up(nbytes, BUFFER_ALIGNMENT_BYTES)
            converted = buffer[offset : offset + part.numel() * item].view(place.dtype).view(part.shape)
            stored = converted.copy_(stored)
        yield part, stored


def _most_elements(nbytes: int, stored_item: int, item: int | None) -> int:
    """Return how many elements a buffer takes, where those of one whole read may be fewer."""
    if item is None:
        return nbytes // stored_item
    most = nbytes // (stored_item + item)
    while round_up(most * stored_item, BUFFER_ALIGNMENT_BYTES) + most * item > nbytes:
        most -= 1
    return most


def _runs(place: torch.Tensor, most: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (index of its first element, part) of parts with at most `most` elements, in row-major order."""
    if place.is_contiguous():
        flat = place.view(-1)
        yield from ((at, flat[at : at + most]) for at in range(0, flat.numel(), most))
        return
    row = math.prod(place.shape[1:])
    if row <= most:
        yield from ((at * row, place[at : at + most // row]) for at in range(0, place.shape[0], most // row))
        return
    for index in range(place.shape[0]):
        yield from ((index * row + at, part) for at, part in _runs(place[index], most))
