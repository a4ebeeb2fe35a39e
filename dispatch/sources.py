"""Which byte ranges of a checkpoint make up each tensor of a model.

A checkpoint's names and shapes are not always the model's: base models lack a prefix, tied weights are stored
once, and transformers 5 holds all experts of a layer in one 3-D parameter while checkpoints keep a tensor an
expert. The renaming rules are transformers' own; what its loader does by stacking tensors in memory is here
written down as pieces instead, so that one expert can be read without the others.

Carried: renamings, MergeModulelist(dim=0), Concatenate, and the two in this order. Any other conversion that
a model needs (Transpose, Chunk, a quantiser's) is refused by name.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dispatch.checkpoint import Checkpoint, TensorEntry
from planner.errors import InputError, PlanMismatchError, TraceError
from planner.units import MIB

_CONVERT_CHUNK_BYTES = 32 * MIB
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A whole tensor of the checkpoint and its place: target[index] = entry, of one shape."""

    entry: TensorEntry
    index: tuple[slice | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSource:
    """Where one tensor of the model comes from. The pieces cover it without gap or overlap."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def whole_entry(self) -> TensorEntry | None:
        """Return the one entry that is exactly this tensor, dtype too, so that it may be mapped; or None."""
        if len(self.pieces) != 1:
            return None
        entry = self.pieces[0].entry
        return entry if (entry.dtype, entry.shape) == (self.dtype, self.shape) else None

    def fill(self, checkpoint: Checkpoint, destination: torch.Tensor) -> None:
        """Read the whole tensor into `destination`, of this shape.

        Pieces of the destination's own dtype go straight into its memory if that is contiguous and on the
        CPU; others pass through at most 32 MiB of memory, or one piece where its place is not contiguous.

        Raises:
            InputError: the checkpoint cannot be read.
            ValueError: `destination` is of another shape.
        """
        _check_shape(self.name, destination, self.shape)
        for piece in self.pieces:
            _read(checkpoint, piece.entry, 0, piece.entry.nbytes, destination[piece.index])

    def fill_slice(self, checkpoint: Checkpoint, e: int, destination: torch.Tensor) -> None:
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
        for entry, start, stop, index in self._ranges_of_slice(e):
            _read(checkpoint, entry, start, stop, destination[index])

    def _ranges_of_slice(self, e: int) -> Iterator[tuple[TensorEntry, int, int, tuple[slice | int, ...]]]:
        """Yield (entry, start, stop, index): bytes [start, stop) of the entry are target[e][index]."""
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


def resolve_sources(model: nn.Module, checkpoint: Checkpoint) -> dict[str, TensorSource]:
    """Return the source of every parameter and persistent buffer of `model`, under each of its names.

    The model may be on meta. Tied names (one Parameter object) share one source: that of whichever name the
    checkpoint holds. Where it holds several, their bytes are read and compared. No other data is read.
    Tensors of the checkpoint that the model does not have are passed over, as transformers does.

    Raises:
        InputError: tensors or experts are missing, two tensors claim one place, tied tensors differ, or the
            checkpoint's dtype cannot become the model's (a quantised checkpoint).
        PlanMismatchError: a shape differs: the checkpoint is of another model.
        TraceError: a tensor needs a conversion that is not carried yet.
    """
    targets = _targets(model)
    found, blocked = _match(model, checkpoint, targets)
    sources = {name: _source(name, targets[name], claim) for name, claim in found.items()}
    for names in _tied_names(targets):
        held = [name for name in names if name in sources]
        for other in held[1:]:
            _check_tie(checkpoint, sources[held[0]], sources[other])
        if held:
            first = sources[held[0]]
            for name in names:
                sources[name] = TensorSource(name=name, shape=first.shape, dtype=first.dtype, pieces=first.pieces)
    missing = [name for name in targets if name not in sources]
    if refused := [name for name in missing if name in blocked]:
        raise TraceError(
            f"{_some(refused)} would be made by {blocked[refused[0]]}, which is not carried yet; "
            "save the model anew with save_pretrained(..., save_original_format=False)"
        )
    if missing:
        raise InputError(
            f"{checkpoint.path} lacks {len(missing)} of the {len(targets)} tensors: {_some(missing)}; "
            "is it of this model, and complete?"
        )
    return {name: sources[name] for name in targets}


@dataclass(slots=True)
class _Claim:
    """The entries of one target, by source pattern and in the loader's order, and what is done with them."""

    operations: tuple[Any, ...]
    patterns: tuple[str, ...]
    entries: dict[str, list[TensorEntry]] = field(default_factory=lambda: defaultdict(list))


def _targets(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers of `model` under every name, tied ones too."""
    targets: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                targets[f"{prefix}.{name}" if prefix else name] = buffer
    return targets


def _tied_names(targets: Mapping[str, torch.Tensor]) -> list[list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in targets.items():
        names[id(tensor)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _match(
    model: nn.Module, checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor]
) -> tuple[dict[str, _Claim], dict[str, str]]:
    """Return what the checkpoint holds for each target, and {target: conversion} where that is not."""
    found: dict[str, _Claim] = {}
    blocked: dict[str, str] = {}
    names = _TransformersNames(model, targets) if _is_pretrained(model) else _PlainNames()
    for name in sorted(checkpoint.names(), key=names.order):
        target, converter, pattern = names.rename(name)
        if converter is not None and not _is_carried(converter.operations):
            first, conversion = converter.target_patterns[0], " + ".join(map(repr, converter.operations))
            for other in converter.target_patterns:
                blocked[target.replace(first, other)] = conversion
        elif target in targets:
            operations = () if converter is None else tuple(converter.operations)
            patterns = ("",) if converter is None else tuple(converter.source_patterns)
            claim = found.setdefault(target, _Claim(operations, patterns))
            if claim.entries and (converter is None or claim.patterns != patterns):
                other = next(iter(claim.entries.values()))[0].name
                raise InputError(
                    f"both {other!r} and {name!r} of the checkpoint stand for {target!r}; remove one of them"
                )
            claim.entries[pattern or ""].append(checkpoint[name])
    return found, blocked


class _PlainNames:
    """Checkpoint name → (the model's name, no converter, no pattern): they are the same."""

    def order(self, name: str) -> Any:
        return name

    def rename(self, name: str) -> tuple[str, Any, str | None]:
        return name, None, None


def _is_pretrained(model: nn.Module) -> bool:
    if "transformers" not in sys.modules:  # then no model can be one of its classes
        return False
    from transformers.modeling_utils import PreTrainedModel

    return isinstance(model, PreTrainedModel)


class _TransformersNames:
    """Checkpoint name → (the model's name, converter, its pattern), as transformers' loader finds them.

    The rules and the renaming are transformers' own; what is called here is the same in 5.17 and 5.23 (read).
    """

    def __init__(self, model: Any, targets: Mapping[str, torch.Tensor]):
        from transformers import conversion_mapping, core_model_loading

        quantizer = getattr(model, "hf_quantizer", None)
        transforms = conversion_mapping.get_model_conversion_mapping(model, None, quantizer)
        self.order = core_model_loading.dot_natural_key
        self._rename = core_model_loading.rename_source_key
        self._renamings = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._prefix = model.base_model_prefix
        self._targets = targets

    def rename(self, name: str) -> tuple[str, Any, str | None]:
        target, pattern = self._rename(name, self._renamings, self._converters, self._prefix, self._targets)
        if target not in self._targets and name in self._targets:
            # The checkpoint already has the model's own layout, which a pattern happened to match.
            target, pattern = self._rename(name, [], [], self._prefix, self._targets)
        return target, None if pattern is None else self._by_pattern[pattern], pattern


def _is_carried(operations: list[Any]) -> bool:
    from transformers.core_model_loading import Concatenate, MergeModulelist

    # By exact class, so that a subclass that does more is not taken for its parent.
    kinds = [type(operation) for operation in operations]
    if kinds == [Concatenate]:
        return bool(operations[0].dim >= 0)
    if kinds == [MergeModulelist, Concatenate]:
        return bool(operations[0].dim == 0 and operations[1].dim > 0)
    return bool(kinds == [MergeModulelist] and operations[0].dim == 0)


def _source(name: str, target: torch.Tensor, claim: _Claim) -> TensorSource:
    """Lay the entries of `claim` out in the target, and check that they are it."""
    shape = tuple(target.shape)
    columns = [claim.entries[pattern] for pattern in claim.patterns if pattern in claim.entries]
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
    return TensorSource(name=name, shape=shape, dtype=target.dtype, pieces=tuple(pieces))


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
    name: str, claim: _Claim, columns: list[list[TensorEntry]], shape: tuple[int, ...]
) -> tuple[list[Piece], tuple[int, ...]]:
    """Return the pieces of stack(entries), with several columns joined along the second operation's dim."""
    experts = shape[0] if shape else 0
    if len(columns) != len(claim.patterns) or any(not _are_all(column, experts) for column in columns):
        counts = ", ".join(f"{len(claim.entries.get(pattern, ()))} of {pattern}" for pattern in claim.patterns)
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


def _read(checkpoint: Checkpoint, entry: TensorEntry, start: int, stop: int, place: torch.Tensor) -> None:
    """Read bytes [start, stop) of `entry` into `place`, converting where the dtypes differ."""
    if start == stop:
        return
    place = place.detach()
    if not place.is_contiguous():
        whole = torch.empty(place.shape, dtype=entry.dtype)
        checkpoint.read_into(entry, whole, start=start, stop=stop)
        place.copy_(whole)
    elif place.dtype == entry.dtype and place.device.type == "cpu":
        checkpoint.read_into(entry, place, start=start, stop=stop)
    else:
        flat, itemsize = place.view(-1), entry.dtype.itemsize
        step = _CONVERT_CHUNK_BYTES // itemsize
        temporary = torch.empty(min(step, flat.numel()), dtype=entry.dtype)
        for begin in range(0, flat.numel(), step):
            part = temporary[: min(step, flat.numel() - begin)]
            at = start + begin * itemsize
            checkpoint.read_into(entry, part, start=at, stop=at + part.nbytes)
            flat[begin : begin + len(part)].copy_(part)


def _check_shape(name: str, destination: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(destination.shape) != shape:
        raise ValueError(f"{name} has the shape {shape} and its destination {tuple(destination.shape)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
