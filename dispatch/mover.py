"""Brings what a layer is handed to the device where it runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from dispatch import hooks, peers

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

    def is_away(values: Iterable[Any]) -> bool:
        for value in values:
            if isinstance(value, torch.Tensor):
                if value.device != device:
                    return True
            elif isinstance(value, (tuple, list)):
                if is_away(value):
                    return True
            elif isinstance(value, dict) and is_away(value.values()):
                return True
        return False

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Most layers are handed what is there: looking takes less time than making the arguments anew.
        if not is_away(args) and not is_away(kwargs.values()):
            return args, kwargs
        return tuple(bring(value) for value in args), {key: bring(value) for key, value in kwargs.items()}

    return before


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*(change(item) for item in value))
    return type(value)(change(item) for item in value)
