"""A module as a row of units, each of which has one place in a device map: layers that stay whole, and lone tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from planner.layers import HOLDERS, WHOLE
from planner.map_fill import Unit
from planner.module_sizes import Sizes

# Of as many modules one is split alone, to try.
_FEW = 8
_Named = tuple[str, torch.Tensor, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A module that is not split, or one of the tensors of a module that is. need: as in `Unit`.

    pieces: its tensors, (name, tensor, whether it is a buffer), by what is brought at a time where it waits.
    """

    name: str
    pieces: tuple[tuple[_Named, ...], ...]
    need: int

    @property
    def tensors(self) -> tuple[_Named, ...]:
        return tuple(entry for piece in self.pieces for entry in piece)


def rows_of(
    model: torch.nn.Module,
    no_split_module_classes: Collection[str] | str | None,
    dtype: Any,
    special_dtypes: Mapping[str, Any] | None,
    *,
    offload_buffers: bool = False,
    largest: int | None = None,
) -> tuple[tuple[Unit, ...], ...]:
    """Return the ways to take a model apart: modules that have tensors of their own left whole, split down to each
    depth at which there are any, and, where these are few, one of them split alone.

    What shares tensors and takes more than `largest` bytes together is placed apart.
    """
    given = no_split_module_classes
    whole = {given} if isinstance(given, str) else set(given or ())
    sizes = Sizes.read(dtype, special_dtypes)
    rows: list[tuple[Unit, ...]] = []
    for opened in _openings(model):
        units = units_of(model, whole, sizes, opened=opened, offload_buffers=offload_buffers)
        apart = [
            name for unit in units if largest is not None and unit.nbytes > largest and len(unit.names) > 1
            for name in unit.names
        ]  # fmt: skip
        if apart:
            ids = _tied(model, apart)
            units = units_of(model, whole, sizes, opened=opened, offload_buffers=offload_buffers, apart=ids)
        if units not in rows:
            rows.append(units)
    return tuple(rows)


def units_of(
    model: torch.nn.Module,
    whole: Collection[str],
    sizes: Sizes,
    *,
    opened: Collection[str],
    offload_buffers: bool = False,
    apart: Collection[int] = (),
) -> tuple[Unit, ...]:
    """Return what has to be placed, in the order of registration; parts that share a tensor are one unit.

    A module is not split where its class is in `whole`, where it has no children, and, unless it is `opened`, where it
    has tensors of its own: those are used where the module's input is, and no hook brings them. The model itself always
    is, into children and tensors.

    apart: tensors, by id, whose users are placed apart all the same; each then counts the tensor.
    """
    parts = list(_parts(model, whole, opened=opened))
    joined: list[list[_Part]] = []
    owner: dict[int, int] = {}
    for part in parts:
        shared = {owner[id(tensor)] for _, tensor, _ in part.tensors if id(tensor) in owner and id(tensor) not in apart}
        first = min(shared, default=len(joined))
        if first == len(joined):
            joined.append([])
        for other in sorted(shared - {first}):
            joined[first] += joined[other]
            joined[other] = []
            owner = {key: first if place == other else place for key, place in owner.items()}
        joined[first].append(part)
        owner |= {id(tensor): first for _, tensor, _ in part.tensors}
    return tuple(_unit(group, sizes, offload_buffers=offload_buffers) for group in joined if group)


def _openings(model: torch.nn.Module) -> Iterator[Collection[str]]:
    """Yield sets of modules to split that have both tensors of their own and children."""
    found = [
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if path
        and (children := _children(path, module, frozenset()))
        and (any(_own(path, module)) or any(isinstance(child, HOLDERS) for _, child in children))
    ]
    yield ()
    for depth in sorted({path.count(".") for path in found}):
        yield {path for path in found if path.count(".") <= depth}
    for path in found if len(found) <= _FEW else []:
        yield {other for other in found if path == other or path.startswith(f"{other}.")}


def _tied(model: torch.nn.Module, names: Collection[str]) -> set[int]:
    """Return the ids of tensors that more than one of the named parts uses."""
    found: dict[int, set[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False),
    ]:  # fmt: skip
        part = next((n for n in names if n in ("", name) or name.startswith(f"{n}.")), "")
        found.setdefault(id(tensor), set()).add(part)
    return {key for key, parts in found.items() if len(parts) > 1}


def _parts(model: torch.nn.Module, whole: Collection[str], *, opened: Collection[str]) -> Iterator[_Part]:
    waiting: list[tuple[str, torch.nn.Module, int, frozenset[int]]] = [("", model, 0, frozenset())]
    while waiting:
        path, module, need, above = waiting.pop()
        children = _children(path, module, above)
        own = list(_own(path, module))
        is_model = module is model
        is_used = own or any(isinstance(child, HOLDERS) for _, child in children)
        if _is_whole(module, children, whole) or (is_used and not is_model and path not in opened):
            yield _Part(name=path, pieces=tuple(_pieces(path, module, whole, above)), need=need)
            continue
        need = 2 if is_model else 1
        for entry in own:
            yield _Part(name=entry[0], pieces=((entry,),), need=need)
        inside = above | {id(module)}
        waiting += [
            (name, child, need if isinstance(child, HOLDERS) else 0, inside) for name, child in reversed(children)
        ]


def _pieces(
    path: str, module: torch.nn.Module, whole: Collection[str], above: frozenset[int]
) -> Iterator[tuple[_Named, ...]]:
    """Yield the tensors of a module that waits by what is brought together: a layer that is whole, or tensors of a
    module's own.
    """
    children = _children(path, module, above)
    if _is_whole(module, children, whole):
        yield tuple(_below(path, module, above))
        return
    yield tuple(_own(path, module))
    for name, child in children:
        yield from _pieces(name, child, whole, above | {id(module)})


def _is_whole(module: torch.nn.Module, children: list[tuple[str, torch.nn.Module]], whole: Collection[str]) -> bool:
    return not children or type(module).__name__ in whole or isinstance(module, (*WHOLE, *HOLDERS))


def _children(path: str, module: torch.nn.Module, above: frozenset[int]) -> list[tuple[str, torch.nn.Module]]:
    """Return (path, module) of children; a module inside itself is not entered again."""
    return [
        (f"{path}.{name}" if path else name, child)
        for name, child in module._modules.items()
        if child is not None and id(child) not in above
    ]


def _own(path: str, module: torch.nn.Module) -> Iterator[_Named]:
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor, table is module._buffers


def _below(path: str, module: torch.nn.Module, above: frozenset[int]) -> Iterator[_Named]:
    """Yield the tensors of a module and of all below it, under every name."""
    yield from _own(path, module)
    for name, child in _children(path, module, above):
        yield from _below(name, child, above | {id(module)})


def _unit(parts: list[_Part], sizes: Sizes, *, offload_buffers: bool) -> Unit:
    tensors = [entry for part in parts for entry in part.tensors]
    buffers = [(name, tensor) for name, tensor, is_buffer in tensors if is_buffer]
    brought = [
        [(name, tensor) for name, tensor, is_buffer in piece if offload_buffers or not is_buffer]
        for part in parts
        for piece in part.pieces
    ]
    return Unit(
        names=tuple(part.name for part in parts),
        tensors=tuple(name for name, _, _ in tensors),
        nbytes=sizes.total((name, tensor) for name, tensor, _ in tensors),
        left_bytes=0 if offload_buffers else sizes.total(buffers),
        brought_bytes=max(sizes.total(each) for each in brought),
        need=max(part.need for part in parts),
    )
