"""Where weights wait: in host memory or in the checkpoint's own files. A store fills slabs; it never computes."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from dispatch import buffers
from dispatch.checkpoint import Checkpoint, TensorEntry
from dispatch.scattered_tensor import reserved, span
from dispatch.sources import TensorSource
from planner.errors import InputError
from planner.graph import SLAB_ALIGNMENT_BYTES
from planner.units import format_bytes, round_up


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor's place in a slab."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int
    # None: those of a contiguous tensor.
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """How the tensors of a group, or of one slice of it, lie in a slab: each from an aligned start."""

    pieces: tuple[Piece, ...]
    nbytes: int

    @classmethod
    def of(
        cls,
        tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
        strides: Mapping[str, tuple[int, ...] | None] | None = None,
    ) -> Layout:
        pieces, offset = [], 0
        for name, shape, dtype in tensors:
            pieces.append(Piece(name, shape, dtype, offset, (strides or {}).get(name)))
            offset += round_up(math.prod(shape) * dtype.itemsize, SLAB_ALIGNMENT_BYTES)
        return cls(tuple(pieces), offset)

    def renamed(self, names: dict[str, str]) -> Layout:
        """Return the same layout with other names."""
        return Layout(tuple(replace(piece, name=names[piece.name]) for piece in self.pieces), self.nbytes)

    def views(self, slab: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {tensor name: its view} into `slab`, uint8 of at least `nbytes`."""
        result = {}
        for piece in self.pieces:
            count = math.prod(piece.shape) * piece.dtype.itemsize
            flat = slab[piece.offset_bytes : piece.offset_bytes + count]
            typed = flat.view(piece.dtype)
            result[piece.name] = (
                typed.view(piece.shape) if piece.strides is None else typed.as_strided(piece.shape, piece.strides)
            )
        return result


class Store(Protocol):
    """A group's weights, or one slice's, where they wait. changes: how often values were changed there."""

    layout: Layout
    changes: int

    def renamed(self, names: dict[str, str]) -> Store:
        """Return the same store with its tensors under other names."""

    def announce(self) -> None:
        """Say that the weights will be copied soon, so that a disk may begin to read them."""

    def copy_to(self, slab: torch.Tensor, staging: torch.Tensor | None) -> None:
        """Put the weights into `slab` on any device, on the current stream; `staging` is host memory to go through."""

    def to_host(self) -> dict[str, torch.Tensor]:
        """Return the weights as tensors in host memory that outlive the store."""

    def where_they_wait(self) -> dict[str, torch.Tensor]:
        """Return the weights as tensors over the memory or the mapped files that they wait in, each with a storage of
        its own; in new memory only where no file holds them as they are.
        """

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return elements [start, stop) of one tensor, flat, in host memory: a view, or read anew.

        Raises:
            InputError: the file is not what it was.
        """


def new_slab(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return an uninitialised slab of `nbytes` on `device`."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def host_slab(nbytes: int, target: torch.device) -> torch.Tensor:
    """Return a slab of host memory to be copied from to `target`: pinned where that is a CUDA device.

    Pages of its own are registered, and no more: torch's pinned allocator would round up to a power of two.

    Raises:
        InputError: the host has no such memory left, or does not let it be pinned.
    """
    if target.type != "cuda" or nbytes == 0:
        return new_slab(nbytes, torch.device("cpu"))
    pages = _PinnedPages(-1, nbytes)
    slab = torch.frombuffer(pages, dtype=torch.uint8, count=nbytes)
    with torch.cuda.device(target):
        failure = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), nbytes, _PORTABLE))
    if failure:
        raise InputError(
            f"{format_bytes(nbytes)} of host memory cannot be pinned (CUDA error {failure}); raise the limit of locked "
            "memory (ulimit -l), or plan with less --ram"
        )
    pages.registered = slab.data_ptr()
    return slab


# cudaHostRegisterPortable: pinned for every device, not only for the current one.
_PORTABLE = 1


class _PinnedPages(mmap.mmap):
    """Pages that are unregistered before they are unmapped, when the last tensor over them is gone."""

    registered: int | None = None

    def __del__(self) -> None:
        if self.registered is not None:
            torch.cuda.cudart().cudaHostUnregister(self.registered)


def _apart(view: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory that does not share its storage with the rest of a slab."""
    if not view.numel():
        return view
    flat = view.as_strided((view.numel(),), (1,)).view(torch.uint8)
    return torch.from_numpy(flat.numpy()).view(view.dtype).as_strided(view.shape, view.stride())


class HostStore:
    """Weights in one slab of host memory, pinned or not."""

    def __init__(self, layout: Layout, slab: torch.Tensor):
        self.layout, self.slab, self.changes = layout, slab, 0

    def renamed(self, names: dict[str, str]) -> HostStore:
        return HostStore(self.layout.renamed(names), self.slab)

    def copied(self, target: torch.device, *, pinned: bool) -> HostStore:
        """Return a copy in memory of its own, as `host_slab` takes it where it is to be pinned."""
        slab = host_slab(self.layout.nbytes, target) if pinned else new_slab(self.layout.nbytes, torch.device("cpu"))
        slab.copy_(self.slab[: self.layout.nbytes])
        return HostStore(self.layout, slab)

    def views(self) -> dict[str, torch.Tensor]:
        """Return the weights as views of the slab, for the CPU to compute with."""
        return self.layout.views(self.slab)

    def where_they_wait(self) -> dict[str, torch.Tensor]:
        return {name: _apart(view) for name, view in self.views().items()}

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        return _apart(self.views()[name].reshape(-1)[start:stop])

    def announce(self) -> None:
        pass

    def copy_to(self, slab: torch.Tensor, staging: torch.Tensor | None) -> None:
        slab[: self.layout.nbytes].copy_(self.slab[: self.layout.nbytes], non_blocking=True)

    def to_host(self) -> dict[str, torch.Tensor]:
        return {name: view.clone() for name, view in self.views().items()}


class DiskStore:
    """Weights in the checkpoint's files, read each time they are needed. `expert` picks one slice of each tensor."""

    def __init__(
        self, layout: Layout, checkpoint: Checkpoint, sources: Sequence[TensorSource], expert: int | None = None
    ):
        self.layout, self.checkpoint, self.sources, self.expert = layout, checkpoint, tuple(sources), expert
        self.changes = 0

    def renamed(self, names: dict[str, str]) -> DiskStore:
        return DiskStore(self.layout.renamed(names), self.checkpoint, self.sources, self.expert)

    def of(self, checkpoint: Checkpoint) -> DiskStore:
        """Return the same weights, read through another opening of the same files."""
        return DiskStore(self.layout, checkpoint, self.sources, self.expert)

    def announce(self) -> None:
        for source in self.sources:
            source.announce(self.checkpoint, self.expert)

    def ranges(self, slab: torch.Tensor) -> Iterator[tuple[TensorEntry, int, int, torch.Tensor]]:
        """Yield (entry, start, stop, place): bytes [start, stop) of the entry belong to `place`, a part of `slab`."""
        for source, view in zip(self.sources, self.layout.views(slab).values(), strict=True):
            for entry, start, stop, index in source.ranges(self.expert):
                yield entry, start, stop, source.as_stored(view, sliced=self.expert is not None)[index]

    def fill(self, slab: torch.Tensor) -> None:
        """Read into `slab`, which is host memory."""
        for source, view in zip(self.sources, self.layout.views(slab).values(), strict=True):
            if self.expert is None:
                source.fill(self.checkpoint, view)
            else:
                source.fill_slice(self.checkpoint, self.expert, view)

    def copy_to(self, slab: torch.Tensor, staging: torch.Tensor | None) -> None:
        if slab.device.type == "cpu":
            self.fill(slab)
            return
        assert staging is not None
        self.fill(staging)
        slab[: self.layout.nbytes].copy_(staging[: self.layout.nbytes], non_blocking=True)

    def to_host(self) -> dict[str, torch.Tensor]:
        slab = new_slab(self.layout.nbytes, torch.device("cpu"))
        self.fill(slab)
        return self.layout.views(slab)

    def where_they_wait(self) -> dict[str, torch.Tensor]:
        assert self.expert is None
        found = {}
        for source, piece in zip(self.sources, self.layout.pieces, strict=True):
            entry = source.whole_entry()
            if entry is not None and entry.dtype == piece.dtype:
                found[piece.name] = source.as_used(self.checkpoint.map(entry), piece.strides)
            else:
                made = new_slab(math.prod(piece.shape) * piece.dtype.itemsize, torch.device("cpu"))
                found[piece.name] = Layout((replace(piece, offset_bytes=0),), made.nbytes).views(made)[piece.name]
                source.fill(self.checkpoint, found[piece.name])
        return found

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.checkpoint.check_unchanged()
        number = next(number for number, piece in enumerate(self.layout.pieces) if piece.name == name)
        piece = self.layout.pieces[number]
        whole = reserved(math.prod(piece.shape) * piece.dtype.itemsize, piece.dtype).view(piece.shape)
        for entry, first, last, index in self.sources[number].ranges(self.expert):
            place = whole[index]
            begin, end = span(place)
            if begin < stop and end > start:
                buffers.read(self.checkpoint, entry, first, last, place, None)
        return whole.view(-1)[start:stop]
