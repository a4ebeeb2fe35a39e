"""What a checkpoint's headers say of a model, beside what its config says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

from planner.conversions import Claim, match, targets_of, tied_names
from planner.graph import Layer, LayerGraph, LayerKind, Stored, Tensor
from planner.headers import DTYPES, Headers, StoredTensor
from planner.units import format_bytes

_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """stored: what is stored of each tensor of the model, by its full names; notes: what is to be told, in words."""

    stored: dict[str, Stored]
    notes: tuple[str, ...]


def compare(model: Any, headers: Headers, dtype: str) -> Comparison:
    """Return what `headers` hold of each tensor of `model` (on meta, to run in `dtype`), and where they disagree.

    What a quantiser keeps beside a weight (scales, packed blobs) counts to that weight.

    Raises:
        InputError: two stored tensors claim one place.
    """
    targets = targets_of(model)
    matched = match(model, targets, headers.tensors)
    parts = {name: [headers.tensors[n] for column in c.columns() for n in column] for name, c in matched.claims.items()}
    beside = _beside(targets, matched.unexpected, headers)
    quantised = {name for name, found in parts.items() if _is_packed(found, str(targets[name].dtype))}
    quantised |= {
        name for name, found in beside.items() if name not in parts and _is_packed(found, str(targets[name].dtype))
    }
    ties = tied_names(targets)
    stored = {
        name: _stored(parts.get(name, []), beside.get(name, []) if name in quantised else [], matched.claims.get(name))
        for name in (*parts, *(name for name in quantised if name not in parts))
    }
    for names in ties:
        held = next((stored[name] for name in names if name in stored), None)
        stored.update({name: held for name in names if held is not None})
    notes = [_total_note(headers, targets, dtype)]
    if quantised:
        notes.append(_quantised_note(headers, stored, quantised, dtype))
    notes += _dtype_notes(headers, parts, quantised, dtype)
    notes += _shape_notes(targets, matched.claims, parts, quantised)
    missing = [name for name in targets if name not in stored]
    conversions = sorted({matched.blocked[name] for name in missing if name in matched.blocked})
    if missing:
        why = f" ({', '.join(conversions)} is not carried yet)" if conversions else ""
        notes.append(
            f"THE CHECKPOINT LACKS {len(missing):,} of the {len(targets):,} tensors that the config describes"
            f"{why}: {_some(missing)}; it will not load"
        )
    counted = {tensor.name for name in quantised for tensor in beside.get(name, [])}
    extra = [name for name in matched.unexpected if name not in counted]
    if extra and not conversions:
        nbytes = sum(headers.tensors[name].nbytes for name in extra)
        notes.append(
            f"the checkpoint has {_count(extra)} ({format_bytes(nbytes)}) beyond what the config describes, "
            f"not loaded: {_some(extra)}"
        )
    return Comparison(stored=stored, notes=tuple(notes))


def with_stored(graph: LayerGraph, stored: Mapping[str, Stored]) -> LayerGraph:
    """Return the graph with what is stored of each tensor; layers that differ in it become kinds of their own."""
    kinds: dict[tuple[int, tuple[Stored | None, ...]], int] = {}
    values: list[LayerKind] = []
    layers: list[Layer] = []
    for layer in graph.layers:
        kind = graph.kinds[layer.kind]
        groups = tuple(
            dataclasses.replace(group, tensors=tuple(_told(tensor, layer.name, stored) for tensor in group.tensors))
            for group in kind.groups
        )
        key = (layer.kind, tuple(tensor.stored for group in groups for tensor in group.tensors))
        if key not in kinds:
            kinds[key] = len(values)
            values.append(dataclasses.replace(kind, groups=groups))
        layers.append(dataclasses.replace(layer, kind=kinds[key]))
    loose = tuple(_told(tensor, "", stored) for tensor in graph.loose)
    return dataclasses.replace(graph, kinds=tuple(values), layers=tuple(layers), loose=loose)


def _told(tensor: Tensor, layer: str, stored: Mapping[str, Stored]) -> Tensor:
    return dataclasses.replace(tensor, stored=stored.get(f"{layer}.{tensor.name}" if layer else tensor.name))


def _stored(parts: list[StoredTensor], beside: list[StoredTensor], claim: Claim | None) -> Stored:
    every = [*parts, *beside]
    largest = max(every, key=lambda tensor: tensor.nbytes)
    by_dtype: dict[str, int] = {}
    for tensor in every:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.nbytes
    name, item_bytes = DTYPES[max(by_dtype, key=lambda dtype: by_dtype[dtype])]
    return Stored(
        dtype=name,
        item_bytes=item_bytes,
        nbytes=sum(tensor.nbytes for tensor in every),
        pieces=len(every),
        largest_bytes=largest.nbytes,
        in_place=len(every) == 1 or claim is None or _joins_rows(claim),
    )


def _joins_rows(claim: Claim) -> bool:
    """Return whether each stored tensor is one run of bytes of what it is joined to."""
    joining = [operation for operation in claim.operations if type(operation).__name__ == "Concatenate"]
    return all(operation.dim == len(claim.operations) - 1 for operation in joining)


def _is_packed(parts: list[StoredTensor], dtype: str) -> bool:
    """Return whether a tensor of floats is stored in what no model computes with."""
    is_float = "float" in dtype and "float8" not in dtype
    return is_float and any("float" not in DTYPES[p.dtype][0] or "float8" in DTYPES[p.dtype][0] for p in parts)


def _beside(
    targets: Mapping[str, Any], unexpected: Mapping[str, str], headers: Headers
) -> dict[str, list[StoredTensor]]:
    """Return {target: stored tensors of no target of their own that lie in its module, or deeper where the model has
    none (of one expert of fused ones)}; the largest target of a module has them.
    """
    largest: dict[str, str] = {}
    for name, tensor in targets.items():
        parent = name.rpartition(".")[0]
        if parent not in largest or tensor.numel() > targets[largest[parent]].numel():
            largest[parent] = name
    found: dict[str, list[StoredTensor]] = {}
    for name, renamed in unexpected.items():
        parent = renamed.rpartition(".")[0]
        while parent and parent not in largest:
            parent = parent.rpartition(".")[0]
        if parent in largest:
            found.setdefault(largest[parent], []).append(headers.tensors[name])
    return found


def _total_note(headers: Headers, targets: Mapping[str, Any], dtype: str) -> str:
    held = " and ".join(f"{format_bytes(n)} {DTYPES[name][0]}" for name, n in headers.bytes_by_dtype().items())
    unique = {id(tensor): tensor.numel() * tensor.element_size() for tensor in targets.values()}
    return (
        f"the checkpoint's headers: {len(headers.tensors):,} tensors, {format_bytes(headers.total_bytes)} on disk "
        f"({held}); in memory {format_bytes(sum(unique.values()))}, in {dtype}"
    )


def _quantised_note(headers: Headers, stored: Mapping[str, Stored], quantised: set[str], dtype: str) -> str:
    nbytes = sum(stored[name].nbytes for name in quantised)
    return (
        f"THE CHECKPOINT IS QUANTISED: {len(quantised):,} weights take {format_bytes(nbytes)} of its "
        f"{format_bytes(headers.total_bytes)}; the plan is for these weights in {dtype}, and dispatch does not load "
        "quantised weights yet"
    )


def _dtype_notes(
    headers: Headers, parts: Mapping[str, list[StoredTensor]], quantised: Iterable[str], dtype: str
) -> list[str]:
    """Name the tensors that are stored in another dtype than most, and what is converted while loading."""
    packed = set(quantised)
    plain = {name: found for name, found in parts.items() if name not in packed}
    usual = headers.float_dtype()
    others: dict[str, list[StoredTensor]] = {}
    for found in plain.values():
        for tensor in found:
            if DTYPES[tensor.dtype][0] != usual and "float" in DTYPES[tensor.dtype][0]:
                others.setdefault(DTYPES[tensor.dtype][0], []).append(tensor)
    notes = [
        f"{_count(tensors)} ({format_bytes(sum(t.nbytes for t in tensors))}) stored in {name}, not in "
        f"{usual}: {_some([t.name for t in tensors])}"
        + ("" if name == dtype else f"; converted to {dtype} while loading")
        for name, tensors in sorted(others.items())
    ]
    if usual is not None and usual != dtype and not packed:
        notes.append(f"weights are stored in {usual} and become {dtype} while loading; none can be used from the file")
    return notes


def _shape_notes(
    targets: Mapping[str, Any],
    claims: Mapping[str, Claim],
    parts: Mapping[str, list[StoredTensor]],
    quantised: Iterable[str],
) -> list[str]:
    packed = set(quantised)
    wrong = []
    for name, found in parts.items():
        shape = tuple(targets[name].shape)
        fits = (
            found[0].shape == shape
            if not claims[name].operations
            else sum(math.prod(tensor.shape) for tensor in found) == math.prod(shape)
        )
        if not fits and name not in packed:
            wrong.append((name, shape, found))
    if not wrong:
        return []
    name, shape, found = wrong[0]
    held = str(found[0].shape) if len(found) == 1 else f"{len(found)} tensors of {found[0].shape}"
    return [
        f"THE CHECKPOINT IS NOT OF THIS CONFIG: {_count(wrong)} of another shape, such as {name}, which is "
        f"{held} in the checkpoint and {shape} by the config; it will not load"
    ]


def _count(items: Sized) -> str:
    return f"{len(items):,} tensor" + ("" if len(items) == 1 else "s")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
