"""Brings what a module is handed to the device where it runs, tells which layers that is needed for, and brings what a
model returns to its caller's device.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from dispatch import hooks, peers
from planner.graph import LayerGraph

# What was moved in this call, by the original's identity and the device: a weak reference to it, and its copy.
Moved = dict[int, tuple[Any, Any]]


def mover(device: torch.device, moved: Moved, skip_keys: Collection[str] = ()) -> hooks.Before:
    """Return a hook that brings a layer's arguments to its device; what several layers take is moved once a call, and
    the copy lives no longer than what it was made of.

    skip_keys: of keyword arguments, and of dicts in them, that stay where they are.
    """

    def bring(value: torch.Tensor) -> torch.Tensor:
        if value.device == device:
            return value
        key = hash((id(value), device))
        known = moved.get(key)
        if known is None or known[0]() is not value:
            known = moved[key] = (weakref.ref(value, lambda _: moved.pop(key, None)), peers.bring(value, device))
        found: torch.Tensor = known[1]
        return found

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Most layers are handed what is there: looking takes less time than making the arguments anew.
        if not is_away(args, device) and not is_away(kwargs.values(), device):
            return args, kwargs
        return changed(args, bring), changed(kwargs, bring, skip_keys)

    return before


@dataclasses.dataclass(frozen=True, slots=True)
class Boundary:
    """Brings what a model returns to the device of the first tensor that it was handed."""

    skip_keys: Collection[str] = ()

    def run(
        self, module: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what the forward returns."""
        device = first_device((args, kwargs))
        out = forward(*args, **kwargs)
        return out if device is None else changed(out, lambda one: peers.bring(one, device), self.skip_keys)


def changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor], skip_keys: Collection[str] = ()) -> Any:
    """Return a value with each tensor in it changed: in tuples, lists, mappings and dataclasses, of their own kinds.

    What holds no tensor that changes is returned as it is, and nothing is changed in place.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        # Its sizes stay on the host, and its other parts go together.
        data = change(value.data)
        return value if data is value.data else value.to(data.device)  # type: ignore[arg-type]  # torch annotates dtypes alone
    if isinstance(value, (tuple, list)):
        items = [changed(item, change, skip_keys) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    parts = _parts(value)
    if parts is None:
        return value
    kept = skip_keys if isinstance(value, Mapping) else ()
    new = {key: item if key in kept else changed(item, change, skip_keys) for key, item in parts.items()}
    new = {key: item for key, item in new.items() if item is not parts[key]}
    return _with(value, new) if new else value


def first_device(value: Any) -> torch.device | None:
    """Return the device of the first tensor in a value, or None."""
    if isinstance(value, torch.Tensor):
        return value.device
    items = value if isinstance(value, (tuple, list)) else (_parts(value) or {}).values()
    return next((found for item in items if (found := first_device(item)) is not None), None)


def is_away(values: Iterable[Any], device: torch.device) -> bool:
    """Tell whether any tensor in `values`, lists, mappings and dataclasses is on another device."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.device != device:
                return True
        elif isinstance(value, (tuple, list)):
            if is_away(value, device):
                return True
        elif value is not None and (parts := _parts(value)) is not None and is_away(parts.values(), device):
            return True
    return False


def handed_over(
    graph: LayerGraph, devices: Sequence[torch.device], forwards: Sequence[Callable[..., Any]]
) -> tuple[int, ...]:
    """Return the layers that may be handed tensors from another device than theirs, where the model is called with
    tensors on the first layer's; `devices` and `forwards` are those of each layer.

    The others take something that layers made, and from the first of these on all layers run on one device: what one of
    them only passes on is there too. They are called once a pass. And they run where the caller's own tensors are, or
    take nothing but one tensor.
    """
    first: dict[int, int] = {}
    for edge in graph.edges:
        first[edge.target] = min(edge.source, first.get(edge.target, edge.source))

    def stays(index: int) -> bool:
        if index not in first or graph.layers[index].called_again:
            return False
        here = devices[index]
        is_among_its_own = all(device == here for device in devices[first[index] : index])
        return is_among_its_own and (here == devices[0] or _takes_one_tensor(forwards[index]))

    return tuple(index for index in range(len(graph.layers)) if not stays(index))


def _takes_one_tensor(forward: Callable[..., Any]) -> bool:
    taken = list(inspect.signature(forward).parameters.values())
    return (
        len(taken) == 1
        and taken[0].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        and taken[0].annotation in (torch.Tensor, "torch.Tensor", "Tensor")
    )


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """Return what is in a mapping or a dataclass, by key or field."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value) if hasattr(value, entry.name)
        }
    return None


def _with(value: Any, new: dict[Any, Any]) -> Any:
    """Return a copy of a mapping or a dataclass that has other values."""
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return type(value)({**value, **new})  # type: ignore[call-arg]  # as mappings are made
    made = copy.copy(value)
    for key, item in new.items():
        if isinstance(made, MutableMapping):
            made[key] = item
        else:
            # A frozen dataclass too: the copy is nobody else's yet.
            object.__setattr__(made, key, item)
    return made
