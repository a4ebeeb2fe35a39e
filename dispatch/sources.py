"""Which byte ranges of a checkpoint make up each tensor of a model.

Which stored tensors belong to which of the model's is told by `planner.conversions`. What transformers' loader does by
stacking them in memory is here written down as pieces instead, so that one expert can be read without the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from dispatch import buffers, place
from dispatch.checkpoint import Checkpoint, TensorEntry
from planner.conversions import Claim, match, targets_of, tied_names
from planner.errors import InputError, PlanMismatchError, TraceError
from planner.loading import COMPARE_BYTES

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A whole tensor of the checkpoint and its place: target[index] = entry, of one shape."""

    entry: TensorEntry
    index: tuple[slice | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """Where one tensor of the model comes from. The pieces cover it without gap or overlap.

    order: of its dimensions in memory, where that is not their own. in_order: whether the file has them so too.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    order: tuple[int, ...] | None = None
    in_order: bool = False

    def as_stored(self, tensor: torch.Tensor, *, sliced: bool = False) -> torch.Tensor:
        """Return a view of this tensor, or of one of its slices, with its dimensions as the file has them."""
        if self.order is None or not self.in_order:
            return tensor
        if not sliced:
            return tensor.permute(self.order)
        assert self.order[0] == 0
        return tensor.permute([dim - 1 for dim in self.order[1:]])

    def as_used(self, stored: torch.Tensor, strides: tuple[int, ...] | None) -> torch.Tensor:
        """Return a view of what the file has, whole, as the model uses it: `strides` tell of any other order."""
        return stored if strides is None else stored.as_strided(self.shape, strides)

    def whole_entry(self) -> TensorEntry | None:
        """Return the one entry that is exactly this tensor, in dtype and order, so that it may be mapped; or None."""
        if len(self.pieces) != 1 or (self.order is not None and not self.in_order):
            return None
        entry = self.pieces[0].entry
        shape = self.shape if self.order is None else tuple(self.shape[dim] for dim in self.order)
        return entry if (entry.dtype, entry.shape) == (self.dtype, shape) else None

    def fill(self, checkpoint: Checkpoint, destination: torch.Tensor, buffer: torch.Tensor | None = None) -> None:
        """Read the whole tensor into `destination`, of this shape and on any device.

        Pieces of the destination's own dtype go straight into its memory if that is contiguous and on the
        CPU; others pass through `buffer`, or one that is made (see `planner.loading`).

        Raises:
            InputError: the checkpoint cannot be read.
            ValueError: `destination` is of another shape.
        """
        _check_shape(self.name, destination, self.shape)
        there = self.as_stored(destination)
        for entry, start, stop, index in self.ranges():
            buffers.read(checkpoint, entry, start, stop, there[index], buffer)

    def fill_slice(
        self, checkpoint: Checkpoint, e: int, destination: torch.Tensor, buffer: torch.Tensor | None = None
    ) -> None:
        """Read target[e], one expert, into `destination` of shape `shape[1:]`, and no byte of the others.

        Memory and dtypes are as in `fill`.

        Raises:
            InputError: the checkpoint cannot be read.
            IndexError: there is no `e`.
            ValueError: `destination` is of another shape.
        """
        if not self.shape or not 0 <= e < self.shape[0]:
            raise IndexError(f"{self.name} of shape {self.shape} has no slice {e}")
        _check_shape(f"{self.name}[{e}]", destination, self.shape[1:])
        there = self.as_stored(destination, sliced=True)
        for entry, start, stop, index in self.ranges(e):
            buffers.read(checkpoint, entry, start, stop, there[index], buffer)

    def announce(self, checkpoint: Checkpoint, e: int | None) -> None:
        """Say that the tensor, or its slice `e`, will be read soon."""
        for entry, start, stop, _ in self.ranges(e):
            checkpoint.announce(entry, start=start, stop=stop)

    def same(self, checkpoint: Checkpoint, tensor: torch.Tensor) -> bool:
        """Return whether the checkpoint holds the very bytes of `tensor`. Takes COMPARE_BYTES of memory."""
        _check_shape(self.name, tensor, self.shape)
        buffer = torch.empty(COMPARE_BYTES, dtype=torch.uint8)
        held = self.as_stored(tensor.detach())
        return all(
            torch.equal(part.cpu().contiguous().view(torch.uint8), stored.view(torch.uint8))
            for piece in self.pieces
            for part, stored in buffers.parts(checkpoint, piece.entry, 0, held[piece.index], buffer, convert=True)
        )

    def buffer_bytes(self, device: torch.device, *, sliced: bool) -> int:
        """Return the buffer that the largest piece wants when it is read into `device`, whole or slice by slice."""
        most = 0
        for piece in self.pieces:
            index, shape, count = piece.index, self.shape, math.prod(piece.entry.shape)
            if sliced:
                if index and isinstance(index[0], slice):
                    count //= len(range(*index[0].indices(shape[0])))
                elif not index:
                    count //= shape[0]
                index, shape = index[1:], shape[1:]
            in_place = _is_one_run(index, shape)
            needed = buffers.needed_bytes(piece.entry, count, self.dtype, device, in_place=in_place)
            most = max(most, needed)
        return most

    def ranges(self, e: int | None = None) -> Iterator[tuple[TensorEntry, int, int, tuple[slice | int, ...]]]:
        """Yield (entry, start, stop, index): bytes [start, stop) of it are target[index], or target[e][index]."""
        if e is None:
            yield from ((piece.entry, 0, piece.entry.nbytes, piece.index) for piece in self.pieces)
            return
        for piece in self.pieces:
            first, *rest = piece.index or (slice(None),)
            if isinstance(first, int):
                if first == e:
                    yield piece.entry, 0, piece.entry.nbytes, tuple(rest)
                continue
            begin, end, _ = first.indices(self.shape[0])
            if begin <= e < end:
                row_bytes = piece.entry.nbytes // (end - begin)
                yield piece.entry, (e - begin) * row_bytes, (e - begin + 1) * row_bytes, tuple(rest)


def resolve_sources(model: nn.Module, checkpoint: Checkpoint, *, partial: bool = False) -> dict[str, TensorSource]:
    """Return the source of every parameter and persistent buffer of `model`, under each of its names.

    partial: of those that the checkpoint holds; it may lack others.

    The model may be on meta. Tied names (one Parameter object) share one source: that of whichever name the
    checkpoint holds. Where it holds several, their bytes are read and compared. No other data is read.
    Tensors of the checkpoint that the model does not have are passed over, as transformers does.

    Raises:
        InputError: tensors or experts are missing, two tensors claim one place, tied tensors differ, or the
            checkpoint's dtype cannot become the model's (a quantised checkpoint).
        PlanMismatchError: a shape differs: the checkpoint is of another model.
        TraceError: a tensor needs a conversion that is not carried yet.
    """
    targets = targets_of(model)
    matched = match(model, targets, checkpoint.names())
    blocked = matched.blocked
    sources = {name: _source(name, targets[name], claim, checkpoint) for name, claim in matched.claims.items()}
    for names in tied_names(targets):
        held = [name for name in names if name in sources]
        for other in held[1:]:
            _check_tie(checkpoint, sources[held[0]], sources[other])
        if held:
            first = sources[held[0]]
            for name in names:
                sources[name] = replace(first, name=name)
    missing = [name for name in targets if name not in sources]
    if refused := [name for name in missing if name in blocked]:
        raise TraceError(
            f"{_some(refused)} would be made by {blocked[refused[0]]}, which is not carried yet; "
            "save the model anew with save_pretrained(..., save_original_format=False)"
        )
    if missing and not partial:
        raise InputError(
            f"{checkpoint.path} lacks {len(missing)} of the {len(targets)} tensors: {_some(missing)}; "
            "is it of this model, and complete?"
        )
    return {name: sources[name] for name in targets if name in sources}


def _source(name: str, target: torch.Tensor, claim: Claim, checkpoint: Checkpoint) -> TensorSource:
    """Lay the entries of `claim` out in the target, and check that they are it."""
    shape = tuple(target.shape)
    columns = [[checkpoint[stored] for stored in column] for column in claim.columns()]
    if not claim.operations:
        pieces = [Piece(entry=columns[0][0], index=())]
        held: tuple[int, ...] = columns[0][0].shape
    elif type(claim.operations[0]).__name__ == "Concatenate":
        pieces, held = _concatenated([entry for column in columns for entry in column], claim.operations[0].dim)
    else:
        pieces, held = _stacked(name, claim, columns, shape)
    if held != shape:
        raise PlanMismatchError(
            f"{name} has the shape {held} in the checkpoint and {shape} in the model: the checkpoint is of "
            "another model; plan and load with one and the same"
        )
    for piece in pieces:
        kinds = {piece.entry.dtype, target.dtype}
        if len(kinds) > 1 and not kinds <= _FLOATS:
            raise InputError(
                f"{name} is {piece.entry.dtype} in the checkpoint and {target.dtype} in the model; quantised "
                "checkpoints load only into models of the same dtypes so far"
            )
    return TensorSource(name=name, shape=shape, dtype=target.dtype, pieces=tuple(pieces), order=place.order_of(target))


def _concatenated(
    entries: list[TensorEntry], dim: int, prefix: tuple[int, ...] = ()
) -> tuple[list[Piece], tuple[int, ...]]:
    """Return the pieces of target[prefix] = cat(entries, dim), and its shape; () where they disagree."""
    pieces: list[Piece] = []
    begin = 0
    before, after = entries[0].shape[:dim], entries[0].shape[dim + 1 :]
    for entry in entries:
        if len(entry.shape) <= dim or (entry.shape[:dim], entry.shape[dim + 1 :]) != (before, after):
            return [], ()
        end = begin + entry.shape[dim]
        pieces.append(Piece(entry=entry, index=(*prefix, *(slice(None),) * dim, slice(begin, end))))
        begin = end
    return pieces, (*before, begin, *after)


def _stacked(
    name: str, claim: Claim, columns: list[list[TensorEntry]], shape: tuple[int, ...]
) -> tuple[list[Piece], tuple[int, ...]]:
    """Return the pieces of stack(entries), with several columns joined along the second operation's dim."""
    experts = shape[0] if shape else 0
    if len(columns) != len(claim.patterns) or any(not _are_all(column, experts) for column in columns):
        counts = ", ".join(f"{len(claim.names.get(pattern, ()))} of {pattern}" for pattern in claim.patterns)
        raise InputError(f"{name} needs {experts} experts, numbered from 0, and the checkpoint has {counts}")
    pieces: list[Piece] = []
    shapes: set[tuple[int, ...]] = set()
    for e in range(experts):
        row = [column[e] for column in columns]
        if len(claim.operations) == 1:
            pieces += [Piece(entry=entry, index=(e,)) for entry in row]
            shapes |= {entry.shape for entry in row}
        else:
            joined, made = _concatenated(row, claim.operations[1].dim - 1, (e,))
            pieces += joined
            shapes.add(made)
    return pieces, (experts, *shapes.pop()) if len(shapes) == 1 else ()


def _are_all(entries: list[TensorEntry], experts: int) -> bool:
    """Return whether the entries are those of experts 0, 1, ... in order: one part of the name counts up."""
    if len(entries) != experts:
        return False
    names = [entry.name.split(".") for entry in entries]
    if experts == 1 or len({len(parts) for parts in names}) > 1:
        return experts == 1
    varying = [column for column in zip(*names, strict=True) if len(set(column)) > 1]
    return varying == [tuple(map(str, range(experts)))]


def _check_tie(checkpoint: Checkpoint, one: TensorSource, other: TensorSource) -> None:
    pairs = zip(one.pieces, other.pieces, strict=False)
    if len(one.pieces) != len(other.pieces) or not all(
        left.index == right.index and checkpoint.equal(left.entry, right.entry) for left, right in pairs
    ):
        raise InputError(
            f"the model ties {one.name} to {other.name}, and the checkpoint holds different values for them; "
            "set tie_word_embeddings=False in its config"
        )


def _is_one_run(index: tuple[slice | int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether tensor[index] of a contiguous tensor is contiguous: nothing is cut behind a whole dimension."""
    cut = [
        dim for dim, (part, size) in enumerate(zip(index, shape, strict=False))
        if isinstance(part, slice) and len(range(*part.indices(size))) < size
    ]  # fmt: skip
    return all(isinstance(index[dim], int) or shape[dim] == 1 for dim in range(max(cut, default=0)))


def _check_shape(name: str, destination: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(destination.shape) != shape:
        raise ValueError(f"{name} has the shape {shape} and its destination {tuple(destination.shape)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
