"""Brings what a layer is handed to the device where it runs, and tells which layers that is needed for."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dispatch import hooks, peers
from planner.graph import LayerGraph

# What was moved in this call, by the original's identity and the device: a weak reference to it, and its copy.
Moved = dict[int, tuple[Any, Any]]


def mover(device: torch.device, moved: Moved) -> hooks.Before:
    """Return a hook that brings a layer's arguments to its device; what several layers take is moved once a call, and
    the copy lives no longer than what it was made of.
    """

    def bring(value: Any) -> Any:
        if isinstance(value, (tuple, list, dict)):
            return _each(value, bring)
        if not isinstance(value, torch.Tensor):
            return value
        if value.device == device:
            return value
        key = hash((id(value), device))
        known = moved.get(key)
        if known is None or known[0]() is not value:
            known = moved[key] = (weakref.ref(value, lambda _: moved.pop(key, None)), peers.bring(value, device))
        return known[1]

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Most layers are handed what is there: looking takes less time than making the arguments anew.
        if not is_away(args, device) and not is_away(kwargs.values(), device):
            return args, kwargs
        return tuple(bring(value) for value in args), {key: bring(value) for key, value in kwargs.items()}

    return before


def is_away(values: Iterable[Any], device: torch.device) -> bool:
    """Tell whether any tensor in `values`, lists and dictionaries is on another device."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.device != device:
                return True
        elif isinstance(value, (tuple, list)):
            if is_away(value, device):
                return True
        elif isinstance(value, dict) and is_away(value.values(), device):
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


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*(change(item) for item in value))
    return type(value)(change(item) for item in value)
